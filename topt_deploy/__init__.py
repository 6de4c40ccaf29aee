"""ToPT made deployable: train with PyTorch, export one checked bundle, predict without PyTorch."""

__version__ = "0.1.0"
