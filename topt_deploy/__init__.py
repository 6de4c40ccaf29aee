"""ToPT made deployable: train with PyTorch, export one checked bundle, predict without PyTorch."""

import os

__version__ = "0.1.0"

# From 1.29 on, ONNX Runtime tells its maker of every session, unless this is set before it is imported. It is set here
# because nothing of ours is imported before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
