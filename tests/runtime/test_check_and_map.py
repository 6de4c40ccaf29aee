"""topt-run check and topt-run map, on the predictions of the session's bundle."""

import json
import math
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from topt_deploy.errors import BadData, NoInput
from topt_deploy.runtime.check_predictions import binomial_below, check_predictions
from topt_deploy.runtime.cli.group import cli
from topt_deploy.runtime.map_page import write_map

IDS = [f"R{number}" for number in range(1, 21)]


def predictions(folder, *, wide=False, geometry=None, coverage=0.9, name="predictions.parquet"):
    """Predictions of 100 for each of twenty regions, from 80 to 120, and a receipt that promises a coverage."""
    n = len(IDS)
    facts = {"prediction": [100.0] * n, "lower": [80.0] * n, "upper": [120.0] * n}
    status = ["extrapolated"] * 2 + ["ok"] * (n - 2)
    if wide:
        columns = {"crime": facts["prediction"], "crime_lower": facts["lower"], "crime_upper": facts["upper"]}
        table = pa.table({"region_id": IDS, **columns, "status": status})
    else:
        table = pa.table({"city_id": ["X<b>"] * n, "region_id": IDS, "task": ["crime"] * n, **facts, "status": status})
    if geometry is not None:
        table = table.append_column("geometry", pa.array(geometry[0])).replace_schema_metadata({"geo": geometry[1]})
    path = folder / name
    pq.write_table(table, path)
    promised = {"options": {"coverage": {"crime": coverage}}, "started": "2026-01-02T03:04:05"}
    output = {"file": path.name, "sha256": "0" * 64, "rows": n}
    receipt = {"key": "k", "output": output, "status": {}, "seconds": {}, "set_aside": {}, **promised}
    path.with_name(f"{path.stem}.receipt.json").write_text(json.dumps(receipt))
    return path


def labels(folder, counts, ids=None, **more):
    path = folder / "regions.parquet"
    pq.write_table(pa.table({"region_id": IDS if ids is None else ids, "crime": counts, **more}), path)
    return path


@pytest.mark.parametrize("wide", [False, True])
def test_figures_of_what_was_counted(tmp_path, wide):
    counts = [100, 90, 130, *[110] * 17]
    order = np.random.default_rng(0).permutation(20)
    file = labels(tmp_path, [counts[i] for i in order], [IDS[i] for i in order])
    (task,) = check_predictions(predictions(tmp_path, wide=wide), file).tasks
    assert task.mae == pytest.approx((0 + 10 + 30 + 170) / 20)
    assert task.rmse == pytest.approx(math.sqrt((100 + 900 + 1700) / 20))
    assert task.coverage == pytest.approx(19 / 20)
    assert task.promised_coverage == 0.9
    assert task.extrapolated == pytest.approx(0.1)
    assert [missed.region_id for missed in task.missed] == ["R3"]
    assert task.missed[0].off == pytest.approx(130 ** (1 / 3) - 120 ** (1 / 3))
    assert task.broken == ()


def test_intervals_that_hold_too_few_counts_break_the_promise(tmp_path):
    """Thirteen of twenty at 90 % are rarer than one in a hundred; sixteen are not."""
    found = check_predictions(predictions(tmp_path), labels(tmp_path, [100] * 13 + [500] * 7))
    assert "hold 65%" in found.broken[0]
    assert check_predictions(predictions(tmp_path), labels(tmp_path, [100] * 16 + [500] * 4)).broken == []


@pytest.mark.parametrize(
    ("hits", "trials", "chance"), [(0, 1, 0.5), (14, 20, 0.9), (3, 50, 0.2), (20, 20, 0.9), (900, 1000, 0.9)]
)
def test_the_chance_of_so_few_is_scipys(hits, trials, chance):
    scipy = pytest.importorskip("scipy.stats")
    assert binomial_below(hits, trials, chance) == pytest.approx(float(scipy.binom.cdf(hits, trials, chance)), rel=1e-9)


def test_regions_without_counts_are_left_out_and_others_refused(tmp_path):
    file = labels(tmp_path, pa.array([100.0] * 10 + [None] * 10))
    assert check_predictions(predictions(tmp_path), file).tasks[0].regions == 10
    with pytest.raises(BadData, match="no region of the predictions is here"):
        check_predictions(predictions(tmp_path), labels(tmp_path, [1.0], ["elsewhere"]))
    pq.write_table(pa.table({"region_id": IDS, "other": [1] * 20}), tmp_path / "x.parquet")
    with pytest.raises(BadData, match="no task of the predictions has counts here"):
        check_predictions(predictions(tmp_path), tmp_path / "x.parquet")
    with pytest.raises(NoInput):
        check_predictions(predictions(tmp_path), file, bundle=tmp_path / "none.topt")
    with pytest.raises(BadData, match="not a file of predictions"):
        check_predictions(file, file)


