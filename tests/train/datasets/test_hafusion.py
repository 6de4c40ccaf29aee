import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from topt_deploy.data.city import infer_schema, read_city
from topt_deploy.errors import BadData, Exit, NoInput, ToptError, UsageError
from topt_deploy.train.cli.datasets import import_group
from topt_deploy.train.datasets.hafusion import import_hafusion

DATA = Path(__file__).parents[4] / "shared" / "data"
chicago = pytest.mark.skipif(not (DATA / "HAFusion").is_dir(), reason=f"the published Chicago data is not in {DATA}")
N = 12
TASKS = ("crime", "check_in", "service_call")


@pytest.fixture
def clone(tmp_path):
    """The layout of data_NY and data_SF: other sizes, float64 and int64, labels (n, 1), no coordinates."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "HAFusion" / "data_NY"
    folder.mkdir(parents=True)
    flow = rng.poisson(1.0, (N, N))
    arrays = {
        "poi_dist": rng.poisson(5, (N, 26)).astype(np.float64),
        "landUse_dist": rng.poisson(3, (N, 23)).astype(np.int64),
        "mob_dist": flow.astype(np.float64),
        "mob-adj": 2 * flow.T,
        "crime_counts": rng.poisson(50, (N, 1)).astype(np.float64),
        "check_counts": rng.poisson(90, (N, 1)),
        "serviceCall_counts": rng.poisson(70, (N, 1)),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder.parent


@pytest.fixture
def places(tmp_path):
    """Region numbers and places, in another order than the published rows, and one that is not ours."""
    path = tmp_path / "places.csv"
    rows = [f"{k:03d},{-74 + k / 100},{40 + k / 100}" for k in [99, *range(N, 0, -1)]]
    path.write_text("\n".join(["number,lon,lat", *rows]))
    return path


@pytest.fixture
def prompt4re(tmp_path, clone):
    """Prompt4RE's layout for the made-up city, regions numbered from 3 in their image paths."""
    data = tmp_path / "Prompt4RE" / "data"
    data.mkdir(parents=True)
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": f"/somewhere/satellite_{i}.0.png"},
                {"type": "image", "image": f"/somewhere/matched_images_by_region/{i + 3}/a.jpg"},
                {"type": "text", "text": f"Centroid Coordinates: ({40 + i}, -{70 + i}.5)\nAddress: {i}"},
            ],
        }
        for i in range(N)
    ]
    (data / "prompt_data.json").write_text(json.dumps(messages))
    np.save(data / "crime_counts.npy", np.load(clone / "data_NY" / "crime_counts.npy").astype(int))
    for stem in ("crime", "checkIn", "serviceCall"):
        np.save(data / f"prompt_embs_qwen_{stem}.npy", np.full((N, 5), len(stem), np.float16))
    return data.parent


def replace(clone, name, change):
    path = clone / "data_NY" / f"{name}.npy"
    np.save(path, change(np.load(path)))


def run(clone, out, **options):
    return import_hafusion(clone, "NY", out=out, **options)


def test_layout_of_new_york(clone, places, tmp_path):
    out = tmp_path / "deep" / "ny"
    report = run(clone, out, geometry=places, geometry_id="number")
    data = clone / "data_NY"
    table = pq.read_table(out / "regions.parquet")
    assert table["region_id"].to_pylist() == [f"{k:02d}" for k in range(1, N + 1)]
    assert table["lat"].to_pylist() == [40 + k / 100 for k in range(1, N + 1)], "matched by number, not by row"
    assert table["poi_25"].type == table["land_use_22"].type == table["crime"].type == pa.int64()
    assert table["crime"].to_pylist() == np.load(data / "crime_counts.npy")[:, 0].tolist()
    assert b"named by position" in table.schema.metadata[b"categories"]
    assert "text" not in table.column_names
    assert (report.regions, report.categories) == (N, {"poi": 26, "land_use": 23})

    schema = infer_schema(table, views=("poi", "land_use"), mobility=True)
    city = read_city(out / "regions.parquet", out / "mobility.parquet", schema, labels=TASKS)
    dense = np.zeros((2, N, N))
    dense[:, city.flows.origin, city.flows.dest] = city.flows.flow, city.flows.target
    np.testing.assert_array_equal(dense[0], np.load(data / "mob_dist.npy"))
    np.testing.assert_array_equal(dense[1], np.load(data / "mob-adj.npy"))
    np.testing.assert_array_equal(city.views["land_use"], np.load(data / "landUse_dist.npy"))


