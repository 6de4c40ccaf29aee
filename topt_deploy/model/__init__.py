"""The ToPT model in PyTorch: the only place of the core that imports torch."""
