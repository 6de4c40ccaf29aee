"""The parity gate: it measures values and ranks, and nothing that differs gets past it."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from graphs import second_tile_off_by_one, weights_rotated

from topt_deploy.bundle.manifest import open_bundle
from topt_deploy.bundle.tolerances import PREDICTIONS as TOLERANCES
from topt_deploy.errors import BadBundle
from topt_deploy.export import city_bundle as exporting
from topt_deploy.export.onnx_graph import Graph
from topt_deploy.export.parity import compare, rounding, run_model
from topt_deploy.model.checkpoint import load_model, load_tensors
from topt_deploy.model.row_tiles import largest, starts
from topt_deploy.run_folder import INPUTS_FILE, MODEL_FILE, open_run
from topt_deploy.runtime.predictor import load

SIZES = [77, 7, 31, 203, 512, 513, 724, 725]
EXPECTED = {"crime": np.array([10.0, 20.0, 30.0, 40.0], dtype=np.float32)}


class TestCompare:
    def found(self, *values):
        return compare(EXPECTED, {"crime": np.array(values, dtype=np.float32)}, "x")

    def test_the_same(self):
        parity = self.found(10, 20, 30, 40)
        assert (parity.worst, parity.swapped, parity.regions, parity.city) == (0.0, 0, 4, "x")

    def test_a_difference_is_relative_to_the_expected(self):
        assert self.found(10, 20, 30, 44).worst == pytest.approx(0.1)
        assert self.found(10, 22, 30, 40).worst == pytest.approx(0.1)

    def test_below_one_count_it_is_absolute(self):
        small = {"crime": np.array([0.0, 1e-3], dtype=np.float32)}
        assert compare(small, {"crime": np.array([0.0, 2e-3], dtype=np.float32)}, "x").worst == pytest.approx(1e-3)

    def test_far_below_the_others_a_hundredth_of_their_mean_counts(self):
        """Check-ins on their own scale: in float32 PyTorch's 11.2278 is itself off by 1e-4 of it."""
        expected = {"check_in": np.array([3000.0, 3000.0, 6.0, 11.2278])}  # mean 1504.3
        parity = compare(expected, {"check_in": np.array([3000.0, 3000.0, 6.0, 11.2261])}, "x")
        assert parity.worst == pytest.approx(0.0017 / 15.043, rel=1e-3)
        swapped = {"check_in": np.array([3000.0, 3000.0, 11.2278, 6.0])}
        assert compare(expected, swapped, "x").swapped == 1

    def test_swapped_ranks_are_found(self):
        assert self.found(10, 30, 20, 40).swapped == 1
        assert self.found(40, 30, 20, 10).swapped == 3

    def test_ranks_swapped_within_the_tolerance_are_found_too(self):
        close = {"crime": np.array([1.0, 1.00002, 5.0], dtype=np.float32)}
        parity = compare(close, {"crime": np.array([1.00002, 1.0, 5.0], dtype=np.float32)}, "x")
        assert parity.worst < TOLERANCES["fp32"]
        assert parity.swapped == 1

    def test_ties_have_no_order(self):
        ties = {"crime": np.array([5.0, 5.0, 1.0, 5.0], dtype=np.float32)}
        found = {"crime": np.array([5.000001, 5.0, 1.0, 4.999999], dtype=np.float32)}
        assert compare(ties, found, "x").swapped == 0

    def test_what_rounding_alone_can_swap_has_no_order(self):
        close = {"crime": np.array([1.0, 1.00002, 5.0], dtype=np.float32)}
        found = {"crime": np.array([1.00002, 1.0, 5.0], dtype=np.float32)}
        assert compare(close, found, "x", rounding={"crime": 6e-6}).swapped == 0
        assert compare(close, found, "x", rounding={"crime": 4e-6}).swapped == 1
        assert compare(close, found, "x", rounding={"crime": 6e-6}).worst == compare(close, found, "x").worst

    @pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
    def test_what_is_no_number_fails(self, wrong):
        assert not self.found(10, 20, wrong, 40).worst <= TOLERANCES["fp32"]
        other = {"crime": np.array([10, 20, wrong, 40], dtype=np.float32)}
        assert not compare(other, EXPECTED, "x").worst <= TOLERANCES["fp32"]

    def test_every_task_counts(self):
        expected = {"a": np.ones(3), "b": np.ones(3)}
        assert compare(expected, {"a": np.ones(3), "b": np.array([1.0, 2.0, 1.0])}, "x").worst == 1.0
        assert compare(expected, {"a": np.array([1.0, np.nan, 1.0]), "b": np.ones(3)}, "x").worst == np.inf


