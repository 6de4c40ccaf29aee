"""Whole reports of small runs: what is on the page, what is refused, and that nothing on it can run."""

import html
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import shapely
from builders import replaced, task_config, tiny_city_tables, tiny_config
from commands import Said
from markupsafe import escape as markup

from topt_deploy.config.settings import Config
from topt_deploy.data.geometry import geo_metadata
from topt_deploy.data.parquet import read_parquet, write_parquet
from topt_deploy.intended_use import INTENDED_USE
from topt_deploy.intervals import interval
from topt_deploy.run_folder import open_run
from topt_deploy.train.evaluation.protocols import PROTOCOLS
from topt_deploy.train.report.page import render, write_report
from topt_deploy.train.report.run_facts import read_facts
from topt_deploy.train.run import HELD_OUT_FILE

N = 21
MakeRun = Callable[[Path, pa.Table, pa.Table, Config], Path]
ATTACK = "<script>alert('1')</script>\"&"


def tiny(**tasks: dict[str, Any]) -> Config:
    """A configuration without prompts; stage-1 settings per task."""
    return tiny_config({task: task_config(srel=srel, prompt4re={"enabled": False}) for task, srel in tasks.items()})


def with_polygons(regions: pa.Table, crs: str | None = None) -> pa.Table:
    """Squares around the regions' positions, as GeoParquet; the first has a hole, the second two parts."""
    lon, lat = regions["lon"].to_numpy(), regions["lat"].to_numpy()
    shapes = shapely.box(lon - 0.002, lat - 0.002, lon + 0.002, lat + 0.002)
    shapes[0] = shapes[0].difference(shapely.Point(lon[0], lat[0]).buffer(0.001))
    shapes[1] = shapely.MultiPolygon([shapes[1], shapely.box(lon[1] + 0.01, lat[1], lon[1] + 0.012, lat[1] + 0.002)])
    geo = json.loads(geo_metadata(["Polygon", "MultiPolygon"]))
    if crs:
        authority, code = crs.split(":")
        geo["columns"]["geometry"]["crs"] = {"id": {"authority": authority, "code": int(code)}}
    table = replaced(regions, geometry=pa.array(shapely.to_wkb(shapes), pa.binary()))
    return table.replace_schema_metadata({**(table.schema.metadata or {}), b"geo": json.dumps(geo).encode()})


def attacked(table: pa.Table, columns: tuple[str, ...]) -> pa.Table:
    """The table with region "003" called otherwise."""
    changed = {c: [ATTACK if v == "003" else v for v in table[c].to_pylist()] for c in columns}
    return replaced(table, **changed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, make_run: MakeRun) -> Path:
    """A run of two embeddings, polygons, an unlabelled region, a hostile id and a hostile name."""
    regions, mobility = tiny_city_tables(N)
    regions = attacked(with_polygons(regions), ("region_id",))
    calls = [None if i == 2 else value for i, value in enumerate(regions["calls"].to_pylist())]
    regions = replaced(regions, calls=calls, city_id=[f"Town {ATTACK}"] * N)
    mobility = attacked(mobility, ("origin_id", "dest_id"))
    return make_run(tmp_path_factory.mktemp("finished"), regions, mobility, tiny(crime={}, calls={"layers": 0}))


@pytest.fixture(scope="module")
def page(finished: Path) -> str:
    return render(read_facts(open_run(finished)))


