"""One model of several cities: what is aligned, what is held out, and what its bundle predicts."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builders import POI, quiet, replaced, task_config, tiny_city, tiny_city_tables, tiny_config

import topt_deploy as topt
from topt_deploy.data.cities import stack_cities
from topt_deploy.data.city import infer_schema
from topt_deploy.data.features import features
from topt_deploy.errors import BadConfig, BadData, UsageError
from topt_deploy.train.ensemble import train_ensemble
from topt_deploy.train.loop import TrainingDevice, Workplace
from topt_deploy.train.prompt4re import by_city, fold_of, train_head, training_sets
from topt_deploy.train.srel import embed, train_embedding
from topt_deploy.train.stacking import with_inner

CPU = TrainingDevice(device=torch.device("cpu"))
SIZES = {"ash": 24, "birch": 21, "cedar": 23}
PROMPTS = ("prompt_crime",)
SETTINGS = """\
[ensemble]
features = 8
steps = 5
members = 2
width = 8
epochs = 4
[srel]
width = 8
heads = 2
ffn_width = 12
epochs = 4
regions = 22
[prompt4re]
enabled = false
epochs = 4
[tasks.crime]
[tasks.calls]
"""


pytestmark = pytest.mark.usefixtures("few_trees")


def write(path, n, seed=0, settings=SETTINGS, **more):
    """A city's folder."""
    path.mkdir(parents=True)
    regions, mobility = tiny_city_tables(n, seed)
    pq.write_table(replaced(regions, **more), path / "regions.parquet")
    pq.write_table(mobility, path / "mobility.parquet")
    (path / "topt.toml").write_text(settings)
    return path


@pytest.fixture
def folders(tmp_path):
    return [write(tmp_path / name, n, seed=n) for name, n in SIZES.items()]


def stacked(prompts=PROMPTS):
    """The cities as one, its schema and its features."""
    city = stack_cities({name: tiny_city(n, seed=n, prompts=prompts) for name, n in SIZES.items()})
    tables = tiny_city_tables(prompts=prompts)
    schema = infer_schema(tables[0], views=("poi", "land_use"), mobility=True, prompts=prompts)
    inputs = {name: torch.tensor(x) for name, x in features(city).items()}
    return city, replace(schema, places=False), inputs


def place():
    return Workplace(engine=CPU, reporter=quiet(), identity="x")


def fold(city, labels=None):
    labels = city.labels["crime"] if labels is None else labels
    return fold_of(labels, folds=10, seed=2024, drop_zeros=False, part=city.part)


class TestFolds:
    def test_whole_cities_are_held_out(self):
        city, _, _ = stacked()
        np.testing.assert_array_equal(fold(city), city.part)

    def test_a_city_without_labels_is_no_fold(self):
        city, _, _ = stacked()
        labels = np.where(city.part == 1, np.nan, city.labels["crime"])
        np.testing.assert_array_equal(fold(city, labels), np.array([0, -1, 1])[city.part])

    def test_beside_a_few_labels_of_another_city_regions_are(self):
        city, _, _ = stacked()
        labels = np.where((city.part == 0) | (np.arange(len(city)) < SIZES["ash"] + 3), city.labels["crime"], np.nan)
        assert not by_city(labels, city.part)
        np.testing.assert_array_equal(fold(city, labels), fold_of(labels, folds=10, seed=2024, drop_zeros=False))

    def test_inner_folds_hold_out_whole_cities_too(self):
        city, _, _ = stacked()
        labels = training_sets(city.labels["crime"], fold(city))
        rows = with_inner(labels, folds=3, seed=0, part=city.part)
        for row in range(rows.outer, len(rows.parents)):
            own, parent = rows.labels[row], rows.labels[rows.parents[row]]
            left = set(city.part[~np.isnan(parent) & np.isnan(own)])
            assert len(left) == 1
            assert left.isdisjoint(city.part[~np.isnan(own)])


class TestParts:
    @pytest.mark.parametrize("regions", [0, 22])
    def test_a_city_is_embedded_as_if_it_were_alone(self, regions):
        city, schema, inputs = stacked()
        config = tiny_config({"crime": task_config(srel={"regions": regions})})
        srel = train_embedding(city, inputs, schema, config, "crime", place())
        together = embed(srel, inputs, city)
        for block in city.blocks:
            alone = embed(srel, {name: x[block] for name, x in inputs.items()})
            assert torch.equal(together[block], alone)

    def test_attention_to_prompts_stays_inside_a_city(self):
        city, _, inputs = stacked()
        config = tiny_config({"crime": task_config(prompt4re={"ridge_penalty": False})})
        labels = training_sets(city.labels["crime"], fold(city))
        embedding = torch.randn(len(city), 8, generator=torch.Generator().manual_seed(0))
        prompts, x = inputs["prompt_crime"], torch.zeros(len(city), 0)
        result = train_head(embedding, x, prompts, labels, config, "crime", place(), part=city.part)
        for block in city.blocks:
            with torch.no_grad():
                alone = result.head(embedding[block], x[block], prompts[block]).mean(dim=0)
            np.testing.assert_allclose(result.predicted[-1, block], alone, rtol=1e-4)

    def test_nothing_of_a_held_out_citys_labels_reaches_its_prediction(self):
        city, schema, inputs = stacked()
        settings = task_config(ensemble={"enabled": True, "topt": True, "radial": True, "inner_folds": 3, "clip": 4.0})
        config, labels = tiny_config({"crime": settings}), city.labels["crime"]
        srel = train_embedding(city, inputs, schema, config, "crime", place())

        def predicted(labels, held_out):
            rows = training_sets(labels, fold(city))
            result = train_ensemble(
                inputs, schema, inputs["prompt_crime"], rows, config, "crime", place(),
                embedding=embed(srel, inputs, city), part=city.part,
            )  # fmt: skip
            return result.predicted[held_out, city.blocks[held_out]]

        for held_out in (0, 2):
            clean = predicted(labels, held_out)
            for poison in (0.0, 1e9):
                np.testing.assert_array_equal(
                    predicted(np.where(city.part == held_out, poison, labels), held_out), clean
                )


