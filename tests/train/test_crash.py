"""``topt-deploy train``, killed at random instants: it goes on to the very model of a run that was left alone.

Every training is the command itself, in a process forked from one that has imported PyTorch: a city and a model so
small that it is over in a second or two, most of which something is being written.
"""

from random import Random

import pytest
from commands import shell
from figures import FULL, record
from killing import Forked, Target, Trials
from train_again import FRESH, GO_ON, IMPORTED, train

pytestmark = pytest.mark.slow

POINTS = 200
SETTINGS = """\
preset = "srel"
checkpoint_every = 2
[srel]
width = 16
ffn_width = 16
layers = 1
epochs = 12
[prompt4re]
epochs = 12
folds = 2
[tasks.crime]
"""


def test_killed_and_resumed(tmp_path):
    assert shell("topt-deploy sample --out city --regions 20", tmp_path).code == 0
    (tmp_path / "city" / "topt.toml").write_text(SETTINGS)
    results = ("model.safetensors", "inputs.safetensors", "held_out.parquet")
    target = Target(command=FRESH, resume=GO_ON, results=results)
    trials = Trials(target, tmp_path / "city", tmp_path / "scratch", Forked.starter(train, IMPORTED))
    rng = Random(3)
    while trials.kills < (POINTS if FULL else 2):
        trials(rng)
    record(
        "kill", command=FRESH, again=False, seconds=trials.seconds, idle_s=trials.idle_s, kills=trials.kills,
        begun=trials.begun,
    )  # fmt: skip
