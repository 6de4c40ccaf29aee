"""``topt-deploy train``, killed at random instants: it goes on to the very model of a run that was left alone."""

import shutil
from random import Random

from figures import FULL, record
from killing import Target, Trials

from topt_deploy.runs import RUN_FILE

TRAIN = "topt-deploy train . --out run"
SETTINGS = "--set srel.epochs=12 --set prompt4re.epochs=12 --set checkpoint_every=2 --task crime --task check_in"
RESUME = f"""\
if grep -qs '"finished": true' run/{RUN_FILE}; then true
elif test -e run/{RUN_FILE}; then {TRAIN} --resume
else {TRAIN} {SETTINGS}; fi"""
POINTS = 60


def test_killed_and_resumed(tmp_path, demo_city):
    (tmp_path / "city").mkdir()
    for name in ("regions.parquet", "mobility.parquet", "topt.toml"):
        shutil.copy(demo_city / name, tmp_path / "city")
    target = Target(
        command=f"{TRAIN} {SETTINGS}",
        resume=RESUME,
        results=("model.safetensors", "inputs.safetensors", "held_out.parquet"),
    )
    trials = Trials(target, tmp_path / "city", tmp_path / "scratch")
    rng = Random(3)
    while trials.kills < (POINTS if FULL else 2):
        trials(rng)
    record(
        "kill", command=f"{TRAIN} …", again=False, seconds=trials.seconds, kills=trials.kills, begun=trials.begun,
    )  # fmt: skip
