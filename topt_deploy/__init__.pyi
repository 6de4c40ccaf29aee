"""The public names with their types, for type checkers; ``__init__.py`` imports each when it is first used."""

from .runtime.model import Inputs as Inputs
from .runtime.model import Model as Model
from .runtime.model import RowsSetAside as RowsSetAside
from .runtime.model import load as load

__version__: str