@pytest.mark.slow
class TestRun:
    def test_a_city_without_a_label_is_predicted_by_the_bundle(self, folders, tmp_path):
        *known, unseen = folders
        run = topt.train(known, out=tmp_path / "run")
        record = json.loads((run.path / "run.json").read_text())
        assert record["city_id"] == "ash, birch"
        assert "no label of its city" in record["protocol"]
        assert [own["regions"] for own in record["cities"]] == [24, 21]
        for own in record["cities"]:
            mine = [row for row in run.held_out.to_pylist() if row["region_id"].startswith(f"{own['city_id']}/")]
            errors = [abs(row["held_out"] - row["label"]) for row in mine if row["task"] == "crime"]
            assert own["tasks"]["crime"]["held_out"]["mae"] == pytest.approx(np.mean(errors))
        bundle = run.export(tmp_path / "model.topt")
        bare = pq.read_table(unseen / "regions.parquet").drop_columns(["crime", "calls"])
        pq.write_table(bare, unseen / "regions.parquet")
        table = topt.load(bundle).predict(unseen)
        assert len(table) == 2 * SIZES["cedar"]
        assert np.isfinite(table["prediction"].to_numpy()).all()
        assert (table["lower"].to_numpy() <= table["upper"].to_numpy()).all()

    def test_the_order_of_cities_changes_nothing(self, folders, tmp_path):
        for name, order in (("a", [0, 1]), ("b", [1, 0])):
            topt.train([folders[i] for i in order], out=tmp_path / name, tasks="crime")
        assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
            tmp_path / "b" / "model.safetensors"
        ).read_bytes()

    def test_columns_in_another_order_are_the_same_categories(self, folders, tmp_path):
        regions, _ = tiny_city_tables(21, seed=21, lists=True)
        pq.write_table(regions, folders[1] / "regions.parquet")
        for name, cities in (
            ("lists", folders[:2]),
            ("columns", [folders[0], write(tmp_path / "new" / "birch", 21, 21)]),
        ):
            topt.train(cities, out=tmp_path / name, tasks="crime")
        listed, columns = (pq.read_table(tmp_path / name / "held_out.parquet") for name in ("lists", "columns"))
        assert listed.equals(columns)

    def test_other_categories_are_refused_by_name(self, folders, tmp_path):
        table = pq.read_table(folders[1] / "regions.parquet")
        new = ["poi_club" if name == f"poi_{POI[0]}" else name for name in table.column_names]
        table = table.rename_columns(new)
        pq.write_table(table, folders[1] / "regions.parquet")
        with pytest.raises(BadData) as refused:
            topt.train(folders[:2], out=tmp_path / "run")
        for part in ("poi", POI[0], "club", "regions.parquet"):
            assert part in str(refused.value)

    def test_what_does_not_go_is_refused(self, folders, tmp_path):
        with pytest.raises(UsageError, match="a place of its own"):
            topt.train(folders)
        with pytest.raises(UsageError, match="no city is named"):
            topt.train([], out=tmp_path / "run")
        with pytest.raises(UsageError, match="one name"):
            topt.train([folders[0], write(tmp_path / "other" / "ash", 12)], out=tmp_path / "run")
        (folders[1] / "topt.toml").write_text(SETTINGS + "[tasks.fires]\n")
        with pytest.raises(BadConfig, match="the cities' settings differ"):
            topt.train(folders[:2], out=tmp_path / "again")
        done = topt.train(folders[:2], out=tmp_path / "named", config=folders[0] / "topt.toml", tasks="crime")
        assert done.tasks == ("crime",)

    def test_what_one_city_lacks_is_left_out_for_all(self, folders, tmp_path, capsys):
        (folders[1] / "mobility.parquet").unlink()
        run = topt.train(folders[:2], out=tmp_path / "run", tasks="crime")
        assert not run.config.mobility
        assert "birch: there is no mobility.parquet: trained without flows" in capsys.readouterr().err

    def test_it_is_resumed_with_the_cities_that_it_was_started_with(self, folders, tmp_path):
        done = topt.train(folders[:2], out=tmp_path / "run", tasks="crime")
        record = json.loads((done.path / "run.json").read_text())
        (done.path / "run.json").write_text(json.dumps(record | {"finished": False}))
        before = (done.path / "model.safetensors").read_bytes()
        topt.train(tmp_path, out=done.path, resume=True)  # the run knows its cities
        assert (done.path / "model.safetensors").read_bytes() == before

    def test_a_report_shows_one_city(self, folders, tmp_path):
        run = topt.train(folders[:2], out=tmp_path / "run", tasks="crime")
        with pytest.raises(UsageError, match="one city"):
            run.report()