def test_prompt4re(clone, prompt4re, tmp_path):
    report = run(clone, tmp_path / "ny", prompt4re=prompt4re, encoder="qwen")
    table = pq.read_table(tmp_path / "ny" / "regions.parquet")
    assert table["region_id"].to_pylist() == [f"{k:02d}" for k in range(3, N + 3)], "as the images are filed"
    assert table["lon"].to_pylist() == [-(70.5 + i) for i in range(N)]
    assert table["text"][0].as_py().endswith("Address: 0")
    assert table["prompt_check_in"].type == pa.list_(pa.float32(), 5)
    assert table["prompt_check_in"][0].as_py() == [7.0] * 5
    assert table.schema.field("prompt_crime").metadata == {b"encoder": b"Qwen/Qwen2.5-VL-7B-Instruct"}
    assert "prompt_none" not in table.column_names
    assert "images" not in table.column_names
    assert "24 image paths" in str(report)


def test_prompt4re_without_encoder_brings_texts_alone(clone, prompt4re, tmp_path):
    report = run(clone, tmp_path / "ny", prompt4re=prompt4re)
    names = pq.read_schema(tmp_path / "ny" / "regions.parquet").names
    assert "text" in names
    assert not [name for name in names if name.startswith("prompt_")]
    assert "prompts     none" in str(report)


def test_shapes_travel_along(clone, tmp_path):
    shapely = pytest.importorskip("shapely", reason="needs the geo extra")
    cells = shapely.box(np.arange(N) - 90.0, 40, np.arange(N) - 89.0, 41)
    features = [
        {"type": "Feature", "properties": {}, "geometry": json.loads(shapely.to_geojson(cell))} for cell in cells
    ]
    path = tmp_path / "cells.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    run(clone, tmp_path / "ny", geometry=path, geometry_by_position=True)
    table = pq.read_table(tmp_path / "ny" / "regions.parquet")
    assert json.loads(table.schema.metadata[b"geo"])["columns"]["geometry"]["geometry_types"] == ["Polygon"]
    assert shapely.equals(shapely.from_wkb(table["geometry"].to_pylist()), cells).all()
    assert table["lon"][0].as_py() == -89.5


def test_same_bytes_again(clone, places, tmp_path):
    for out in ("a", "b"):
        run(clone, tmp_path / out, geometry=places, geometry_id="number")
    for name in ("regions.parquet", "mobility.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "change", "parts"),
    [
        ("poi_dist", lambda a: a[:, 0], ["any × any", f"found:    {N}"]),
        ("landUse_dist", lambda a: a[:-1], [f"{N} × any", f"{N - 1} × 23"]),
        ("mob_dist", lambda a: a[:, :-1], [f"{N} × {N}", f"{N} × {N - 1}"]),
        ("mob-adj", lambda a: -a, ["not negative", "row 0"]),
        ("crime_counts", lambda a: a[1:], [f"expected: {N}", f"found:    {N - 1}"]),
        ("check_counts", lambda a: np.hstack([a, a]), [f"{N} × 2"]),
        ("serviceCall_counts", lambda a: np.where(a == a.max(), np.nan, a), ["finite", "nan"]),
        ("poi_dist", lambda a: a.astype(str), ["not numbers"]),
    ],
)
def test_damaged_files_are_named(clone, places, tmp_path, name, change, parts):
    replace(clone, name, change)
    with pytest.raises(BadData) as caught:
        run(clone, tmp_path / "ny", geometry=places, geometry_id="number")
    assert all(part in str(caught.value) for part in [f"{name}.npy", *parts])
    assert not (tmp_path / "ny").exists()


def test_pickles_are_never_opened(clone, tmp_path):
    path = clone / "data_NY" / "poi_dist.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(BadData, match=r"poi_dist\.npy: not a plain \.npy array"):
        run(clone, tmp_path / "ny")


def test_fractions_stay_fractions(clone, places, tmp_path):
    replace(clone, "landUse_dist", lambda a: a / 2)
    run(clone, tmp_path / "ny", geometry=places, geometry_id="number")
    assert pq.read_schema(tmp_path / "ny" / "regions.parquet").field("land_use_00").type == pa.float64()


@pytest.mark.parametrize(
    ("text", "column", "error", "parts"),
    [
        (None, None, NoInput, ["publishes no coordinates", "--geometry FILE"]),
        ("number,lon,lat\n1,2,3\n", None, UsageError, ["--geometry-id", "--geometry-order position"]),
        (
            "number,lon,lat\n1,2,3\n",
            "number",
            BadData,
            ["regions without a feature", "'2'", f"{N - 1} in all"],
        ),
        (
            "number,lon,lat\n1,2,3\n",
            "position",
            BadData,
            ["another number of features", f"{N}", "found:    1"],
        ),
    ],
)
def test_places_that_do_not_fit(clone, tmp_path, text, column, error, parts):
    options = {}
    if text:
        options["geometry"] = tmp_path / "p.csv"
        options["geometry"].write_text(text)
        options |= {"geometry_by_position": True} if column == "position" else {"geometry_id": column}
    with pytest.raises(error) as caught:
        run(clone, tmp_path / "ny", **options)
    assert all(part in str(caught.value) for part in parts)


