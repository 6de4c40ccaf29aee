import json
from dataclasses import replace

import pytest

from topt_deploy.prompts.geotext import geo_text
from topt_deploy.prompts.templates import load_templates

WORDING = load_templates().wording


def test_a_whole_text():
    pois = {"food_and_drink": 81, "school": 16, "bar": 16, "prison": 0, "parking": 143.0}
    assert geo_text(WORDING, lon=-87.67098940737404, lat=42.01, address="12, Mill Street,\n Chicago", pois=pois) == (
        "Geographic description of one region of a city.\n"
        "Centroid Coordinates: (42.010000, -87.670989)\n"
        "Address: 12, Mill Street, Chicago\n"
        "Included POIs: 143 parking (55.86%), 81 food and drink (31.64%), 16 bar (6.25%), 16 school (6.25%)."
        " The total number of POIs in this region is 256."
    )


def test_what_is_absent_is_left_out():
    bare = geo_text(WORDING, lon=0.0, lat=-0.5)
    assert bare == "Geographic description of one region of a city.\nCentroid Coordinates: (-0.500000, 0.000000)"
    assert geo_text(WORDING, lon=0.0, lat=-0.5, pois={"bar": 0}) == bare + "\nIncluded POIs: none."
    assert geo_text(WORDING, lon=0.0, lat=-0.5, pois={}) == bare + "\nIncluded POIs: none."


@pytest.mark.parametrize(
    ("count", "written"), [(1, "1 x (100.00%)"), (2.5, "2.5 x"), (1 / 3, "0.333333 x"), (1234567.0, "1234567 x")]
)
def test_numbers(count, written):
    assert f": {written}" in geo_text(WORDING, lon=0.0, lat=0.0, pois={"x": count})


def test_braces_in_what_is_filled_in_stay():
    text = geo_text(WORDING, lon=0.0, lat=0.0, address="{lat} {0.__class__}", pois={"{total}": 1})
    assert "Address: {lat} {0.__class__}\n" in text
    assert "1 {total} (100.00%)" in text


def test_doubled_braces_in_the_wording_are_braces():
    wording = replace(WORDING, heading="{{a}}", no_pois="{{b}}")
    assert geo_text(wording, lon=0.0, lat=0.0, pois={}).startswith("{a}\n")
    assert geo_text(wording, lon=0.0, lat=0.0, pois={}).endswith("\n{b}")


def test_the_order_of_categories_does_not_count():
    counts = {"b": 2, "a": 2, "c": 9}
    assert geo_text(WORDING, lon=0.0, lat=0.0, pois=counts) == geo_text(
        WORDING, lon=0.0, lat=0.0, pois=dict(reversed(counts.items()))
    )


def test_the_form_of_published_texts(published):
    """FlexiReg's own text of Chicago's regions, rebuilt from what it says: the same facts in the same places."""
    regions = json.loads((published / "Prompt4RE" / "data" / "prompt_data.json").read_text())
    for region in regions:
        (theirs,) = (part["text"] for part in region["content"] if part["type"] == "text")
        _, coordinates, address, listed = theirs.split("\n")
        lat, lon = (float(x) for x in coordinates.removeprefix("Centroid Coordinates: (").rstrip(")").split(", "))
        entries, total = listed.removeprefix("Included POIs: ").split(". The total number of POIs in this region is ")
        counts = {}
        for entry in entries.split(", "):
            count, name = entry.split(" ", 1)
            counts[name.split(" (")[0]] = int(count)
        ours = geo_text(WORDING, lon=lon, lat=lat, address=address.removeprefix("Address: "), pois=counts).split("\n")
        assert len(ours) == 4
        assert ours[2] == address
        assert ours[3].endswith(f". The total number of POIs in this region is {total}")
        for entry in entries.split(", "):
            count_and_name, _, share = entry.partition(" (")
            assert f"{count_and_name} (" in ours[3]
            if share:
                assert f"{count_and_name} ({float(share.rstrip('%)')):.2f}%)" in ours[3]
