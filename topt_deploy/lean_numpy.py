"""numpy without what takes a quarter of its import: the documentation of compiled functions, and types for checkers."""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

DEFERRED = ("numpy._core._add_newdocs", "numpy._core._add_newdocs_scalars", "numpy._typing")
"""Modules that numpy imports, and that a program does without."""


class _Deferred(ModuleType):
    """A module that is imported when something of it is asked for, and that numpy's own import asks nothing of but the
    name of a type."""

    def __getattr__(self, name: str) -> Any:
        if getattr(sys.modules["numpy"].__spec__, "_initializing", False):
            if name == "NDArray":  # which annotations have, of named tuples that linalg returns
                return list
            if name == "__path__":  # asked of everything that something is imported from
                raise AttributeError(name)
        if sys.modules[self.__name__] is self:
            sys.meta_path.remove(_Deferring)
            del sys.modules[self.__name__]
            import_module(self.__name__)
            sys.meta_path.insert(0, _Deferring)
        return getattr(sys.modules[self.__name__], name)


class _Deferring:
    """A finder, and a loader, of these modules."""

    @staticmethod
    def find_spec(name: str, *_: object) -> ModuleSpec | None:
        """The place of one of them."""
        return ModuleSpec(name, _Deferring) if name in DEFERRED else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        """The module."""
        return _Deferred(spec.name)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """Nothing is done yet."""


def lean_numpy() -> None:
    """Have numpy's import leave these modules for when something of them is asked for."""
    sys.meta_path.insert(0, _Deferring)
