"""The errors themselves: what they say to people and to machines, and their exit codes."""

import json
import pickle

import numpy as np
import pytest

from topt_deploy.errors import BadData, BadRows, Exit, ToptError, how_many

CLASSES = ToptError.__subclasses__()


def test_every_code_but_success_and_partial_has_its_error():
    codes = {c.exit_code for c in CLASSES}
    assert len(codes) == len(CLASSES), "two errors share an exit code"
    assert {int(code) for code in Exit} == {0, 2, 3, 65, 66, 69, 70, 73, 74, 75, 76, 77, 78, 130, 143}
    assert codes <= set(Exit) - {Exit.DONE, Exit.PARTIAL, Exit.BUG}
    assert ToptError.exit_code == Exit.BUG


@pytest.mark.parametrize("kind", CLASSES)
def test_each_says_what_it_is_for(kind):
    assert kind.__doc__
    assert kind("wrong").as_dict()["error"] == kind.__name__
    assert kind("wrong").as_dict()["exit_code"] == int(kind.exit_code)


def test_everything_is_said_to_people():
    error = BadData(
        "is wrong", file="a.parquet", column="poi_bar", ids=["01", "02"], expected="this", found="that", fix="do it"
    )
    assert str(error).splitlines() == [
        "a.parquet, column 'poi_bar': is wrong",
        "  regions:  '01', '02'",
        "  expected: this",
        "  found:    that",
        "  to do:    do it",
    ]


def test_what_is_not_known_is_left_out():
    assert str(BadData("is wrong")) == "is wrong"
    assert str(BadData("is wrong", column="x")) == "column 'x': is wrong"
    assert set(BadData("is wrong").as_dict()) == {"error", "exit_code", "message"}


@pytest.mark.parametrize(
    ("count", "ending"), [(5, "'4'"), (6, "'4' and 1 more (6 in all)"), (5000, "and 4995 more (5000 in all)")]
)
def test_the_first_ids_are_shown_and_all_are_counted(count, ending):
    error = BadData("is wrong", ids=range(count))
    assert str(error).endswith(ending)
    assert error.as_dict()["region_ids"] == ["0", "1", "2", "3", "4"]
    assert error.as_dict()["region_count"] == count


def test_falsy_values_are_facts_too():
    error = BadData("is wrong", expected=0, found=0, ids=[])
    assert "expected: 0" in str(error)
    assert "found:    0" in str(error)
    assert error.as_dict()["region_count"] == 0


def test_machines_can_read_it_whatever_it_holds():
    error = BadData('is "wrong"\n', file="ü/ \\", ids=["\x00", "é"], found=float("nan"), expected=object)
    facts = json.loads(json.dumps(error.as_dict(), allow_nan=False))
    assert facts["message"] == 'is "wrong"\n'
    assert facts["region_ids"] == ["\x00", "é"]
    assert facts["found"] == "nan"


def test_an_error_travels_between_processes():
    error = BadRows(
        "bad", table=BadRows.REGIONS, rows=np.array([True, False]), code="x", file="f", ids=["a"], expected=1, fix="y"
    )
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is BadRows
    assert str(again) == str(error)
    assert again.as_dict() == error.as_dict()
    assert again.rows.tolist() == [True, False]


def test_one_is_not_many():
    assert how_many(1, "region") == "1 region"
    assert how_many(0, "region") == "0 regions"
    assert how_many(1200, "city", "cities") == "1,200 cities"
