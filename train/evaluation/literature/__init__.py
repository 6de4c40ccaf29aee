"""The literature's methods, each after its paper. docs/background/literature.md says what each is and needs."""

from collections.abc import Callable

from ..problem import Method
from .flexireg import FlexiRegStyle
from .hafusion import HaFusion
from .hrep import Hrep
from .mgfn import Mgfn
from .mvure import Mvure
from .recp import Recp
from .regiondcl import RegionDcl

LITERATURE: dict[str, Callable[[], Method]] = {
    "mvure": Mvure,
    "mgfn": Mgfn,
    "hrep": Hrep,
    "recp": Recp,
    "regiondcl": RegionDcl,
    "hafusion": HaFusion,
    "flexireg-style": FlexiRegStyle,
}
"""Methods by name, in the order of their papers' years; each call makes one with the paper's settings.

Mgfn and RegionDcl raise :class:`BadData` when they are to predict: they need data that no city here has.
"""
