import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from topt_deploy.data.city import infer_schema, read_city
from topt_deploy.errors import UsageError
from topt_deploy.prompts.templates import load_templates

pytest.importorskip("shapely", reason="needs the geo extra")
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from topt_deploy.data.geometry import centroids
from topt_deploy.train.cli.datasets import sample
from topt_deploy.train.datasets import sample_prompts
from topt_deploy.train.datasets.sample import make_sample
from topt_deploy.train.datasets.sample_prompts import shipped_prompts, store_prompts
from topt_deploy.train.datasets.sample_recipe import ATTRIBUTES

TASKS = ("crime", "check_in", "service_call")
FILES = ("regions.parquet", "mobility.parquet")


def load(folder):
    table = pq.read_table(folder / "regions.parquet")
    prompts = [f"prompt_{task}" for task in TASKS]
    schema = infer_schema(table, views=("poi", "land_use"), mobility=True, prompts=prompts)
    return table, read_city(folder / FILES[0], folder / FILES[1], schema, labels=TASKS)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    report = make_sample(folder)
    return report, *load(folder)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Enough regions for the margins below to hold whatever the seed."""
    folder = tmp_path_factory.mktemp("large")
    report = make_sample(folder, regions=600, seed=1)
    return report, *load(folder)


def test_the_reader_takes_it(demo):
    report, table, city = demo
    assert city.region_id[[0, -1]].tolist() == ["D001", "D120"]
    assert {view: values.shape[1] for view, values in city.views.items()} == {"poi": 12, "land_use": 6}
    assert all(vectors.shape == (120, 576) for vectors in city.prompts.values())
    hidden = np.isnan(city.labels["crime"])
    assert hidden.sum() == report.hidden == 12
    assert all((np.isnan(labels) == hidden).all() for labels in city.labels.values())
    assert "food" in [name.removeprefix("poi_") for name in table.column_names]


def test_shapes_are_whole_and_tell_the_centroids(large):
    import shapely

    _, table, city = large
    from_shapes = centroids(table, "regions", city.region_id)  # refuses invalid ones
    np.testing.assert_allclose(from_shapes, np.stack([table["lon"], table["lat"]], axis=1))
    cells = shapely.from_wkb(table["geometry"].to_pylist())
    united = shapely.union_all(shapely.buffer(cells, 1e-6))
    assert shapely.area(cells).sum() == pytest.approx(united.area, rel=0.01), "cells overlap or leave gaps"
    assert united.geom_type == "Polygon"
    assert len(united.interiors) == 0


def test_synthetic_is_written_everywhere(demo):
    report, table, city = demo
    assert city.city_id == "synthetic-demo"
    assert table.schema.metadata[b"synthetic"] == b"true"
    assert pq.read_schema(report.out / "mobility.parquet").metadata[b"synthetic"] == b"true"
    assert all("synthetic" in text for text in table["text"].to_pylist())
    assert "synthetic" in str(report)


def test_the_demo_has_a_language_models_prompts_and_other_cities_say_that_they_have_none(demo, large):
    report, table, city = demo
    assert report.encoder.startswith("SmolLM2-135M-Instruct sha256:"), "scripts/demo_prompts.py makes them anew"
    assert table.schema.metadata[b"encoder"].decode() == report.encoder
    for task in TASKS:
        fields = {key.decode(): value.decode() for key, value in table.schema.field(f"prompt_{task}").metadata.items()}
        assert fields == {
            "encoder": report.encoder,
            "template": load_templates().sha256(task),
            "precision": "fp32",
        }
    assert not np.allclose(city.prompts["prompt_crime"], city.prompts["prompt_check_in"])
    report, table, city = large
    assert "hashing-256 (stand-in, no language model)" in str(report)
    assert b"no language model" in table.schema.metadata[b"encoder"]
    assert table.schema.field("prompt_crime").metadata.keys() == {b"encoder"}
    assert city.prompts["prompt_crime"].shape == (600, 256)


def test_a_shipped_vector_is_its_own_texts_alone(demo):
    _, table, city = demo
    texts, templates = table["text"].to_pylist(), {task: load_templates().sha256(task) for task in TASKS}
    backwards = shipped_prompts(texts[::-1], templates)
    for task in TASKS:
        np.testing.assert_array_equal(backwards.vectors[task][::-1], city.prompts[f"prompt_{task}"])
    assert shipped_prompts([*texts[:-1], texts[-1] + " "], templates) is None
    asked = load_templates()
    reworded = replace(asked, questions={**asked.questions, "crime": "How many crimes?"})
    assert shipped_prompts(texts, {task: reworded.sha256(task) for task in TASKS}) is None


def test_storing_rounds_to_each_directions_own_scale(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    far, spread = rng.normal(size=(1, 6)) * 100, 10.0 ** np.arange(-3, 3)
    vectors = {task: (far + spread * rng.normal(size=(40, 6))).astype(np.float32) for task in ("a", "b")}
    vectors["b"][:, 2] = 7  # the same in every region
    texts, templates = [f"region {i}" for i in range(40)], {"a": "1", "b": "2"}
    monkeypatch.setattr(sample_prompts, "FILE", str(tmp_path / "stored.npz"))
    store_prompts(tmp_path / "stored.npz", texts, templates, vectors, encoder="some", precision="fp32")
    found = shipped_prompts(texts, templates)
    assert found.encoder == "some"
    for task, exact in vectors.items():
        half_a_step = np.ptp(exact, axis=0) / 254 / 2
        assert (abs(found.vectors[task] - exact) <= 1.01 * half_a_step + 1e-5).all()
    assert (found.vectors["b"][:, 2] == 7).all()


def test_same_seed_same_bytes(demo, tmp_path):
    report, *_ = demo
    make_sample(tmp_path / "again")
    make_sample(tmp_path / "other", seed=1)
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (report.out / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (report.out / name).read_bytes()


def test_best_r2_leaves_little_noise_and_is_stored(demo, large):
    for report, table, _ in (demo, large):
        assert all(0.88 < value < 0.99 for value in report.best_r2.values())
        stored = json.loads(table.schema.metadata[b"best_r2"])
        assert stored == pytest.approx(report.best_r2, abs=1e-4)


def averages(values, source, target, weights):
    """Mean of ``values`` (N, C) over the sources of each target, weighted."""
    sums = np.zeros_like(values)
    np.add.at(sums, target, weights[:, None] * values[source])
    return sums / np.maximum(np.bincount(target, weights, len(values)), 1)[:, None]


@pytest.fixture(scope="module")
def blocks(large):
    """Features by where they come from."""
    _, table, city = large
    counts = np.log1p(city.views["poi"])
    flows = city.flows
    near = np.argsort(((city.lonlat[:, None] - city.lonlat) ** 2).sum(-1), axis=1)[:, 1:7]
    told = [text.split("Impressions:")[1].split() for text in table["text"].to_pylist()]
    told = [{word.strip(".") for word in words} for words in told]
    attributes = [[[word in words for word in scale].index(True) for scale in ATTRIBUTES.values()] for words in told]
    return {
        "views": np.hstack([counts, np.log1p(city.views["land_use"])]),
        "flows": np.hstack(
            [
                averages(counts, flows.origin, flows.dest, flows.flow),
                averages(counts, flows.dest, flows.origin, flows.flow),
            ]
        ),
        "neighbours": counts[near].mean(axis=1),
        "attributes": np.array(attributes, dtype=float),
    }


@pytest.mark.parametrize("task", TASKS)
def test_every_source_of_information_counts(large, blocks, task):
    report, _, city = large
    known = ~np.isnan(city.labels[task])
    y = city.labels[task][known]

    def r2(*parts):
        x = np.hstack(parts)[known]
        model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 3, 4)))
        folds = KFold(10, shuffle=True, random_state=0)
        predicted = np.expm1(cross_val_predict(model, x, np.log1p(y), cv=folds))
        return 1 - ((y - predicted) ** 2).sum() / ((y - y.mean()) ** 2).sum()

    b = blocks
    views = r2(b["views"])
    context = r2(b["views"], b["flows"], b["neighbours"])
    encoded = r2(b["views"], b["flows"], b["neighbours"], city.prompts[f"prompt_{task}"])
    everything = r2(*b.values())
    assert 0.3 < views < 0.75
    assert context > views + 0.05, "flows and neighbours tell what views do not"
    assert everything > context + 0.1, "texts tell what nothing else does"
    assert encoded > context + 0.1, "the stand-in prompts carry it"
    assert 0.8 < everything < report.best_r2[task] + 0.05
    without_flows = r2(b["views"], b["neighbours"], b["attributes"])
    assert everything > without_flows + 0.05, "flows tell what nothing else does"


def test_a_small_city_can_be_learned(demo):
    """The default of 120 regions is enough for a plain linear model on the prompts and views alone."""
    _, _, city = demo
    known = ~np.isnan(city.labels["crime"])
    x = np.hstack([np.log1p(city.views["poi"]), city.prompts["prompt_crime"]])[known]
    y = np.log1p(city.labels["crime"][known])
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 3, 4)))
    predicted = cross_val_predict(model, x, y, cv=KFold(10, shuffle=True, random_state=0))
    assert np.corrcoef(predicted, y)[0, 1] > 0.6


def test_five_thousand_regions_stay_sparse(tmp_path):
    result = CliRunner().invoke(sample, ["--out", str(tmp_path / "big"), "--regions", "5000", "--seed", "3"])
    assert result.exit_code == 0, result.exception
    for part in ("synthetic city of 5000 regions", "500 without", "best R²", "topt-deploy train"):
        assert part in result.output
    table, city = load(tmp_path / "big")
    assert len(city) == 5000
    assert len(city.flows.flow) <= 30 * 5000
    assert np.bincount(city.flows.dest, minlength=5000).min() > 0
    centroids(table, "regions", city.region_id)


def test_too_few_regions(tmp_path):
    with pytest.raises(UsageError, match="at least 20"):
        make_sample(tmp_path, regions=5)
    make_sample(tmp_path, regions=20)
