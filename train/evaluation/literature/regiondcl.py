"""RegionDCL: Li, Huang, Cong, Wang, Wang, *Urban Region Representation Learning with OpenStreetMap Building
Footprints*, KDD 2023. It cannot be run on counts and flows."""

from collections.abc import Sequence
from typing import NoReturn

from topt_deploy.errors import BadData

from ..problem import Problem
from .graphs import Array


class RegionDcl:
    """RegionDCL embeds groups of buildings by their footprints' shapes, and regions by the groups within them.

    Its input is polygons of buildings and the road network that parts them into groups; it reads neither POI counts per
    region nor flows. Nothing of it can be computed from the city's tables.
    """

    def predict(self, problem: Problem, task: str, labels: Array, seeds: Sequence[int]) -> NoReturn:
        """Refuse.

        Raises:
            BadData: Always: the city's tables have no buildings.
        """
        raise BadData(
            "RegionDCL was not run: it learns from the shapes of buildings",
            expected="building footprints and the road network (OpenStreetMap), for every region",
            found=f"counts per region ({', '.join(problem.city.views)})",
            fix="leave this baseline out; the regions table has no footprints",
        )
