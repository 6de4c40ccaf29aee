"""The whole road as a user walks it: train, export, predict; interruptions on the way; real Chicago; every variant."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import PROMPT4RE, SREL, quiet, replaced, tiny_city_tables, write_tables
from commands import PATIENCE_S, environment, shell
from safetensors.numpy import load_file

from topt_deploy.config.load import config_from_dict, load_config

TASKS = ("crime", "check_in", "service_call")
TINY = """\
views = ["poi", "land_use"]
checkpoint_every = 25

[srel]
width = 8
heads = 2
ffn_width = 12
memory = 4
channels = 3
view_width = 4
layers = 1
inter_blocks = 1
epochs = 6
lr = 1e-3

[prompt4re]
heads = 2
epochs = 6
folds = 3
lr = 1e-2
"""


INTERRUPTED = f"""\
{TINY.replace("epochs = 6", "epochs = 400")}
[tasks.crime]
[tasks.calls.ensemble]
enabled = true
features = 8
epochs = 400
"""
TINY_ENSEMBLE = """\
views = ["poi", "land_use"]

[ensemble]
enabled = true
features = 16
members = 2
width = 8
epochs = 10

[prompt4re]
folds = 3

[target]
transform = "cbrt"
"""
PROMPTS = ("prompt_crime", "prompt_calls")
UNLABELLED = ("001", "005", "010")
UNLABELLED_IN_CHICAGO = ("08", "32", "77")


class TestThreeCommands:
    """In a folder that holds regions.parquet and mobility.parquet, each ends by naming the next."""

    def test_train(self, demo_trained, demo_run):
        assert demo_trained.out.splitlines()[-1] == "next: topt-deploy export --format onnx"
        for task in TASKS:
            assert any(line.startswith(task) for line in demo_trained.out.splitlines())
        assert "held out" in demo_trained.out
        assert str(demo_run.name) in demo_trained.out
        assert {"run.json", "model.safetensors", "held_out.parquet", "metrics.jsonl"} < {
            p.name for p in demo_run.iterdir()
        }

    def test_export(self, demo_exported, demo_bundle):
        assert demo_exported.out.splitlines()[-1] == "next: topt-run predict regions.parquet"
        assert "parity passed on 8 cities" in demo_exported.out
        assert demo_bundle.is_dir()

    def test_predict(self, demo_bundle):
        said = shell("topt-run predict regions.parquet", demo_bundle.parent)
        assert said.code == 0, said.err
        table = pq.read_table(demo_bundle.with_name("predictions.parquet"))
        assert table.num_rows == 77 * 3
        assert "receipt     predictions.receipt.json" in said.out

    def test_what_export_and_prediction_say_is_what_training_said(self, demo_run, demo_bundle, desk, topt_run):
        """The deployed model's in-sample predictions, from training, are what the bundle predicts."""
        assert topt_run("predict", desk.regions).code == 0
        held = {
            (r["region_id"], r["task"]): r["in_sample"]
            for r in pq.read_table(demo_run / "held_out.parquet").to_pylist()
        }
        found = {(r["region_id"], r["task"]): r["prediction"] for r in pq.read_table(desk.out).to_pylist()}
        assert held.keys() == found.keys()
        assert found == pytest.approx(held, rel=1e-4, abs=1e-4)

    @pytest.mark.usefixtures("demo_bundle", "prompted", "pictured", "default_city")
    def test_the_kept_bundles_are_there_for_the_runtime_only_tests(self):
        place = os.environ.get("TOPT_KEEP_BUNDLE")
        if place is None:
            pytest.skip("TOPT_KEEP_BUNDLE is not set: `make test` sets it")
        kept = {name.name for name in os.scandir(place)}
        assert kept == {"model.topt", "regions.parquet", "mobility.parquet", "prompted", "pictured", "default"}


def train_at(city, config):
    """Train the city in this folder within this process; the run is its folder ``run``."""
    from topt_deploy.train.loop import TrainingDevice
    from topt_deploy.train.run import start_run, train_run

    mobility = city / "mobility.parquet" if config.mobility else None
    files = {"regions": city / "regions.parquet", "mobility": mobility}
    run = start_run(city / "run", city, config, **files)
    train_run(run, engine=TrainingDevice.choose("cpu", None, None), reporter=quiet(), **files)


@pytest.fixture(scope="module")
def city(shared, once):
    def make(folder):
        city = write_tables(folder / "interrupted", *tiny_city_tables(20, prompts=PROMPTS))
        (city / "topt.toml").write_text(INTERRUPTED)

    once("interrupted", make)
    return shared / "interrupted"