class Elements(HTMLParser):
    """Every element with its attributes; and that what is opened is closed."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.all if name == tag]


class TestSafety:
    def test_names_are_text_and_nothing_else(self, page: str) -> None:
        assert ATTACK not in page
        assert "<script" not in page.lower()
        assert html.unescape(page).count(ATTACK) > 10
        assert "Town &lt;script&gt;" in page

    def test_nothing_is_loaded_and_nothing_runs(self, page: str) -> None:
        elements = Elements(page)
        assert elements.open == []
        names = {name for _, attributes in elements.all for name in attributes}
        assert not {name for name in names if name.startswith("on")} | (names & {"src", "srcset", "action"})
        links = [attributes["href"] for _, attributes in elements.all if "href" in attributes]
        assert links
        assert all(re.fullmatch(r"#r\d+", link or "") for link in links)
        assert set(re.findall(r"url\(([^)]*)\)", page)) == {"#hatch"}
        policy = [meta["content"] for meta in elements.of("meta") if "http-equiv" in meta]
        assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]

    def test_the_same_run_gives_the_same_bytes(self, page: str, finished: Path) -> None:
        assert render(read_facts(open_run(finished))) == page


class TestAccess:
    def test_language_title_and_headings_in_order(self, page: str) -> None:
        elements = Elements(page)
        assert elements.of("html") == [{"lang": "en"}]
        assert len(elements.of("title")) > 1
        levels = [int(tag[1]) for tag, _ in elements.all if re.fullmatch(r"h\d", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(later - earlier <= 1 for earlier, later in pairwise(levels))

    def test_every_drawing_is_named_and_every_table_has_a_caption(self, page: str) -> None:
        elements = Elements(page)
        assert all("aria-label" in svg or svg.get("aria-hidden") == "true" for svg in elements.of("svg"))
        assert len(elements.of("table")) == len(elements.of("caption")) > 3

    def test_ids_are_unique_and_references_lead_somewhere(self, page: str) -> None:
        elements = Elements(page)
        ids = [attributes["id"] for _, attributes in elements.all if "id" in attributes]
        assert len(ids) == len(set(ids))
        used = {(attributes["href"] or "")[1:] for attributes in elements.of("use")}
        used |= {attributes["aria-labelledby"] or "" for attributes in elements.of("section") if attributes}
        assert used <= set(ids)


class TestContent:
    def test_figures_are_the_runs(self, page: str, finished: Path) -> None:
        facts = open_run(finished).facts
        for report in facts["reports"].values():
            for name in ("held_out", "trees", "mean"):
                assert f"<td>{report[name]['r2']:.3f}</td>".replace("-", "−") in page
        assert facts["protocol"] in page
        assert "SHA-256 " + open_run(finished).regions_sha256 in page

    @pytest.mark.parametrize("task", ["crime", "calls"])
    def test_what_hovering_tells_is_the_tables_and_the_intervals(self, finished: Path, page: str, task: str) -> None:
        section = page.split(f">{task.capitalize()}</h2>")[1].split("</section>")[0]
        titles = {html.unescape(text) for text in re.findall(r"<title>(.*?)</title>", section, re.S)}
        tips = {lines[0]: lines[1:] for lines in (title.split("\n") for title in titles)}
        rows = [row for row in read_parquet(finished / HELD_OUT_FILE).to_pylist() if row["task"] == task]
        assert len(tips) == len(titles) == len(rows) == N
        scores = open_run(finished).facts["scores"][task]
        for row in rows:
            reported, predicted, ends, *residual = tips[row["region_id"]]
            label, held_out = row["label"], row["held_out"]
            prediction = row["in_sample"] if held_out is None else held_out
            assert reported == ("no reported count" if label is None else f"reported {label:,.0f}")
            assert predicted.startswith("predicted, by the deployed" if held_out is None else "predicted, held out")
            assert _numbers(predicted) == [_shown(prediction)]
            lower, upper = interval(np.array([prediction]), scores, 0.9)
            assert _numbers(ends.partition(":")[2]) == [_shown(lower[0]), _shown(upper[0])]
            expected = [] if held_out is None or label is None else [_shown(held_out - label)]
            assert [n for line in residual for n in _numbers(line)] == expected

    def test_the_region_without_a_label_is_hatched_and_counted(self, page: str) -> None:
        assert "1 of 21 regions have no reported count" in page
        assert page.count('class="hatch"') == 3, "prediction, width and residual of the one task"

    def test_both_embeddings_are_shown_and_the_one_without_layers_says_so(self, page: str) -> None:
        assert "Attention of the embedding for Crime" in page
        assert "Attention of the embedding for Calls" in page
        assert page.count("has no Graphormer layer") == 1
        assert page.count("What each region attends to") == 1

    def test_intended_use_is_the_model_cards(self, page: str) -> None:
        assert all(paragraph in page for paragraph in INTENDED_USE)

    def test_what_is_read_of_other_regions(self, page: str, finished: Path) -> None:
        """The hostile region's partner with the largest share, from the table itself."""
        flows = read_parquet(finished.parent.parent / "mobility.parquet").to_pylist()
        share: dict[str, float] = {}
        for mine, other in (("origin_id", "dest_id"), ("dest_id", "origin_id")):
            own = [row for row in flows if row[mine] == ATTACK]
            for row in own:
                share[row[other]] = share.get(row[other], 0) + row["flow"] / sum(r["flow"] for r in own) / 2
        most = max((region for region in share if region != ATTACK), key=lambda region: share[region])
        table = page.split("Exchanges most with")[1].split("</table>")[0]
        (row,) = [row for row in table.split("<tr>") if row.startswith(f'<th scope="row">{markup(ATTACK)}</th>')]
        assert f'<td>{most} <span class="soft">{100 * share[most]:.1f}&nbsp;%</span>' in row

    def test_without_the_flows_the_page_says_so(self, finished: Path, tmp_path: Path) -> None:
        page = render(read_facts(replace(open_run(finished), city_dir=tmp_path)))
        assert "Exchanges most with" not in page
        assert html.unescape(page).count("mobility.parquet is not where the run found it") == 1

    def test_a_synthetic_city_says_so(self, page: str, finished: Path) -> None:
        assert "synthetic" not in page
        facts = read_facts(open_run(finished))
        made_up = replace(facts, run=replace(facts.run, facts={**facts.run.facts, "synthetic": True}))
        assert "This city is synthetic." in render(made_up)


