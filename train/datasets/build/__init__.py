"""From the files that cities publish to the two tables of docs/reference/files.md."""

from .city import build
from .recipe import Recipe, read_recipe
from .report import BuildReport

__all__ = ["BuildReport", "Recipe", "build", "read_recipe"]
