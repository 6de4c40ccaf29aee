"""Prediction without PyTorch. Programs open a bundle with ``topt_deploy.load``; these names are for its own stages."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .predictor import Predictor, load

__all__ = ["Predictor", "load"]


def __getattr__(name: str) -> Any:
    """Import on first use: ``topt-run --help`` needs none of it, and topt-run has a word with pyarrow before."""
    if name in __all__:
        from . import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
