"""A bundle as an MLflow model: what ``mlflow.pyfunc`` loads from a folder of ``topt-deploy export --mlflow``.

MLflow hands over one DataFrame, so a region's row holds the flows that leave it. Nothing of MLflow is imported here.
"""

import os
from typing import Any

import pyarrow as pa

from topt_deploy.bundle import SIGNATURE_VARIABLE
from topt_deploy.data.columns import CITY_ID, REGION_ID
from topt_deploy.errors import BadData

from .predictor import Predictor, load

DEST, FLOW = LEAVING = ("dest_id", "flow")
"""Per region, equally long lists of where its flows lead and of how large they are; null where none leaves."""


class MlflowModel:
    """The model as MLflow calls it.

    Args:
        predictor: The loaded bundle.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def predict(self, model_input: Any) -> Any:
        """Predict every city of a DataFrame as a whole.

        Args:
            model_input: A pandas DataFrame, one row per region as in regions.parquet (docs/reference/files.md), with
                :data:`LEAVING` where the model reads flows. Several cities are told apart by ``city_id``.

        Returns:
            The long predictions table as a DataFrame, city after city, each in the order of its rows.

        Raises:
            ToptError: If the input is not what the bundle reads.
        """
        if not hasattr(model_input, "groupby") or not hasattr(model_input, "columns"):
            raise BadData("not a DataFrame", file="regions table", found=type(model_input).__name__)
        if len(model_input) == 0:
            raise BadData("the table is empty", file="regions table", expected="at least one region", found="0 rows")
        cities = [model_input]
        if CITY_ID in model_input:
            cities = [city for _, city in model_input.groupby(CITY_ID, sort=False, dropna=False)]
        return pa.concat_tables([self._city(city) for city in cities]).to_pandas()

    def _city(self, frame: Any) -> pa.Table:
        mobility = _mobility(frame) if self._predictor.bundle.manifest.mobility else None
        try:
            regions = pa.Table.from_pandas(frame.drop(columns=list(LEAVING), errors="ignore"), preserve_index=False)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise BadData(f"a column holds several kinds of values ({error})", file="regions table") from error
        return self._predictor.predict(regions, mobility)


def _mobility(frame: Any) -> pa.Table:
    """The flows of all regions as the table of the contract."""
    columns: dict[str, list[Any]] = {"origin_id": [], DEST: [], FLOW: []}
    for name in (REGION_ID, *LEAVING):
        if name not in frame:
            raise BadData(
                "column is absent", file="regions table", column=name,
                expected=f"{DEST} and {FLOW}, lists of the flows that leave each region",
                found=", ".join(map(str, frame.columns)), fix="see docs/how-to/mlflow.md",
            )  # fmt: skip
    for origin, dests, flows in zip(*(frame[name] for name in (REGION_ID, *LEAVING)), strict=True):
        if _null(dests) and _null(flows):
            continue
        if not _listed(dests) or not _listed(flows) or len(dests) != len(flows):
            raise BadData(
                "not equally long lists", file="regions table", column=f"{DEST}, {FLOW}", ids=[origin],
                expected="as many numbers as destinations, or null in both",
            )  # fmt: skip
        for name, values in zip(columns, ([origin] * len(dests), dests, flows), strict=True):
            columns[name] += list(values)
    try:
        kinds = (pa.string(), pa.string(), pa.float64())
        return pa.table({n: pa.array(v, kind) for (n, v), kind in zip(columns.items(), kinds, strict=True)})
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise BadData(
            f"not ids and numbers ({error})", file="regions table", column=f"{DEST}, {FLOW}",
            expected="lists of strings, and lists of numbers",
        ) from error  # fmt: skip


def _null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _listed(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str | dict)


def _load_pyfunc(path: str) -> MlflowModel:
    """Load the bundle for MLflow; every byte of it is checked, and its signature where one is required."""
    return MlflowModel(load(path, key=os.environ.get(SIGNATURE_VARIABLE) or None))
