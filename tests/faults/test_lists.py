"""Counts in a list mean something by their names alone."""

import pyarrow as pa
import pytest
from builders import LAND_USE, POI, replaced, tiny_city_tables

from topt_deploy.data.city import Schema, infer_schema, read_city
from topt_deploy.errors import BadData


def unnamed(view: str = "poi") -> pa.Table:
    lists, _ = tiny_city_tables(lists=True)
    return replaced(lists.drop_columns(view), **{view: lists[view].combine_chunks()})


@pytest.mark.parametrize(("view", "names"), [("poi", POI), ("land_use", LAND_USE)])
def test_a_list_without_names_is_no_view(view, names):
    with pytest.raises(BadData, match="does not name its categories") as caught:
        read_city(unnamed(view), None, Schema(views={view: names}, mobility=False))
    assert names[0] in caught.value.expected
    with pytest.raises(BadData, match="does not name its categories"):
        infer_schema(unnamed(view), views=[view], mobility=False)


def test_a_model_whose_categories_are_positions_reads_positions():
    schema = Schema(views={"poi": ("00", "01", "02", "03")}, mobility=False)
    city = read_city(unnamed(), None, schema)
    rows = unnamed().column("poi").to_pylist()
    assert city.views["poi"].tolist() == [rows[row] for row in city.input_row]
    with pytest.raises(BadData, match="does not name"):
        read_city(unnamed(), None, Schema(views={"poi": ("0", "1", "2", "3")}, mobility=False))


def test_names_that_occur_twice_are_refused():
    lists, _ = tiny_city_tables(lists=True)
    field = pa.field("poi", lists.schema.field("poi").type, metadata={"categories": '["bar", "bar", "school", "shop"]'})
    table = pa.table({"region_id": lists["region_id"], "poi": lists["poi"]})
    table = table.cast(pa.schema([table.schema.field("region_id"), field]))
    with pytest.raises(BadData, match="do not fit"):
        infer_schema(table, views=["poi"], mobility=False)