@pytest.fixture(scope="module")
def uninterrupted(city, once):
    once("uninterrupted", lambda _: shell("topt-deploy train --out whole", city))
    return city / "whole"


@pytest.mark.slow
class TestInterrupted:
    """Stopped at any moment and gone on with, a run ends bit for bit as if nothing had happened."""

    @pytest.fixture
    def unfinished(self, uninterrupted, tmp_path):
        """A copy of the run as it was just before its end."""
        run = shutil.copytree(uninterrupted, tmp_path / "run")
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(record | {"finished": False}))
        return run

    @staticmethod
    def lines(run):
        """The log's lines; they tell that training goes on."""
        log = run / "metrics.jsonl"
        return log.read_text().splitlines() if log.exists() else []

    def stop(self, city, command, run, with_signal, delay_s):
        """Start, and send a signal so long after the first checkpoint, or the first progress after it."""
        before = len(self.lines(run))
        child = subprocess.Popen(
            command.split(),
            cwd=city,
            env=environment(),
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a background job
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + PATIENCE_S
        while not (any(run.glob("checkpoints/*.safetensors")) and len(self.lines(run)) > before):
            assert child.poll() is None, f"ended too early: {child.stderr.read()}"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(delay_s)
        child.send_signal(with_signal)
        err = child.communicate(timeout=PATIENCE_S)[1]
        assert child.returncode == (-signal.SIGKILL if with_signal == signal.SIGKILL else 130), err
        assert not json.loads((run / "run.json").read_text())["finished"], "it had ended before it was stopped"
        assert not (run / "model.safetensors").exists()
        return err

    def test_resuming_gives_the_same_bytes(self, city, uninterrupted):
        run = city / "runs" / "stopped"
        resume = "topt-deploy train --resume"
        waits = [random.uniform(0, 0.3) for _ in range(3)]
        print(f"stopped after {waits} s")  # shown where the test fails
        self.stop(city, "topt-deploy train --out runs/stopped", run, signal.SIGKILL, waits[0])
        said = self.stop(city, resume, run, signal.SIGINT, waits[1])
        assert "interrupted; go on with: topt-deploy train" in said
        assert "Traceback" not in said
        self.stop(city, f"{resume} --out runs/stopped", run, signal.SIGKILL, waits[2])
        done = shell(resume, city)
        assert done.code == 0, done.err
        for name in ("model.safetensors", "held_out.parquet", "inputs.safetensors"):
            assert (run / name).read_bytes() == (uninterrupted / name).read_bytes(), name
        found = [json.loads(line) for line in self.lines(run)]
        epochs = [(line["stage"], line["epoch"]) for line in found]
        assert len(set(epochs)) == len(epochs), "an epoch stands there twice"
        assert found == [json.loads(line) for line in self.lines(uninterrupted)]

    def test_half_a_line_in_the_log_does_not_stop_it(self, city, uninterrupted, unfinished, topt_deploy):
        """A full disk or a power cut can leave that."""
        with (unfinished / "metrics.jsonl").open("a") as log:
            log.write('{"stage": "prompt4re/ca')
        said = topt_deploy("train", city, "--resume", "--out", unfinished)
        assert said.code == 0, said.err
        assert (unfinished / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()
        for line in self.lines(unfinished):
            json.loads(line)

    def test_a_damaged_checkpoint_is_named(self, city, unfinished, topt_deploy):
        checkpoint = min(unfinished.glob("checkpoints/*.safetensors"))
        whole = checkpoint.read_bytes()
        for damaged in (b"", whole[:100], whole[:-1]):
            checkpoint.write_bytes(damaged)
            said = topt_deploy("train", city, "--resume", "--out", unfinished)
            assert said.code not in (0, 70), said.err
            assert checkpoint.name in said.err
            assert "Traceback" not in said.err

    def test_another_city_is_not_resumed_on(self, unfinished, tmp_path, topt_deploy):
        other = write_tables(tmp_path / "other", *tiny_city_tables(20, seed=1, prompts=PROMPTS))
        said = topt_deploy("train", other, "--resume", "--out", unfinished)
        assert said.code == 78
        assert "has changed since this run was started" in said.err


@pytest.fixture(scope="module")
def train(shared, once):
    """Train a city whose labels of the hidden regions are these; the run."""
    regions, mobility = tiny_city_tables(16, prompts=["prompt_crime", "prompt_calls"])

    def call(name, label, drop_zeros=False):
        labels = [
            label if region in UNLABELLED else value
            for region, value in zip(regions["region_id"].to_pylist(), regions["crime"].to_pylist(), strict=True)
        ]
        task = {"srel": vars(SREL), "prompt4re": vars(PROMPT4RE), "target": {"drop_zeros": drop_zeros}}
        config = config_from_dict({"tasks": {"crime": task, "calls": {**task, "target": {}}}})
        once(
            name,
            lambda folder: train_at(write_tables(folder / name, replaced(regions, crime=labels), mobility), config),
        )
        return shared / name / "run"

    return call


@pytest.fixture(scope="module")
def hidden(train):
    return train("hidden", None)


class TestNullLabels:
    """Regions without a label are predicted, and teach nothing."""

    def test_they_are_predicted_and_held_out_of_the_figures(self, hidden):
        rows = [r for r in pq.read_table(hidden / "held_out.parquet").to_pylist() if r["task"] == "crime"]
        for row in rows:
            assert np.isfinite(row["in_sample"])
            unknown = row["region_id"] in UNLABELLED
            assert (row["label"] is None, row["held_out"] is None, row["fold"] == -1) == (unknown,) * 3
        record = json.loads((hidden / "run.json").read_text())
        assert record["reports"]["crime"]["held_out"]["regions"] == 13
        assert record["reports"]["calls"]["held_out"]["regions"] == 16

    def test_null_is_the_same_as_not_taking_part(self, train):
        """A zero that the protocol drops, and a null, leave the same model to the last bit."""
        null, zero = train("null", None, drop_zeros=True), train("zero", 0.0, drop_zeros=True)
        assert (null / "model.safetensors").read_bytes() == (zero / "model.safetensors").read_bytes()

    def test_any_label_there_would_have_been_another_model(self, hidden, train):
        """Else the test above shows nothing; and the other task must not notice either way."""
        known = train("known", 50.0)
        a, b = (load_file(run / "model.safetensors") for run in (hidden, known))
        assert a.keys() == b.keys()
        other = {name for name in a if not np.array_equal(a[name], b[name])}
        assert other
        assert all(".for_crime." in name and name.startswith("heads.") for name in other), other


@pytest.fixture(scope="session")
def exported(shared, once):
    """Train and export a tiny city; its folder. One export, which takes its time, for several variants as tasks."""

    def call(name, toml, tables):
        def make(folder):
            from topt_deploy.export.city_bundle import export_bundle
            from topt_deploy.run_folder import open_run

            city = write_tables(folder / name, *tables)
            (city / "topt.toml").write_text(toml)
            train_at(city, load_config(preset="paper", file=city / "topt.toml"))
            export_bundle(open_run(city / "run"), city / "model.topt", say=lambda text: None)

        once(name, make)
        return shared / name

    return call


@pytest.fixture
def predict(topt_run, tmp_path):
    """The output of predicting the city in a folder that other tests use at the same time."""

    def call(folder, *arguments):
        out = tmp_path / "predictions.parquet"
        said = topt_run("predict", folder / "regions.parquet", "--out", out, *arguments)
        assert said.code == 0, said.err
        return pq.read_table(out)

    return call


def checked(folder, predict, task):
    """The bundle's predictions of a task: PyTorch's, and within reason."""
    table = predict(folder, "--task", task, "--wide")
    found = dict(zip(table["region_id"].to_pylist(), table[task].to_pylist(), strict=True))
    rows = [r for r in pq.read_table(folder / "run" / "held_out.parquet").to_pylist() if r["task"] == task]
    assert found == pytest.approx({r["region_id"]: r["in_sample"] for r in rows}, rel=1e-4, abs=1e-4)
    return found


ABLATION = {
    "full": "",
    "no_deep_fc": "[tasks.{0}.srel]\ndeep_fc = false",
    "own_widths": "[tasks.{0}.prompt4re]\nvalue_width = 6\nsoft_prompt = 3",
    "no_distance_bias": "[tasks.{0}.srel]\ndistance_bias = false",
    "no_centrality": "[tasks.{0}.srel]\ncentrality = false",
    "no_prompt4re": "[tasks.{0}.prompt4re]\nenabled = false",
    "no_task_prompt": '[tasks.{0}.prompt4re]\nprompt = "none"',
    "no_alignment": "[tasks.{0}.prompt4re]\nalignment = false",
}
LIKELIHOODS = {
    "poisson": '[tasks.{0}.target]\nlikelihood = "poisson"',
    "negative_binomial": '[tasks.{0}.target]\nlikelihood = "negative_binomial"',
    "sqrt": '[tasks.{0}.target]\ntransform = "sqrt"\n[tasks.{0}.prompt4re]\nskip = true\nridge_penalty = true',
    "log1p": '[tasks.{0}.target]\ntransform = "log1p"\ndrop_zeros = true\n[tasks.{0}.prompt4re]\nridge_alpha = 0.0',
    "members": "[tasks.{0}.prompt4re]\nmembers = 2\nhidden = 5\ncomponents = 3\nwidth = 4\nskip = true",
}
ENSEMBLES = {
    "kernel_only": "network = false",
    "network_only": "kernel = false",
    "both": "",
    "one_length": "lengths = [1.0]\nposition_lengths = [0.5, 1.0, 2.0]\nnot_linear = []",
    "no_prompts": "[tasks.{0}.prompt4re]\nenabled = false",
    "few_components": '[tasks.{0}.prompt4re]\ncomponents = 3\n[tasks.{0}.target]\ntransform = "sqrt"',
}
DEEPER = 'decay = "inverse"\ndecay_length_m = 900.0\nlayers = 2\nintra_blocks = 2\ninter_blocks = 2'
"""Of all tasks, so that they share one embedding."""


def variants(named, toml=TINY, section="", **more):
    """Settings with a task per variant, each in that section of its own, and a city with such labels."""
    sections = "\n".join(f"[tasks.{name}{section}]\n{text.format(name)}" for name, text in named.items())
    prompts = [*(f"prompt_{name}" for name in named), "prompt_none"]
    return f"{toml}\n{sections}\n", tiny_city_tables(14, tasks=tuple(named), prompts=prompts, **more)


@pytest.fixture(scope="module")
def ablation(exported):
    return exported("ablation", *variants(ABLATION))


@pytest.fixture(scope="module")
def likelihoods(exported):
    toml, tables = variants(LIKELIHOODS, lists=True)
    return exported("likelihoods", toml.replace("layers = 1\ninter_blocks = 1", DEEPER), tables)


@pytest.fixture(scope="module")
def ensembles(exported):
    return exported("ensembles", *variants(ENSEMBLES, TINY_ENSEMBLE, ".ensemble"))


@pytest.mark.slow
class TestVariants:
    @pytest.mark.parametrize("task", ABLATION)
    def test_every_variant_of_the_ablation_trains_exports_and_predicts(self, task, ablation, predict):
        found = checked(ablation, predict, task)
        assert len(found) == 14
        assert len(set(found.values())) > 7

    def test_the_ablation_leaves_out_what_it_says(self, ablation):
        manifest = json.loads((ablation / "model.topt" / "manifest.json").read_text())
        prompts = {task: facts["prompt"] for task, facts in manifest["tasks"].items()}
        assert prompts == {task: f"prompt_{task}" for task in ABLATION} | {
            "no_prompt4re": None,
            "no_task_prompt": "prompt_none",
        }
        assert "prompt_no_prompt4re" not in manifest["inputs"]
        weights = load_file(ablation / "run" / "model.safetensors")
        assert not [name for name in weights if "no_prompt4re.basis" in name]
        assert [name for name in weights if "full.basis" in name]
        assert "srel.of.for_full.mlp.3.weight" in weights
        assert "srel.of.for_no_deep_fc.mlp.3.weight" not in weights
        assert len([t for t in manifest["inputs"] if t.startswith("prompt_")]) == len(ABLATION) - 1

    @pytest.mark.parametrize("task", LIKELIHOODS)
    def test_so_does_every_other_setting(self, task, likelihoods, predict):
        found = checked(likelihoods, predict, task)
        assert len(found) == 14
        assert min(found.values()) >= 0

    @pytest.mark.parametrize("task", ENSEMBLES)
    def test_so_does_every_ensemble_without_an_embedding(self, task, ensembles, predict):
        found = checked(ensembles, predict, task)
        assert len(set(found.values())) > 10

    def test_an_ensemble_alone_is_a_bundle_that_passes_its_own_test(self, ensembles, topt_run):
        assert not [name for name in load_file(ensembles / "run" / "model.safetensors") if name.startswith("srel.")]
        assert topt_run("selftest", ensembles / "model.topt").code == 0

    def test_an_ensemble_without_flows(self, exported, predict, topt_run):
        toml, tables = variants({"crime": "features = 4"}, TINY_ENSEMBLE, ".ensemble")
        folder = exported("ensemble_alone", f"mobility = false\n{toml}", tables)
        manifest = json.loads((folder / "model.topt" / "manifest.json").read_text())
        assert manifest["inputs"] == ["poi", "land_use", "position", "prompt_crime"]
        checked(folder, predict, "crime")
        assert topt_run("selftest", folder / "model.topt").code == 0

    def test_without_flows_and_with_one_view(self, exported, predict, topt_run, tmp_path):
        toml, tables = variants({"crime": ""})
        toml = toml.replace('views = ["poi", "land_use"]', 'views = ["land_use"]\nmobility = false')
        toml = toml.replace("layers = 1", 'layers = 1\ndecay = "gaussian"')
        folder = exported("alone", toml, tables)
        manifest = json.loads((folder / "model.topt" / "manifest.json").read_text())
        assert manifest["inputs"] == ["land_use", "position", "prompt_crime"]
        (folder / "mobility.parquet").unlink()
        checked(folder, predict, "crime")
        assert topt_run("selftest", folder / "model.topt").code == 0
        assert not list((folder / "model.topt" / "golden").glob("*.mobility.parquet"))
        receipt = json.loads((tmp_path / "predictions.receipt.json").read_text())
        assert set(receipt["inputs"]) == {"regions"}
        out = tmp_path / "other.parquet"
        said = topt_run("predict", folder / "regions.parquet", "--mobility", folder / "nowhere.parquet", "--out", out)
        assert (said.code == 0) == out.exists(), "a table that is not read may be named in vain, or not at all"


@pytest.fixture(scope="module")
def trained_chicago(chicago, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chicago")
    table = pq.read_table(chicago / "regions.parquet")
    ids = table["region_id"].to_pylist()
    crime = table["crime"].to_pylist()
    hidden = [None if region in UNLABELLED_IN_CHICAGO else v for region, v in zip(ids, crime, strict=True)]
    assert hidden.count(None) == 3
    pq.write_table(replaced(table, crime=pa.array(hidden, pa.int64())), folder / "regions.parquet")
    shutil.copy(chicago / "mobility.parquet", folder)
    for command in ("topt-deploy train --preset quick --set prompt4re.folds=3", "topt-deploy export --format onnx"):
        said = shell(command, folder)
        assert said.code == 0, said.err
    return folder


@pytest.mark.slow
class TestChicago:
    """The real city of the paper: 77 community areas, Llama's prompt vectors of 4096 numbers."""

    def test_every_region_and_task_is_predicted(self, trained_chicago, predict):
        rows = predict(trained_chicago).to_pylist()
        assert len(rows) == 77 * 3
        assert {row["city_id"] for row in rows} == {"Chicago"}
        assert len({row["region_id"] for row in rows}) == 77
        assert all(np.isfinite(row["prediction"]) and row["prediction"] >= 0 for row in rows)
        hidden = {row["region_id"] for row in rows if row["task"] == "crime"} & set(UNLABELLED_IN_CHICAGO)
        assert hidden == set(UNLABELLED_IN_CHICAGO)

    def test_the_predictions_know_the_city(self, trained_chicago, chicago, predict):
        """Even seconds of training rank the areas of Chicago roughly as they are."""
        found, truth = predict(trained_chicago, "--wide"), pq.read_table(chicago / "regions.parquet")
        for task in TASKS:
            a, b = (np.argsort(np.argsort(t[task].to_numpy())) for t in (found, truth))
            assert np.corrcoef(a, b)[0, 1] > 0.6, task

    def test_it_passes_its_own_test(self, trained_chicago, topt_run):
        assert topt_run("selftest", trained_chicago / "model.topt").code == 0
        said = topt_run("info", trained_chicago / "model.topt")
        assert "city       Chicago, 77 regions" in said.out
        assert "SYNTHETIC" not in said.out
        assert "4096 from meta-llama/Llama-3.2-11B-Vision-Instruct" in said.out

    def test_nothing_of_chicago_is_in_the_bundle(self, trained_chicago, chicago):
        texts = pq.read_table(chicago / "regions.parquet", columns=["text", "lon"]).to_pylist()
        held = b"".join(path.read_bytes() for path in (trained_chicago / "model.topt").rglob("*") if path.is_file())
        for row in texts:
            assert row["text"][-80:].encode() not in held
            assert np.float64(row["lon"]).tobytes() not in held

    def test_prompts_of_the_other_encoder_are_refused(self, trained_chicago, topt_run, tmp_path):
        table = pq.read_table(trained_chicago / "regions.parquet")
        index = table.schema.get_field_index("prompt_crime")
        field = table.schema.field(index).with_metadata({"encoder": "Qwen/Qwen2.5-VL-7B-Instruct"})
        pq.write_table(table.set_column(index, field, table.column(index)), tmp_path / "regions.parquet")
        shutil.copy(trained_chicago / "mobility.parquet", tmp_path)
        said = topt_run("predict", tmp_path / "regions.parquet", "--bundle", trained_chicago / "model.topt")
        assert said.code == 65
        assert "Llama-3.2" in said.err
        assert "Qwen2.5" in said.err
