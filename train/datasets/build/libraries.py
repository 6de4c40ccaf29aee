"""Libraries of the extra ``build``, imported where they are used."""

import importlib
from typing import Any

from topt_deploy.errors import BadConfig


def library(module: str, extra: str = "build") -> Any:
    """A library.

    Args:
        module: What is imported.
        extra: The extra of this package that brings it.

    Raises:
        BadConfig: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BadConfig(
            f"this needs {module.partition('.')[0]}, which is not installed", fix=f"pip install 'topt-deploy[{extra}]'"
        ) from error
