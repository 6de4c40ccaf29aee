"""`make gpu-check`'s script: without a GPU, every part that has an equivalent on a CPU, and what it writes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "dev" / "benchmarks" / "gpu_check.py"
PARTS = ("train", "fused", "encoder", "engines", "speed")


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = loaded  # where its dataclasses look for themselves
    spec.loader.exec_module(loaded)
    return loaded


def run(folder, *arguments):
    """The script as it is started where the project is not installed: its own imports alone find the stages."""
    done = subprocess.run([sys.executable, SCRIPT, *arguments], cwd=folder, capture_output=True, text=True)
    report = json.loads((folder / "gpu-report.json").read_text())
    return done, report


def test_without_a_gpu_every_part_is_skipped_by_name(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done, report = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert [check["name"] for check in report["checks"]] == list(PARTS)
    for check in report["checks"]:
        assert check["status"] == "skipped"
        assert "finds no CUDA device" in check["reason"]
    assert report["summary"] == "Nothing was run on a GPU. 0 passed, 0 failed, 5 skipped."
    assert report["device"]["versions"]["torch"] == torch.__version__
    assert "Nothing was run on a GPU." in done.stdout
    assert (tmp_path / "gpu-report.md").read_text() in done.stdout


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_at_tiny_sizes(tmp_path):
    done, report = run(tmp_path, "--device", "cpu", "--size", "tiny")
    checks = {check["name"]: check for check in report["checks"]}
    assert done.returncode == 0, done.stdout
    assert all(check["status"] != "failed" for check in report["checks"])
    passed = {name: check["figures"] for name, check in checks.items() if check["status"] == "passed"}
    assert passed["training: fp32, steps as they are"]["apart_ensemble"] == 0
    assert passed["fused model, preset default, on cpu"]["same_ranking"] is True
    assert passed["prompt encoder, ONNX Runtime fp16 on cpu"]["cosine"] > 0.999
    assert {"seconds_1", "seconds_3", "times_3"} <= passed["speed: ours, exported fp16 on cpu"].keys()
    skipped = {name for name, check in checks.items() if check["status"] == "skipped"}
    assert {"engines of tensorrt", "engines of rtx", "training: fp32, captured steps"} <= skipped
    assert report["summary"].startswith("Nothing was run on a GPU.")


class TestParts:
    def setting(self, module, folder):
        return module.Setting(device="cpu", size="tiny", work=folder)

    def test_what_is_not_installed_is_named(self, module, tmp_path, monkeypatch):
        part = module.Part(run=None, needs=("torch", "no_such_module", "nor_this"), seconds=1)
        monkeypatch.setitem(module.PARTS, "train", part)
        (check,) = module.run_part("train", self.setting(module, tmp_path), 5)
        assert (check.status, check.reason) == ("skipped", "not installed: no_such_module, nor_this")

    def test_a_part_that_takes_too_long_is_ended_and_failed(self, module, tmp_path):
        (check,) = module.run_part("train", self.setting(module, tmp_path), 0.2)
        assert (check.status, check.reason) == ("failed", "not done within 0 s")

    def test_a_part_that_ends_early_is_failed(self, module, tmp_path):
        (tmp_path / "city").write_text("no folder")
        *_, check = module.run_part("fused", self.setting(module, tmp_path), 200)
        assert check.status == "failed"

    def test_absent_devices_are_skipped_and_errors_failed(self, module):
        from topt_deploy.errors import BadData, NoDevice

        with module._faults("a") as absent:
            raise NoDevice("no CUDA here")
        with module._faults("b") as wrong:
            raise BadData("broken")
        assert (absent[0].status, absent[0].reason) == ("skipped", "no CUDA here")
        assert (wrong[0].status, wrong[0].reason) == ("failed", "BadData: broken")

    def test_a_failed_check_is_the_exit_code(self, module, tmp_path, monkeypatch):
        report = {
            "date": "d", "device": {"cuda": False, "why_not": "none", "versions": {}}, "summary": "s",
            "checks": [{"name": "x", "status": "failed", "reason": "y", "figures": {}}],
        }  # fmt: skip
        monkeypatch.setattr(module, "whole", lambda setting: report)
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "r.json")])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == 1
        assert "| x | failed (y) |  |" in (tmp_path / "r.md").read_text()


def test_speed_is_judged_against_both_targets(module):
    base = {1: 4.0, 3: 12.0}
    assert module._speed("x", {1: 2.0, 3: 2.4}, base, judged=True).status == "passed"
    assert module._speed("x", {1: 2.1, 3: 2.4}, base, judged=True).status == "failed"
    assert module._speed("x", {1: 2.0, 3: 2.5}, base, judged=True).status == "failed"
    assert module._speed("x", {1: 9.0, 3: 9.0}, base).figures["times_3"] == 1.33


def test_the_ranking_is_the_same_but_for_ties(module):
    assert module._same_ranking([1.0, 5.0, 5.0001], [1.0, 5.0001, 5.0])
    assert not module._same_ranking([1.0, 5.0, 4.0], [1.0, 4.0, 5.0])


def test_the_page_has_the_markers_and_keeps_the_rest(module):
    page = module.PAGE.read_text(encoding="utf-8")
    changed = module.put_between(page, "| new |\n")
    assert f"{module.BEGIN}\n| new |\n{module.END}" in changed
    assert changed.partition(module.BEGIN)[0] == page.partition(module.BEGIN)[0]
    assert changed.partition(module.END)[2] == page.partition(module.END)[2]
    with pytest.raises(SystemExit, match="markers"):
        module.put_between("nothing", "x")


def test_all_parts_together_stay_below_nine_minutes(module):
    assert module.TOTAL_S < 540
    assert set(module.PARTS) == set(PARTS)
