"""Cities that lack something: each trains, is evaluated, and its bundle predicts."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import replaced, tiny_city_tables

import topt_deploy as topt
from topt_deploy.config.load import load_config
from topt_deploy.data.city import infer_schema
from topt_deploy.train.cities import read_placed
from topt_deploy.train.evaluation import topt_variants

TINY = {
    "srel.epochs": 3, "srel.width": 8, "srel.heads": 2, "srel.ffn_width": 12, "srel.regions": 40,
    "prompt4re.epochs": 3, "prompt4re.heads": 2, "prompt4re.folds": 3,
    "ensemble.epochs": 3, "ensemble.steps": 4, "ensemble.features": 8, "ensemble.width": 8, "ensemble.members": 1,
}  # fmt: skip


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_trees")]


def nulls(values, rows):
    """A column without values in these rows."""
    return pa.array([None if row in rows else value for row, value in enumerate(values.to_pylist())], pa.float64())


def without_coordinates(regions, mobility):
    return replaced(regions, lon=nulls(regions["lon"], {2, 9}), lat=nulls(regions["lat"], {2, 9})), mobility


def few_labels(regions, mobility):
    return replaced(regions, crime=nulls(regions["crime"], set(range(20, len(regions))))), mobility


def without_flows(regions, mobility):
    return regions, None


def without_land_use(regions, mobility):
    return regions.drop_columns([name for name in regions.column_names if name.startswith("land_use")]), mobility


def zero_inflated(regions, mobility):
    silent = np.arange(len(regions)) % 3 > 0
    return replaced(regions, crime=np.where(silent, 0.0, regions["crime"].to_numpy())), mobility


def one_huge(regions, mobility):
    labels = regions["crime"].to_numpy().copy()
    labels[4] = 1e6
    return replaced(regions, crime=labels), mobility


CITIES = {
    "two regions without coordinates": (30, without_coordinates),
    "20 labelled of 300": (300, few_labels),
    "20 regions": (20, lambda *tables: tables),
    "no flows": (30, without_flows),
    "no land use": (30, without_land_use),
    "zeros in two of three regions": (30, zero_inflated),
    "one region a thousand times the others": (30, one_huge),
}


EXPORTED = ("two regions without coordinates", "20 labelled of 300")
"""Those whose bundle is made and predicts too; a bundle does not depend on what labels are like."""


@pytest.fixture(params=CITIES)
def city(request, tmp_path):
    n, change = CITIES[request.param]
    regions, mobility = change(*tiny_city_tables(n, prompts=("prompt_crime",)))
    folder = tmp_path / "city"
    folder.mkdir()
    pq.write_table(regions, folder / "regions.parquet")
    if mobility is not None:
        pq.write_table(mobility, folder / "mobility.parquet")
    (folder / "topt.toml").write_text("[tasks.crime]\n")
    return folder


def test_it_trains_is_evaluated_and_is_predicted(city, request, topt_deploy, monkeypatch):
    run = topt.train(city, out=city / "run", set=TINY)
    known = pq.read_table(city / "regions.parquet")["crime"].drop_null()
    assert run.metrics["crime"].held_out.regions == len(known)
    assert np.isfinite(run.metrics["crime"].held_out.mae)
    predicted = run.held_out["in_sample"].to_numpy()
    assert len(predicted) == len(pq.read_table(city / "regions.parquet"))
    if request.node.callspec.params["city"] in EXPORTED:
        bundle = run.export(city / "model.topt")
        table = topt.load(bundle).predict(city, on_bad_row="mask" if rows_missing(city) else "fail")
        predicted = table["prediction"].drop_null().to_numpy()
    assert np.isfinite(predicted).all()
    assert predicted.max() <= 8 * max(known.to_pylist())  # bounded on the target's scale

    whole, tiny = load_config, [f"{key}={value}" for key, value in TINY.items()]
    monkeypatch.setattr(
        topt_variants, "load_config", lambda overrides=(), **more: whole(overrides=[*overrides, *tiny], **more)
    )
    said = topt_deploy(
        "evaluate", city, "--variants", "topt", "--baselines", "mean", "--seeds", 1, "--out", city / "evaluation"
    )
    assert said.code == 0, said
    results = json.loads((city / "evaluation" / "results.json").read_text())["results"]
    assert {r["method"]: r["reason"] for r in results} == {"topt": None, "mean": None}


def rows_missing(city):
    """The columns of positions with nulls."""
    table = pq.read_table(city / "regions.parquet")
    return {name for name in ("lon", "lat") if table[name].null_count}


def test_regions_without_coordinates_stand_in_the_middle_and_are_named(tmp_path):
    regions, mobility = without_coordinates(*tiny_city_tables(12))
    file = tmp_path / "regions.parquet"
    pq.write_table(regions, file)
    pq.write_table(mobility, tmp_path / "mobility.parquet")
    schema, said = infer_schema(file, views=("poi", "land_use"), mobility=True), []
    city = read_placed(file, tmp_path / "mobility.parquet", schema, labels=["crime"], say=said.append)
    ids = [regions["region_id"][row].as_py() for row in (2, 9)]
    (sentence,) = said
    assert "regions.parquet: no position" in sentence
    assert all(region in sentence for region in ids)
    middle = [np.nanmedian(regions[axis].to_numpy()) for axis in ("lon", "lat")]
    for region in ids:
        np.testing.assert_allclose(city.lonlat[city.region_id == region][0], middle)
