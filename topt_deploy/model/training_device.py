"""The device on which PyTorch computes."""

import torch

from topt_deploy.errors import NoDevice


def check_device(device: str) -> None:
    """Refuse a device that PyTorch does not find.

    Args:
        device: ``cpu`` or ``cuda``.

    Raises:
        NoDevice: Naming what to do.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise NoDevice(
            "CUDA was requested and PyTorch finds no CUDA device",
            expected="an NVIDIA GPU with its driver, and a CUDA build of PyTorch",
            found=f"PyTorch {torch.__version__}",
            fix="use --device cpu, or install a CUDA build of PyTorch",
        )