def test_rounding_is_what_float32_loses(demo_run):
    """A few last bits, and the model that is asked stays in float32."""
    run = open_run(demo_run)
    model, (inputs, _) = load_model(run.path / MODEL_FILE), load_tensors(run.path / INPUTS_FILE)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    lost = rounding(model, arrays)
    assert set(lost) == set(run_model(model, arrays))
    assert all(2**-24 < of < 2e-5 for of in lost.values())
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.float32}


def export(demo_run, out, monkeypatch, graph, said=None):
    """Export without the half minute of tracing: the graph is given."""
    monkeypatch.setattr(exporting, "export_graph", lambda model, inputs: graph)
    return exporting.export_bundle(open_run(demo_run), out, say=(said if said is not None else []).append)


def test_the_true_graph_passes(demo_graph, demo_run, demo_bundle, tmp_path, monkeypatch):
    said = []
    done = export(demo_run, tmp_path / "model.topt", monkeypatch, demo_graph, said)
    assert [parity.regions for parity in done.parity] == SIZES
    assert all(parity.worst <= TOLERANCES["fp32"] and parity.swapped == 0 for parity in done.parity)
    assert done.parity[0].city == "training city"
    assert any("203 regions" in line for line in said)
    recorded = open_bundle(tmp_path / "model.topt").manifest.variants["fp32"]["parity"]
    assert [entry["regions"] for entry in recorded] == SIZES


def test_the_gate_sees_both_sides_of_a_tile_and_of_the_next():
    assert [len(starts(n)) for n in SIZES[-4:]] == [1, 2, 2, 3]
    assert [largest(1), largest(2)] == [512, 724]


def test_the_self_test_crosses_tiles_and_the_bundle_does_not_grow(demo_graph, demo_run, tmp_path, monkeypatch):
    export(demo_run, tmp_path / "model.topt", monkeypatch, demo_graph)
    checks = load(tmp_path / "model.topt").selftest()
    assert [(check.city, check.regions) for check in checks] == [
        ("golden-7", 7), ("golden-31", 31), ("enlarged-725", 725),
    ]  # fmt: skip
    assert all(check.worst < 1e-5 for check in checks)
    (kept,) = (tmp_path / "model.topt" / "golden").glob("enlarged-*")
    assert kept.stat().st_size < 10_000
    rows = open_bundle(tmp_path / "model.topt").manifest.enlarged["enlarged-725"]["rows"]
    assert {0, 360, 361, 721, 722, 724} < set(rows), "the ends of all three tiles"
    expected = pq.read_table(kept)
    assert len(expected) == len(rows)
    assert {"crime", "crime_folds", "leverage"} < set(expected.column_names), "all that the graph puts out"


def one_weight(graph):
    """A fifth more of one number of some 180,000: it changes predictions by a hundredth."""
    name = next(name for name in graph.initializers if name.endswith("mlp.0.weight"))
    values = np.frombuffer(graph.weights, dtype=np.float32).copy()
    offset, shape = graph.initializers[name]
    part = values[offset // 4 : offset // 4 + int(np.prod(shape))]
    part[np.argmax(np.abs(part))] *= 1.2
    return values


def all_nan(graph):
    values = np.frombuffer(graph.weights, dtype=np.float32).copy()
    values[:] = np.nan
    return values


@pytest.mark.parametrize("fault", [weights_rotated, second_tile_off_by_one])
def test_gate_and_self_test_each_catch_what_serves_wrongly(fault, demo_graph, demo_run, tmp_path, monkeypatch):
    """Both were passed once: graph and weights are right as files, or right in one tile."""
    faulty, out = fault(demo_graph), tmp_path / "model.topt"
    first = "enlarged-513" if fault is second_tile_off_by_one else "training city"
    with pytest.raises(BadBundle, match=f"parity gate failed on {first} .*no bundle was written"):
        export(demo_run, out, monkeypatch, faulty)
    monkeypatch.setattr(exporting, "parity_gate", lambda cities, serve, precision="fp32": ())
    first = "enlarged-725" if fault is second_tile_off_by_one else "golden-7"
    with pytest.raises(BadBundle, match=f"self-test failed on {first}"):
        export(demo_run, out, monkeypatch, faulty)
    assert not out.exists()


@pytest.mark.parametrize("tamper", [one_weight, all_nan])
@pytest.mark.parametrize("older", [False, True])
def test_a_tampered_graph_fails_and_leaves_no_bundle(tamper, older, demo_graph, demo_run, tmp_path, monkeypatch):
    out = tmp_path / "model.topt"
    if older:
        export(demo_run, out, monkeypatch, demo_graph)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert bool(before) == older
    tampered = Graph(model=demo_graph.model, weights=tamper(demo_graph).tobytes(), initializers=demo_graph.initializers)
    with pytest.raises(BadBundle, match=r"parity gate failed on .*no bundle was written") as caught:
        export(demo_run, out, monkeypatch, tampered)
    assert "0.0001" in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert out.exists() == older
    assert len(list(tmp_path.iterdir())) == older, "no temporary folder either"
