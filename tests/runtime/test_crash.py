"""``topt-run predict``, killed at random instants: nothing torn, nothing left over, and the same result in the end."""

import shutil
from pathlib import Path
from random import Random

import pytest
from cities_folder import write_cities
from commands import shell
from figures import FULL, record
from killing import Target, Trials, names

PREDICT = "topt-run predict {inputs} --bundle model.topt --out {out} --on-bad-row quarantine"
MANY = PREDICT.format(inputs="cities", out="out") + " --workers 2"
ONE = PREDICT.format(inputs="cities/city=c1", out="one.parquet")


@pytest.fixture
def cities(tmp_path: Path, demo_bundle: Path) -> Path:
    """A folder with a bundle and cities of 10 to 60 regions, one of which has a row to be set aside."""
    folder = tmp_path / "inputs"
    shutil.copytree(demo_bundle, folder / "model.topt")
    sizes = {f"c{number}": 10 * number for number in range(1, 7)}
    write_cities(folder / "cities", demo_bundle.parent, sizes, bad="c1")
    return folder


@pytest.mark.parametrize("earlier", [False, True], ids=["first", "again"])
@pytest.mark.parametrize(("command", "points", "seed"), [(MANY, 60, 1), (ONE, 40, 2)], ids=["many", "one"])
def test_killed_and_resumed(tmp_path, cities, command, points, seed, earlier):
    target = Target(
        command=f"{command} || test $? = 3",
        resume=f"{command} --resume || test $? = 3",
        results=("predictions.parquet", "quarantine.parquet", "quarantine_mobility.parquet", "one.parquet"),
        earlier=f"{command} --coverage 0.8 || test $? = 3" if earlier else None,
    )
    trials = Trials(target, cities, tmp_path / "scratch")
    rng = Random(seed + 10 * earlier)
    while trials.kills < (points if FULL else 2):
        trials(rng)
    assert trials.left() == []
    record(
        "kill", command=command, again=earlier, seconds=trials.seconds, idle_s=trials.idle_s, kills=trials.kills,
        begun=trials.begun,
    )  # fmt: skip


class TestWhatVouchesForAnOutput:
    """A run that was killed between two renames has left files of two runs."""

    @pytest.fixture
    def stands(self, cities):
        def call(*change):
            assert shell(ONE, cities).code == 3
            before = {name: (cities / name).read_bytes() for name in names(cities) if name.startswith("one.q")}
            assert len(before) == 2
            for file in change:
                file(cities)
            said = shell(f"{ONE} --resume", cities)
            assert said.code == 3
            assert before == {name: (cities / name).read_bytes() for name in names(cities) if name.startswith("one.q")}
            return "as they were" in said.out

        return call

    def test_all_of_it(self, stands):
        assert stands()

    def test_a_file_of_rows_set_aside_that_is_another_runs(self, stands):
        assert not stands(lambda folder: (folder / "one.quarantine.parquet").write_bytes(b"another run's"))

    def test_a_file_of_rows_set_aside_that_is_gone(self, stands):
        assert not stands(lambda folder: (folder / "one.quarantine_mobility.parquet").unlink())

    def test_one_too_many(self, cities):
        sound = ONE.replace("city=c1", "city=c2")
        assert shell(sound, cities).code == 0
        (cities / "one.quarantine.parquet").write_bytes(b"another run's")
        said = shell(f"{sound} --resume", cities)
        assert said.code == 0
        assert "as they were" not in said.out
        assert not (cities / "one.quarantine.parquet").exists()
