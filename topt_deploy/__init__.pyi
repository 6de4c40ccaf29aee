"""The public names with their types, for type checkers; ``__init__.py`` imports each when it is first used."""

from .errors import ToptError as ToptError
from .prompts.encode_regions import encode as encode
from .runtime.model import Inputs as Inputs
from .runtime.model import Model as Model
from .runtime.model import RowsSetAside as RowsSetAside
from .runtime.model import load as load
from .train.datasets.build.city import build as build
from .train.datasets.build.report import BuildReport as BuildReport
from .train.trained_run import TrainedRun as TrainedRun
from .train.trained_run import train as train

__version__: str
