"""Which city a table is of: told by the table or by a folder, however the path to it is written."""

import os
import shutil
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import LAND_USE, POI, replaced, tiny_city_tables

from topt_deploy.data.city import Schema, hive_city, read_city
from topt_deploy.errors import BadData
from topt_deploy.runtime.predictor import load

SCHEMA = Schema(views={"poi": POI, "land_use": LAND_USE}, mobility=True)


def two_cities(mobility: pa.Table, names=("A", "B")) -> pa.Table:
    """The flows as those of one city, and tenfold as those of another with the same region ids."""
    tenfold = replaced(mobility, flow=[10 * flow for flow in mobility.column("flow").to_pylist()])
    rows = pa.concat_tables([mobility, tenfold])
    return replaced(rows, city_id=[name for name in names for _ in range(len(mobility))])


@pytest.fixture
def shared_flows(desk):
    """The demo's regions in ``city=A`` without a city_id, and beside them flows of two cities."""
    folder = desk.folder / "city=A"
    folder.mkdir()
    pq.write_table(pq.read_table(desk.regions).drop_columns("city_id"), folder / "regions.parquet")
    pq.write_table(two_cities(pq.read_table(desk.mobility).drop_columns("city_id")), folder / "mobility.parquet")
    return folder


def test_a_relative_path_means_the_same_city_as_an_absolute_one(shared_flows, desk, topt_run, monkeypatch):
    wanted = desk.folder / "wanted.parquet"
    assert topt_run("predict", desk.regions, "--out", wanted).code == 0
    monkeypatch.chdir(shared_flows)
    for number, given in enumerate((".", "regions.parquet", shared_flows / "regions.parquet")):
        assert topt_run("predict", given, "--bundle", desk.bundle, "--out", f"out{number}.parquet").code == 0
        found = pq.read_table(shared_flows / f"out{number}.parquet", partitioning=None)
        assert set(found.column("city_id").to_pylist()) == {"A"}
        assert found.column("prediction").equals(pq.read_table(wanted).column("prediction"))


def test_flows_of_several_cities_are_refused_where_the_city_is_not_known(shared_flows, desk, topt_run, monkeypatch):
    elsewhere = shutil.move(shared_flows, desk.folder / "elsewhere")
    monkeypatch.chdir(elsewhere)
    said = topt_run("predict", "regions.parquet", "--bundle", desk.bundle)
    assert said.code == 65
    assert "flows of several cities" in said.err
    assert "'A', 'B'" in said.err


def test_python_and_training_refuse_them_too(demo_bundle):
    regions, mobility = tiny_city_tables()
    with pytest.raises(BadData, match="several cities"):
        read_city(regions, two_cities(mobility), SCHEMA, labels=["crime"])
    regions, mobility = (pq.read_table(demo_bundle.with_name(f"{n}.parquet")) for n in ("regions", "mobility"))
    with pytest.raises(BadData, match="several cities"):
        load(demo_bundle).predict(regions.drop_columns("city_id"), two_cities(mobility))


def test_flows_with_and_without_a_city_are_those_of_several():
    regions, mobility = tiny_city_tables()
    with pytest.raises(BadData, match="several cities"):
        read_city(regions, two_cities(mobility, ("A", None)), SCHEMA)


@pytest.mark.parametrize("folder", ["city=7", "city_id=7"])
def test_partitions_name_the_city(folder, tmp_path, monkeypatch):
    (tmp_path / folder).mkdir()
    assert hive_city(tmp_path / folder / "part-0.parquet") == "7"
    monkeypatch.chdir(tmp_path / folder)
    assert hive_city(os.path.relpath(tmp_path / folder / "part-0.parquet")) == "7"


@pytest.mark.parametrize("kind", [pa.int64(), pa.int16(), pa.float64(), pa.decimal128(9, 2), pa.string()], ids=str)
@pytest.mark.parametrize("other", [pa.int64(), pa.float64(), pa.string()], ids=str)
def test_a_city_with_a_number_is_the_same_in_both_tables(kind, other):
    regions, mobility = tiny_city_tables()
    values = [Decimal(7)] * len(regions) if pa.types.is_decimal(kind) else [7] * len(regions)
    named = pa.array(["7"] * len(regions)) if kind == pa.string() else pa.array(values, kind)
    flows = two_cities(mobility, (7, 8))
    flows = flows.set_column(flows.column_names.index("city_id"), "city_id", flows.column("city_id").cast(other))
    city = read_city(replaced(regions, city_id=named), flows, SCHEMA)
    assert city.city_id == "7"
    assert city.flows.flow.sum() == sum(mobility.column("flow").to_pylist())
