"""Exit codes: the table in docs/reference/exit-codes.md has all of them, and every example uses them as it says."""

import ast
import re

import pytest

from topt_deploy.errors import Exit


def test_the_table_has_every_code_and_no_other(told_codes):
    assert set(told_codes) == {"success", "stop", "try again"}
    listed = sorted(code for codes in told_codes.values() for code in codes)
    assert listed == sorted(map(int, Exit))


def test_the_table_agrees_with_what_a_batch_takes_for_the_machines_fault(told_codes):
    from topt_deploy.runtime.summary import AGAIN

    assert told_codes["try again"] == set(AGAIN)


@pytest.mark.parametrize("example", ["airflow/topt_nightly.py", "prefect/topt_nightly.py"])
def test_orchestrators_use_the_tables_codes(example, examples, told_codes):
    """Without the orchestrator: what the file compares exit codes with."""
    tree = ast.parse((examples / example).read_text(encoding="utf-8"))
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            (names,) = node.targets
            names = [names] if isinstance(names, ast.Name) else names.elts
            values = ast.literal_eval(node.value)
            found |= dict(zip((n.id for n in names), values if len(names) > 1 else [values], strict=True))
    assert {found["DONE"], found["IN_PART"]} == told_codes["success"]
    assert set(found["AGAIN"]) == told_codes["try again"]


def test_the_cron_script_uses_the_tables_codes(examples, told_codes):
    script = (examples / "cron/topt-nightly.sh").read_text(encoding="utf-8")
    patterns = [set(map(int, m.split(" | "))) for m in re.findall(r"^([\d |]+)\)", script, re.M)]
    killed = {137}
    assert patterns == [told_codes["try again"] | killed, {Exit.DONE}, {Exit.PARTIAL}]
