"""MGFN: Wu, Yan, Fan, Pan, Zhu, Zheng, Cheng, Wang, *Multi-Graph Fusion Networks for Urban Region Embedding*,
IJCAI 2022. It cannot be run on an OD matrix."""

from collections.abc import Sequence
from typing import NoReturn

from topt_deploy.errors import BadData

from ..problem import Problem
from .graphs import Array


class Mgfn:
    """MGFN fuses hourly mobility graphs into a few mobility patterns and attends within and across these.

    With one graph there is one pattern: the clustering of graphs and the attention across patterns have nothing to
    work on, and what is left is a self-attention encoder of the OD matrix. That would be another method under this
    name.
    """

    def predict(self, problem: Problem, task: str, labels: Array, seeds: Sequence[int]) -> NoReturn:
        """Refuse.

        Raises:
            BadData: Always: mobility.parquet has no time of day.
        """
        raise BadData(
            "MGFN was not run: it is built on many mobility graphs, one per hour",
            expected="flows by hour, clustered into seven patterns in the paper",
            found="one OD matrix" if problem.city.flows is not None else "no flows",
            fix="leave this baseline out; the mobility table has no column for the hour",
        )
