"""Getting a city's data and training on it, with PyTorch.

The package itself can be called: ``topt_deploy.train("chicago/")`` trains a city (:func:`.trained_run.train`). A
package and a function of one name are one attribute of ``topt_deploy``, and so must be one object.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Train a city: :func:`.trained_run.train`."""
        from .trained_run import train

        return train(*arguments, **options)

    @property
    def __wrapped__(self) -> Any:
        """The function, whose signature and text help() and editors show."""
        from .trained_run import train

        return train


sys.modules[__name__].__class__ = _Callable
