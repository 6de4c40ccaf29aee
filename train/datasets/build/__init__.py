"""From the files that cities publish to the two tables of docs/contracts.md."""

from .city import BuildReport, build
from .recipe import Recipe, read_recipe

__all__ = ["BuildReport", "Recipe", "build", "read_recipe"]
