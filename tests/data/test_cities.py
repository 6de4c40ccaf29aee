"""Several cities as one: each keeps what it has alone, and nothing leads from one to another."""

from dataclasses import replace

import numpy as np
import pytest
from builders import LAND_USE, POI, tiny_city

from topt_deploy.data.cities import stack_cities
from topt_deploy.data.city import Schema
from topt_deploy.data.features import DESTINATIONS, POSITION, all_widths, features
from topt_deploy.errors import BadData

SIZES = (9, 12, 7)


def cities(**more):
    return {f"city {n}": tiny_city(n, seed=n, **more) for n in SIZES}


def test_a_city_alone_stays_as_it_is():
    city = tiny_city(9)
    assert stack_cities({"one": city}) is city
    assert city.blocks == [slice(0, 9)]
    assert city.part.tolist() == [0] * 9


def test_every_city_keeps_its_rows_labels_and_flows():
    own = cities()
    city = stack_cities(own)
    assert len(city) == sum(SIZES)
    assert len(set(city.region_id)) == len(city)
    assert [block.stop - block.start for block in city.blocks] == list(SIZES)
    for (name, part), block in zip(own.items(), city.blocks, strict=True):
        assert city.region_id[block].tolist() == [f"{name}/{region}" for region in part.region_id]
        for view, counts in part.views.items():
            np.testing.assert_array_equal(city.views[view][block], counts)
        for task, labels in part.labels.items():
            np.testing.assert_array_equal(city.labels[task][block], labels)
        mine = (city.flows.origin >= block.start) & (city.flows.origin < block.stop)
        np.testing.assert_array_equal(city.flows.origin[mine] - block.start, part.flows.origin)
        np.testing.assert_array_equal(city.flows.dest[mine] - block.start, part.flows.dest)
        np.testing.assert_array_equal(city.flows.flow[mine], part.flows.flow)
    assert (city.part[city.flows.origin] == city.part[city.flows.dest]).all()


def test_features_are_those_that_each_city_has_alone():
    own = cities()
    city = stack_cities(own)
    together = features(city)
    for part, block in zip(own.values(), city.blocks, strict=True):
        for name, alone in features(part).items():
            np.testing.assert_array_equal(together[name][block], alone)


def test_the_parts_know_no_label():
    assert all(part.labels == {} for part in stack_cities(cities()).parts)


def test_without_flows_in_one_city_there_are_none():
    own = cities()
    own["city 9"] = replace(own["city 9"], flows=None)
    assert stack_cities(own).flows is None


def test_prompts_of_two_encoders_do_not_mix():
    own = cities(prompts=("prompt_crime",))
    own["city 7"] = replace(own["city 7"], encoders={"prompt_crime": "another"})
    with pytest.raises(BadData, match="different encoders") as refused:
        stack_cities(own)
    assert "city 9" in str(refused.value)
    assert "another" in str(refused.value)


def test_without_places_the_head_sees_neither_positions_nor_where_flows_lead():
    schema = Schema(views={"poi": POI, "land_use": LAND_USE}, mobility=True)
    names = set(all_widths(schema)) - set(all_widths(replace(schema, places=False)))
    assert names == {POSITION, DESTINATIONS}
