"""ToPT made deployable: train with PyTorch, export one checked bundle, predict without PyTorch.

    import topt_deploy as topt

    topt.build("chicago.toml", "chicago/")
    run = topt.train("chicago/", tasks=["crime"])
    run.export("model.topt")
    predictions = topt.load("model.topt").predict("chicago/")

Importing this package imports nothing else: each name is imported when it is first used. ``__init__.pyi`` has the same
names for type checkers.
"""

import os

__version__ = "0.1.0"

_PUBLIC = {
    "BuildReport": "train.datasets.build.report",
    "Inputs": "runtime.model",
    "Model": "runtime.model",
    "RowsSetAside": "runtime.model",
    "ToptError": "errors",
    "TrainedRun": "train.trained_run",
    "build": "train.datasets.build.city",
    "encode": "prompts.encode_regions",
    "load": "runtime.model",
}
"""Each public name, and the module that it is in. Stages are named as text: the core imports none of them. ``train`` is
a package that can be called."""

__all__ = [
    "BuildReport", "Inputs", "Model", "RowsSetAside", "ToptError", "TrainedRun", "build", "encode", "load", "train",
]  # fmt: skip

# From 1.29 on, ONNX Runtime tells its maker of every session, unless this is set before it is imported. It is set here
# because nothing of ours is imported before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> object:
    """A public name, imported now."""
    from importlib import import_module

    if name == "train":
        return import_module(f"{__name__}.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, "train"})
