"""A report on a run of ensembles: what predictions are made of, by the contributions themselves."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from builders import task_config, tiny_city_tables, tiny_config

from topt_deploy.model.topt import NETWORKS
from topt_deploy.run_folder import open_run
from topt_deploy.train.report.page import render
from topt_deploy.train.report.plain_words import view_name
from topt_deploy.train.report.run_facts import Facts, read_facts

N = 21


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Path]) -> Facts:
    """A run of two ensembles: one with all parts, one with neither prompts nor networks."""
    regions, mobility = tiny_city_tables(N, prompts=("prompt_crime",))
    tasks = {
        "crime": task_config(ensemble={"enabled": True}, target={"transform": "cbrt"}),
        "calls": task_config(
            prompt4re={"enabled": False}, ensemble={"enabled": True, "network": False}, target={"transform": "sqrt"}
        ),
    }
    return read_facts(open_run(make_run(tmp_path_factory.mktemp("ensemble"), regions, mobility, tiny_config(tasks))))


@pytest.fixture(scope="module")
def sections(facts: Facts) -> dict[str, str]:
    """Their page's section of every task."""
    page = render(facts)
    assert "Attention" not in page
    assert "prompt_crime (encoder not named)" in page
    return {task: page.split(f">{task.capitalize()}</h2>")[1].split("</section>")[0] for task in facts.tasks}


@pytest.mark.parametrize(("task", "unit"), [("crime", "∛count"), ("calls", "√count")])
def test_bars_are_deviations_the_longest_first(facts: Facts, sections: dict[str, str], task: str, unit: str) -> None:
    found = facts.contributions[task]
    table = sections[task].split("Moves by")[1].split("</table>")[0]
    rows = re.findall(r'row">(.*?)</th><td>(.*?)</td>.*?width: (.*?)%', table)
    expected = {view_name(view): part.std() for view, part in found.views.items()}
    expected |= {name: part.std() for name, part in found.others.items()}
    expected = {name[0].upper() + name[1:]: deviation for name, deviation in expected.items()}
    assert {name: float(value) for name, value, _ in rows} == pytest.approx(expected, abs=0.0051)
    widths = [float(width) for _, _, width in rows]
    assert widths == sorted(widths, reverse=True)
    assert widths == pytest.approx(sorted(100 * v / max(expected.values()) for v in expected.values())[::-1], abs=0.06)
    assert f"in {unit}" in sections[task]
    assert {"Prompts" in expected, NETWORKS in found.others, NETWORKS in sections[task]} == {task == "crime"}


@pytest.mark.parametrize("task", ["crime", "calls"])
def test_each_regions_two_highest_and_two_lowest(facts: Facts, sections: dict[str, str], task: str) -> None:
    table = sections[task].split("Lowered most by")[1].split("</table>")[0]
    rows = re.findall(r'row">(.*?)</th><td>(.*?)</td><td>(.*?)</td>', table, re.S)
    assert [row[0] for row in rows] == list(facts.region_ids)
    views = facts.contributions[task].views
    for i, (_, *cells) in enumerate(rows):
        values = sorted((float(part[i]), view_name(view)) for view, part in views.items())
        raised = [pair for pair in values[::-1] if pair[0] > 0][:2]
        lowered = [pair for pair in values if pair[0] < 0][:2]
        for cell, expected in zip(cells, (raised, lowered), strict=True):
            shown = re.findall(r"([^<>]+?) <span class=\"soft\">(.*?)</span>", cell)
            assert [name.strip(", \n") for name, _ in shown] == [name for _, name in expected]
            figures = [float(figure.replace("−", "-")) for _, figure in shown]
            assert figures == pytest.approx([value for value, _ in expected], abs=0.0051)


def test_it_is_said_that_parts_are_not_causes(sections: dict[str, str]) -> None:
    assert all(section.count("Parts are not causes") == 2 for section in sections.values())


def test_networks_alone_are_not_told_apart(facts: Facts) -> None:
    alone = replace(facts.contributions["crime"], views={})
    page = render(replace(facts, contributions={"crime": alone}))
    assert page.count("cannot be told apart") == 1
    assert "raises and lowers" not in page
