"""Engines of tiny graphs by TensorRT-RTX, which needs no GPU for it; errors name what is wrong."""

import numpy as np
import pytest
from engines import UNSUPPORTED, rtx, write_external, write_graph

from topt_deploy.errors import BadBundle, NoInput, UsageError
from topt_deploy.tensorrt.build import CAPABILITIES, build_engine, parse
from topt_deploy.tensorrt.library import TENSORRT, Library
from topt_deploy.tensorrt.profile import ProfileRange

LINEAR = "g (float[regions, 3] x) => (float[regions, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> { y = MatMul(x, w) }"
PROFILE = {"regions": ProfileRange(min=1, opt=7, max=100)}


@pytest.fixture(scope="module")
def library():
    return rtx()


@pytest.fixture
def graph(tmp_path):
    return write_graph(tmp_path / "linear.onnx", LINEAR)


def test_a_graph_is_parsed_with_its_dimensions_names(library, graph):
    parsed = parse(library, graph)
    assert parsed.inputs == {"x": ("regions", 3)}
    assert parsed.layers >= 1


@pytest.mark.parametrize("capability", ["8.0", "8.9"])
def test_an_engine_for_a_capability(library, graph, capability, capfd):
    built = build_engine(library, graph, PROFILE, capability=capability)
    assert len(built.engine) > 1000
    assert built.timing_cache is None, "TensorRT-RTX has none"
    assert capfd.readouterr() == ("", ""), "what the library says is collected"


def test_weights_beside_the_graph_are_read(library, tmp_path):
    width = 512
    text = "g (float[regions, 512] x, float[512, 512] w) => (float[regions, 512] y) { y = MatMul(x, w) }"
    path = write_external(tmp_path / "external.onnx", text, w=np.ones((width, width), np.float32))
    assert path.stat().st_size < 1000
    assert len(build_engine(library, path, PROFILE, capability="8.0").engine) > 4 * width**2
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(BadBundle, match="cannot read the graph"):
        build_engine(library, path, PROFILE, capability="8.0")


def test_an_unsupported_operator_is_named_with_its_node(library, tmp_path):
    path = write_graph(tmp_path / "bad.onnx", UNSUPPORTED)
    with pytest.raises(BadBundle) as refused:
        build_engine(library, path, PROFILE, capability="8.0")
    assert "DynamicQuantizeLinear (node dynamic)" in refused.value.found
    assert refused.value.file == str(path)


def test_an_operator_of_onnx_runtimes_own_is_named(library, tmp_path):
    codes, scales = ", ".join(["1"] * 2 * 1 * 16), "1, 1"
    path = write_graph(
        tmp_path / "nbits.onnx",
        f"""g (float[regions, 32] x) => (float[regions, 2] y)
            <uint8[2, 1, 16] w = {{{codes}}}, float[2] s = {{{scales}}}> {{
            [four_bits] y = com.microsoft.MatMulNBits <K = 32, N = 2, bits = 4, block_size = 32>(x, w, s)
        }}""",
    )
    with pytest.raises(BadBundle) as refused:
        parse(library, path)
    assert "MatMulNBits (node four_bits)" in refused.value.found


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({}, "no sizes for dimension 'regions' of input 'x'"),
        ({"rows": ProfileRange(min=1, opt=1, max=1)}, "has sizes for 'rows'"),
        ({"regions": ProfileRange(min=1, opt=700, max=100)}, "rejects the profile"),
    ],
)
def test_a_wrong_profile_is_named(library, graph, profile, message):
    with pytest.raises(UsageError, match=message) as refused:
        build_engine(library, graph, profile, capability="8.0")
    assert "regions" in str(refused.value) or "x [1, 3], [700, 3], [100, 3]" in str(refused.value)


def test_a_profile_that_the_graph_cannot_do_with_is_named(library, tmp_path):
    """Four rows are added to every number of regions but four."""
    path = write_graph(
        tmp_path / "pairs.onnx",
        """g (float[regions, 3] x, float[4, 3] w) => (float[regions, 3] y) { y = Add(x, w) }""",
    )
    with pytest.raises(BadBundle, match="cannot build an engine") as refused:
        build_engine(library, path, {"regions": ProfileRange(min=5, opt=7, max=9)}, capability="8.0")
    assert "x [5, 3], [7, 3], [9, 3]" in refused.value.expected


@pytest.mark.parametrize("capability", ["9.0", "8", "sm80", "12.9", ""])
def test_a_capability_that_it_does_not_build_for(library, graph, capability):
    with pytest.raises(UsageError, match="does not build for this compute capability") as refused:
        build_engine(library, graph, PROFILE, capability=capability)
    assert refused.value.expected == f"one of {', '.join(CAPABILITIES)}"


def test_tensorrt_builds_for_the_gpu_that_is_here(library, graph):
    with pytest.raises(UsageError, match="builds for the GPU that it runs on"):
        build_engine(Library(flavour=TENSORRT, version="10", module=library.module), graph, PROFILE, capability="8.0")


def test_no_graph(library, tmp_path):
    with pytest.raises(NoInput, match="no such graph"):
        parse(library, tmp_path / "none.onnx")


def test_what_is_no_onnx(library, tmp_path):
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(BadBundle, match="found no network in the file"):
        parse(library, tmp_path / "text.onnx")