class TestEvaluation:
    RESULTS: ClassVar = {
        "protocol": "honest", "seeds": [1, 2, 3], "versions": {"topt-deploy": "0.0"}, "verdicts": [
            {"task": "crime", "sentence": f"crime: topt has MAE 1.0, below {ATTACK}"}
        ], "results": [
            {
                "method": ATTACK, "group": "literature", "task": "crime", "coverage": None,
                "figures": {name: {"mean": 1234.5, "sd": 0.5} for name in ("mae", "rmse", "r2")},
            },
            {
                "method": "topt", "group": "variant", "task": "crime",
                "figures": {name: {"mean": 1.0, "sd": None} for name in ("mae", "rmse", "r2")},
                "coverage": {
                    "nominal": 0.9, "all": {"coverage": 0.925, "regions": 40, "width": 3.0},
                    "by_size": {"small": {"coverage": 0.5, "regions": 10, "width": 3.0}},
                    "by_block": [{"coverage": 0.25, "regions": 4, "width": 3.0}],
                },
            },
        ],
    }  # fmt: skip

    def evaluated(self, folder: Path, regions_sha256: str) -> Path:
        (folder / "results.json").write_text(json.dumps(self.RESULTS | {"regions_sha256": regions_sha256}))
        return folder

    def test_the_section_and_that_names_in_it_are_text(
        self, finished: Path, tmp_path: Path, topt_deploy: Callable[..., Said]
    ) -> None:
        out = tmp_path / "page.html"
        folder = self.evaluated(tmp_path, open_run(finished).regions_sha256)
        said = topt_deploy("report", finished, "--out", out, "--evaluation", folder)
        assert said.code == 0, said.err
        page = out.read_text(encoding="utf-8")
        assert Elements(page).open == []
        assert ATTACK not in page
        section = html.unescape(page.split("Compared with other methods")[1].split("</section>")[0])
        assert PROTOCOLS["honest"].meaning in section
        assert f"topt has MAE 1.0, below {ATTACK}." in section
        assert f'<th scope="row">{ATTACK}</th><td>literature</td><td>1234.5 ± 0.5</td>' in section
        assert "3 repetitions" in section
        shares = re.findall(r"<td>(\d+)\N{NO-BREAK SPACE}% <span class=\"soft\">of (\d+)</span>", section)
        assert shares == [("92", "40"), ("50", "10"), ("25", "4")]

    def test_another_citys_is_refused(self, finished: Path, tmp_path: Path, topt_deploy: Callable[..., Said]) -> None:
        out = tmp_path / "page.html"
        said = topt_deploy("report", finished, "--out", out, "--evaluation", self.evaluated(tmp_path, "0" * 64))
        assert (said.code, "another city" in said.err) == (65, True), said.err
        assert not out.exists()

    def test_without_one_there_is_no_section(self, page: str) -> None:
        assert "Compared with other methods" not in page