def test_prompt4re_of_other_regions(clone, prompt4re, tmp_path):
    counts = prompt4re / "data" / "crime_counts.npy"
    np.save(counts, np.load(counts)[::-1])
    with pytest.raises(BadData, match="rows may be other regions"):
        run(clone, tmp_path / "ny", prompt4re=prompt4re)
    messages = prompt4re / "data" / "prompt_data.json"
    messages.write_text(json.dumps(json.loads(messages.read_text())[1:]))
    with pytest.raises(BadData, match="another number of regions") as caught:
        run(clone, tmp_path / "ny", prompt4re=prompt4re)
    assert (caught.value.expected, caught.value.found) == (f"{N}, as in HAFusion", str(N - 1))


def test_texts_without_coordinates(clone, prompt4re, tmp_path):
    messages = prompt4re / "data" / "prompt_data.json"
    messages.write_text(messages.read_text().replace("Coordinates: (41", "Coordinates: unknown (41"))
    with pytest.raises(BadData, match="without coordinates") as caught:
        run(clone, tmp_path / "ny", prompt4re=prompt4re)
    assert caught.value.ids == ["row 1"]


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["--city", "NY"], Exit.NO_INPUT, "--geometry FILE"),
        (["--city", "LA"], Exit.NO_INPUT, "cities NY"),
        (["--city", "NY", "--encoder", "llama"], Exit.USAGE, "--prompt4re DIR"),
        (["--city", "NY", "--geometry-id", "number"], Exit.USAGE, "add --geometry"),
    ],
)
def test_command_errors(clone, tmp_path, arguments, code, part):
    command = ["hafusion", str(clone), "--out", str(tmp_path / "o"), *arguments]
    error = CliRunner().invoke(import_group, command).exception
    assert isinstance(error, ToptError)
    assert error.exit_code == code
    assert part in str(error)


def test_command_prints_the_report(clone, places, tmp_path):
    out = tmp_path / "ny"
    command = ["hafusion", str(clone), "--city", "NY", "--out", str(out)]
    result = CliRunner().invoke(import_group, [*command, "--geometry", str(places), "--geometry-id", "number"])
    assert result.exit_code == 0
    for part in (
        "New York: 12 regions",
        "26 poi, 23 land_use",
        "named by position",
        f"cd {out} && topt-deploy train",
    ):
        assert part in result.output


@chicago
@pytest.mark.parametrize(("encoder", "width", "none"), [("llama", 4096, True), ("qwen", 3584, False)])
def test_chicago(tmp_path, encoder, width, none):
    report = import_hafusion(DATA / "HAFusion", "Chi", out=tmp_path, prompt4re=DATA / "Prompt4RE", encoder=encoder)
    table = pq.read_table(tmp_path / "regions.parquet")
    prompts = [name for name in table.column_names if name.startswith("prompt_")]
    assert prompts == [f"prompt_{task}" for task in (*TASKS, *(["none"] if none else []))]
    schema = infer_schema(table, views=("poi", "land_use"), mobility=True, prompts=prompts)
    city = read_city(tmp_path / "regions.parquet", tmp_path / "mobility.parquet", schema, labels=TASKS)
    assert city.region_id.tolist() == [f"{k:02d}" for k in range(1, 78)]
    raw = DATA / "Prompt4RE" / "data"
    np.testing.assert_array_equal(city.prompts["prompt_check_in"], np.load(raw / f"prompt_embs_{encoder}_checkIn.npy"))
    assert city.prompts["prompt_crime"].shape == (77, width)
    assert {task: int(city.labels[task].sum()) for task in TASKS} == {
        "crime": 18_200,
        "check_in": 167_232,
        "service_call": 24_350,
    }
    loop = city.region_id.tolist().index("32")  # community area 32 is the Loop
    np.testing.assert_allclose(city.lonlat[loop], [-87.6272, 41.8789], atol=1e-4)
    assert "Printer's Row, Loop, Chicago" in table["text"][31].as_py()
    assert (report.flow_pairs, report.trips) == (5607, {"flow": 3_381_807, "target_flow": 5_501_572})
    assert report.zero_check_ins == ["09", "10", "76"]


@chicago
def test_chicago_alone_has_no_coordinates(tmp_path):
    with pytest.raises(NoInput, match="add --prompt4re DIR"):
        import_hafusion(DATA / "HAFusion", "Chi", out=tmp_path)
