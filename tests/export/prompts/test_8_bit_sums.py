"""8-bit products of exported encoders fit 16 bits in pairs: checked in the integers, the same on every processor."""

import json
import shutil

import numpy as np
import onnx
import pytest
from encoders_exported import EXPORTED
from onnx import numpy_helper

from topt_deploy.bundle.encoder_manifest import open_encoder_bundle
from topt_deploy.errors import BadBundle
from topt_deploy.export.prompts.graph_builder import MICROSOFT
from topt_deploy.export.quantize_weights import quantize_int8
from topt_deploy.runtime import prompt_encoder as runtime_encoder
from topt_deploy.runtime.prompt_encoder import open_encoder

pytestmark = pytest.mark.slow

INT16 = np.iinfo(np.int16)
LARGEST_ACTIVATION = 255


def worst_pairs(codes):
    """The largest and smallest sums of two products that activations of 0 to 255 can make of int8 codes (in, out).

    VPMADDUBSW multiplies inputs 2i and 2i + 1 and adds the two products in 16 bits.
    """
    codes = codes.astype(np.int64)
    if len(codes) % 2:
        codes = np.vstack([codes, np.zeros_like(codes[:1])])
    pairs = codes.reshape(-1, 2, codes.shape[1])
    most = LARGEST_ACTIVATION * np.maximum(pairs, 0).sum(axis=1)
    least = LARGEST_ACTIVATION * np.minimum(pairs, 0).sum(axis=1)
    return least.min(), most.max()


def integer_weights(graph_file):
    """Every weight (in, out) that ONNX Runtime multiplies in 8 bits, and the type of what it is multiplied with."""
    model = onnx.load(graph_file)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if (node.domain, node.op_type) == (MICROSOFT, "MatMulIntegerToFloat"):
            zero_point = numpy_helper.to_array(held[node.input[4]])
            yield node.input[1], numpy_helper.to_array(held[node.input[1]]), zero_point.dtype


@pytest.mark.parametrize("family", [family for family, made in EXPORTED.items() if "int8" in made])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_no_layer_can_leave_16_bits(encoders, family, precision):
    bundle = encoders(family, precision)
    seen = 0
    for network in open_encoder_bundle(bundle).manifest.networks:
        for name, codes, activations in integer_weights(bundle / f"{network}.onnxruntime.onnx"):
            assert (codes.dtype, activations) == (np.int8, np.uint8), name
            least, most = worst_pairs(codes)
            assert INT16.min <= least, name
            assert most <= INT16.max, name
            seen += 1
    assert seen > 0


class TestCodes:
    @pytest.fixture
    def weight(self):
        rng = np.random.default_rng(0)
        weight = rng.standard_t(5, size=(300, 41)).astype(np.float32)
        weight[0, :2] = 3.0  # both of a pair as large as any
        weight[1] = 0
        weight[2, 4:6] = 5.0, -5.0  # of two signs: neither sum grows
        return weight

    def test_of_the_old_form_leave_16_bits(self, weight):
        codes, _ = quantize_int8(weight, np.float32)
        assert worst_pairs(codes.T)[1] > INT16.max

    def test_fit_16_bits_and_waste_nothing(self, weight):
        codes, scale = quantize_int8(weight, np.float32, pairs_fit_16_bits=True)
        for code in codes:
            least, most = worst_pairs(code[:, None])
            assert INT16.min <= least <= most <= INT16.max
        for code, step, row in zip(codes, scale, weight, strict=True):
            if row.any():  # steps finer by a fiftieth would leave one of the two limits
                finer = np.rint(row / (0.98 * step)).astype(np.int64)
                least, most = worst_pairs(finer[:, None])
                assert np.abs(finer).max() > 127 or least < INT16.min or most > INT16.max
            assert np.abs(code * step - row).max() <= 0.5001 * step

    def test_a_pair_of_two_signs_keeps_all_8_bits(self, weight):
        codes, _ = quantize_int8(weight[2:3], np.float32, pairs_fit_16_bits=True)
        assert codes[0, 4:6].tolist() == [127, -127]


class TestBundlesOfTheOldForm:
    @pytest.fixture
    def old(self, encoders, reseal, tmp_path):
        folder = shutil.copytree(encoders("text", "int8"), tmp_path / "old.topt")
        reseal(folder, lambda record: record.pop("exact_without_vnni"))
        return folder

    def test_are_refused_where_sums_would_be_cut_off(self, old, monkeypatch):
        monkeypatch.setattr(runtime_encoder, "saturates_8_bit_sums", lambda: True)
        with pytest.raises(BadBundle, match="too large for this processor") as refused:
            open_encoder(old)
        assert "without VNNI" in str(refused.value.expected)

    def test_are_taken_where_they_are_right(self, old, monkeypatch):
        monkeypatch.setattr(runtime_encoder, "saturates_8_bit_sums", lambda: False)
        assert open_encoder(old).encoder.precision == "int8"

    def test_the_self_test_names_the_reason(self, topt_run, old):
        flags = runtime_encoder.saturates_8_bit_sums()
        said = topt_run("selftest", old, "--log-format", "json")
        assert said.code == (76 if flags else 0)
        if flags:
            assert "too large for this processor" in json.loads(said.err)["message"]

    def test_floats_are_not_concerned(self, encoders, reseal, tmp_path, monkeypatch):
        monkeypatch.setattr(runtime_encoder, "saturates_8_bit_sums", lambda: True)
        folder = shutil.copytree(encoders("text", "fp32"), tmp_path / "old.topt")
        reseal(folder, lambda record: record.pop("exact_without_vnni"))
        assert open_encoder(folder).encoder.precision == "fp32"

    def test_new_ones_are_taken_everywhere(self, encoders, monkeypatch):
        monkeypatch.setattr(runtime_encoder, "saturates_8_bit_sums", lambda: True)
        assert open_encoder(encoders("text", "int8")).encoder.precision == "int8"