class TestLaterCounts:
    def test_the_section_and_that_names_in_it_are_text(
        self, finished: Path, tmp_path: Path, topt_deploy: Callable[..., Said]
    ) -> None:
        reports = open_run(finished).facts["reports"]
        missed = {"region_id": ATTACK, "counted": 900.0, "predicted": 9.0, "lower": 1.5, "upper": 20.0, "off": 6.9}
        tasks = [
            {
                "task": task, "regions": 12, "mae": 4321.0, "ratio": 2.0, "promised_mae": report["held_out"]["mae"],
                "predicted_sum": 7123.0, "counted_sum": 9456.0, "coverage": 0.52, "promised_coverage": 0.9,
                "rmse": 5000.0, "r2": 0.1, "coverage_chance": 0.001, "extrapolated": 0.0, "missed": [missed],
                "missed_count": 6, "broken": ["the error is 2.00 times what was promised"],
            }
            for task, report in reports.items()
        ]  # fmt: skip
        check, files = tmp_path / "check.json", {"predictions": "p.parquet", "labels": ATTACK, "bundle": None}
        check.write_text(json.dumps({**files, "tasks": tasks, "drift": {ATTACK: 0.25}}))
        out = tmp_path / "page.html"
        said = topt_deploy("report", finished, "--out", out, "--check", check)
        assert said.code == 0, said.err
        page = out.read_text(encoding="utf-8")
        assert Elements(page).open == []
        assert ATTACK not in page
        section = html.unescape(page.split("Against what was counted later")[1].split("</section>")[0])
        assert section.count("The error is 2.00 times what was promised.") == len(tasks)
        for figure in ("7,123", "9,456", "4,321", "52\N{NO-BREAK SPACE}%", "900", "25\N{NO-BREAK SPACE}%"):
            assert figure in section, figure
        (tmp_path / "old.html").write_bytes(out.read_bytes())
        check.write_text(json.dumps({**files, "tasks": [tasks[0] | {"promised_mae": 1e9}], "drift": {}}))
        said = topt_deploy("report", finished, "--out", out, "--check", check)
        assert (said.code, "another model" in said.err) == (65, True), said.err
        assert out.read_bytes() == (tmp_path / "old.html").read_bytes()

    def test_without_a_check_there_is_no_section(self, page: str) -> None:
        assert "counted later" not in page


def _numbers(text: str) -> list[float]:
    return [float(found.replace("−", "-").replace(",", "")) for found in re.findall(r"−?\d[\d,.]*", text)]


def _shown(value: float) -> Any:
    """A number that is written whole or, below ten, with two significant digits."""
    return pytest.approx(value, rel=0.051, abs=0.0501) if abs(value) < 10 else pytest.approx(value, abs=0.501)


class TestOutlines:
    def test_polygons_are_drawn_with_hole_and_parts(self, page: str) -> None:
        paths = [path["d"] or "" for path in Elements(page).of("path") if "id" in path]
        assert len(paths) == N
        assert sorted(path.count("M") for path in paths) == [1] * (N - 2) + [2, 2]
        assert "Outlines are those of the city" in page

    @pytest.mark.parametrize(("change", "part"), [("missing", "not where the run found it"), ("other", "has changed")])
    def test_without_the_runs_own_table_points_are_drawn(
        self, finished: Path, tmp_path: Path, change: str, part: str
    ) -> None:
        run = replace(open_run(finished), city_dir=tmp_path)
        if change == "other":
            write_parquet(tmp_path / "regions.parquet", tiny_city_tables(N, seed=1)[0])
        facts = read_facts(run)
        assert facts.place.outlines.points
        assert part in render(facts)

    @pytest.mark.parametrize("crs", [None, "EPSG:26916"])
    def test_without_usable_polygons_points_are_drawn_and_the_page_says_why(
        self, tmp_path: Path, crs: str | None, make_run: MakeRun
    ) -> None:
        regions, mobility = tiny_city_tables(N, tasks=("crime",))
        run = make_run(tmp_path, with_polygons(regions, crs) if crs else regions, mobility, tiny(crime={}))
        facts = read_facts(open_run(run))
        assert facts.place.outlines.points
        assert ("reference system" if crs else "has no geometry") in facts.place.outlines_note