def test_the_command_has_a_code_a_file_and_metrics(tmp_path, capsys):
    prometheus = pytest.importorskip("prometheus_client.parser")
    path, good = predictions(tmp_path), labels(tmp_path, [100] * 20)
    more = ["--out", str(tmp_path / "check.json"), "--metrics-file", str(tmp_path / "check.prom")]
    assert cli.main(["check", str(path), "--labels", str(good), *more], standalone_mode=False) == 0
    assert json.loads((tmp_path / "check.json").read_text())["broken"] == []
    families = list(prometheus.text_string_to_metric_families((tmp_path / "check.prom").read_text()))
    assert {f.name: f.samples[0].value for f in families if f.samples}["topt_check_coverage"] == 1
    bad = labels(tmp_path, [900] * 20)
    assert cli.main(["check", str(path), "--labels", str(bad), *more], standalone_mode=False) == 3
    assert "does not hold" in capsys.readouterr().out


def test_what_a_bundle_promised(demo_city, demo_bundle, tmp_path):
    """The session's city, predicted by its own bundle: errors against held-out ones, and drift where inputs change."""
    from topt_deploy.runtime.cli.predict import predict

    bundle, regions = demo_bundle, demo_city / "regions.parquet"
    out = tmp_path / "predictions.parquet"
    assert predict.main([str(regions), "--bundle", str(bundle), "--out", str(out)], standalone_mode=False) == 0
    found = check_predictions(out, regions)
    assert found.bundle == str(bundle)
    promised = json.loads((bundle / "manifest.json").read_text())["tasks"]
    for task in found.tasks:
        assert task.promised_mae == promised[task.task]["report"]["held_out"]["mae"]
        assert task.ratio == pytest.approx(task.mae / task.promised_mae)
    assert found.drift == {}
    table = pq.read_table(regions)
    column = next(name for name in table.column_names if name.startswith("poi_"))
    many = pa.array([10**6] * len(table))
    pq.write_table(table.set_column(table.column_names.index(column), column, many), tmp_path / "later.parquet")
    assert check_predictions(out, tmp_path / "later.parquet").drift == {column: 1.0}
    size = write_map(out, tmp_path / "map.html")
    assert size == len((tmp_path / "map.html").read_bytes())


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        named = [value or "" for key, value in attributes if key in ("src", "href")]
        self.links += [value for value in named if not value.startswith("#")]

    def handle_data(self, data):
        self.text.append(data)


def test_a_page_of_maps_needs_no_other_file(tmp_path):
    shapely = pytest.importorskip("shapely", reason="needs the geo extra")
    from topt_deploy.data.geometry import geo_metadata

    boxes = [shapely.to_wkb(shapely.box(i % 5, i // 5, i % 5 + 1, i // 5 + 1)) for i in range(20)]
    path = predictions(tmp_path, geometry=(boxes, geo_metadata(["Polygon"])))
    assert cli.main(["map", str(path)], standalone_mode=False) is None
    text = (tmp_path / "map.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.links == []
    assert "script" not in page.tags
    assert page.tags.count("use") == 2 * (20 + 2)  # two maps, two regions hatched in each
    assert "X<b>" in page.text
    assert "<b>" not in text
    assert "2 regions (hatched) lie beyond" in text
    write_map(path, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == text


def test_positions_and_names_of_the_regions_table(tmp_path):
    path = predictions(tmp_path, wide=True)
    with pytest.raises(NoInput, match="where the regions are"):
        write_map(path, tmp_path / "map.html")
    place = {"lon": np.arange(20.0), "lat": np.zeros(20), "name": ["The <Loop>", *[None] * 19]}
    write_map(path, tmp_path / "map.html", regions=labels(tmp_path, [1] * 20, **place))
    text = (tmp_path / "map.html").read_text()
    assert "The &lt;Loop&gt; (R1)" in text
    with pytest.raises(BadData, match="has not the regions"):
        write_map(path, tmp_path / "map.html", regions=labels(tmp_path, [1], ["R1"]))
