"""Tables that several machines write to: a machine's columns are its own, and the others' stay."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "dev" / "benchmarks" / "page_sections.py"
OLD, NEW = "EPYC (avx2), family 25 model 1", "EPYC (avx2), family 25 model 17"


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("page_sections", SCRIPT)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_a_machine_adds_its_columns_and_keeps_the_others(pages):
    first = pages.joined("", {OLD: {"measured on": "2026-11-01", "fp32": "1.0, 4 s"}}, OLD)
    own = {NEW: {"measured on": "2026-11-02", "fp32": "1.0, 3 s", "int8": "0.99, 1 s"}, f"{NEW}, held to AVX2": {}}
    both = pages.read_columns(pages.joined(first, own, NEW))
    assert list(both) == [OLD, NEW, f"{NEW}, held to AVX2"]
    assert both[OLD] == {"measured on": "2026-11-01", "fp32": "1.0, 4 s", "int8": "–"}
    assert both[NEW] == own[NEW]
    assert set(both[f"{NEW}, held to AVX2"].values()) == {"–"}


def test_a_machine_replaces_all_of_its_own_columns(pages):
    table = pages.joined("", {OLD: {"fp32": "4 s"}}, OLD)
    table = pages.joined(table, {NEW: {"fp32": "3 s"}, f"{NEW}, held to AVX2": {"fp32": "5 s"}}, NEW)
    table = pages.joined(table, {NEW: {"fp32": "2 s"}}, NEW)
    assert pages.read_columns(table) == {OLD: {"fp32": "4 s"}, NEW: {"fp32": "2 s"}}


def test_only_the_section_is_written(pages, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- a -->\nold\n<!-- /a -->\n\nafter <!-- b -->\n")
    pages.write_section(page, "a", r"new \1")
    assert page.read_text() == "# Title\n\n<!-- a -->\nnew \\1\n<!-- /a -->\n\nafter <!-- b -->\n"
    assert pages.read_section(page, "a") == "new \\1\n"
    with pytest.raises(SystemExit, match="no place for c"):
        pages.write_section(page, "c", "")


def test_a_part_has_a_heading_of_its_own(pages):
    first = pages.with_part("", OLD, "| a |\n| b |")
    both = pages.with_part(first, NEW, "two\n\nparagraphs")
    assert both == f"### {OLD}\n\n| a |\n| b |\n\n### {NEW}\n\ntwo\n\nparagraphs"
    assert pages.with_part(both, OLD, "new") == f"### {OLD}\n\nnew\n\n### {NEW}\n\ntwo\n\nparagraphs"