class TestSmallAndOdd:
    def test_too_few_labels_for_intervals(self, tmp_path: Path, make_run: MakeRun) -> None:
        regions, mobility = tiny_city_tables(7, tasks=("crime",))
        page = render(read_facts(open_run(make_run(tmp_path, regions, mobility, tiny(crime={})))))
        assert "7 held-out errors are too few for intervals" in page
        assert "interval:" not in page

    def test_labels_that_do_not_vary_have_neither_r2_nor_a_pattern(self, tmp_path: Path, make_run: MakeRun) -> None:
        regions, mobility = tiny_city_tables(N, tasks=("crime",))
        run = make_run(tmp_path, replaced(regions, crime=[7.0] * N), mobility, tiny(crime={}))
        facts = read_facts(open_run(run))
        task = facts.tasks["crime"]
        plain = replace(task.report.mean, mae=1.0)  # no baseline is exact, or the verdict would have to divide by zero
        report = replace(task.report, mean=plain, trees=plain)
        page = render(replace(facts, tasks={"crime": replace(task, report=report)}))
        assert "Crime has no R²" in page
        assert "do not vary from region to region" in page
        assert "Moran’s I of the residuals" not in page

    def test_zeros_that_take_no_part_and_a_task_with_prompts_beside_one_without(
        self, tmp_path: Path, make_run: MakeRun
    ) -> None:
        regions, mobility = tiny_city_tables(N, prompts=("prompt_crime",))
        counts = [0.0 if i < 3 else value for i, value in enumerate(regions["crime"].to_pylist())]
        tasks = {"crime": task_config(target={"drop_zeros": True}), "calls": task_config(prompt4re={"enabled": False})}
        run = make_run(tmp_path, replaced(regions, crime=counts), mobility, tiny_config(tasks))
        facts = read_facts(open_run(run))
        assert np.isnan(facts.tasks["crime"].residual).sum() == 3
        page = render(facts)
        assert "prompt_crime (encoder not named)" in page
        assert "regions have no reported count" not in page
        assert "3 with a reported zero took no part in training" in page


class TestCommand:
    def test_the_newest_finished_run_and_its_folder_are_the_defaults(
        self, finished: Path, page: str, topt_deploy: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(finished.parent.parent)
        said = topt_deploy("report")
        assert said.code == 0, said.err
        out = finished / "report.html"
        assert str(out.relative_to(Path.cwd())) in said.out
        assert out.read_text(encoding="utf-8") == page
        out.unlink()

    def test_a_place_of_ones_own(self, finished: Path, topt_deploy: Callable[..., Said], tmp_path: Path) -> None:
        out = tmp_path / "page.html"
        assert topt_deploy("report", finished, "--out", out).code == 0
        assert [file.name for file in tmp_path.iterdir()] == ["page.html"]

    @pytest.mark.parametrize(
        ("unfinished", "code", "part"), [(True, 2, "not finished"), (False, 66, "no training run")]
    )
    def test_without_a_finished_run(
        self, topt_deploy: Callable[..., Said], finished: Path, tmp_path: Path, unfinished: bool, code: int, part: str
    ) -> None:
        if unfinished:
            replace(open_run(finished), path=tmp_path, finished=False).save()
        said = topt_deploy("report", tmp_path)
        assert (said.code, part in said.err) == (code, True), said.err
        assert not (tmp_path / "report.html").exists()

    @pytest.mark.parametrize(("file", "code"), [(HELD_OUT_FILE, 66), ("model.safetensors", 66)])
    def test_a_run_that_lacks_a_file(
        self, topt_deploy: Callable[..., Said], finished: Path, tmp_path: Path, file: str, code: int
    ) -> None:
        for kept in finished.iterdir():
            if kept.is_file() and kept.name != file:
                (tmp_path / kept.name).write_bytes(kept.read_bytes())
        said = topt_deploy("report", tmp_path)
        assert said.code == code
        assert file in said.err

    def test_a_run_whose_rows_are_not_its_regions(self, finished: Path, tmp_path: Path) -> None:
        for kept in finished.iterdir():
            if kept.is_file():
                (tmp_path / kept.name).write_bytes(kept.read_bytes())
        write_parquet(tmp_path / HELD_OUT_FILE, read_parquet(finished / HELD_OUT_FILE).slice(1))
        with pytest.raises(Exception, match="are not the run's regions"):
            read_facts(open_run(tmp_path))

    def test_a_folder_is_no_place_for_a_page(
        self, finished: Path, topt_deploy: Callable[..., Said], tmp_path: Path
    ) -> None:
        assert topt_deploy("report", finished, "--out", tmp_path).code == 73
        assert topt_deploy("report", finished, "--out", tmp_path / "nowhere" / "page.html").code == 73


def test_a_page_stays_small_enough_to_send(finished: Path, tmp_path: Path) -> None:
    """A megabyte for 77 regions and three tasks leaves about 4,000 bytes per region and task."""
    size: Any = write_report(open_run(finished), tmp_path / "page.html")
    assert size == (tmp_path / "page.html").stat().st_size
    fixed = 30_000  # style, words, legends
    assert (size - fixed) / (2 * N) < 4000
