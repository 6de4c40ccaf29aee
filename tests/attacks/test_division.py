"""Divisions of whole numbers in graphs: by zero, or of the least number by -1, they end the process by SIGFPE."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from topt_deploy.hardening.onnx_operators import check_graph


def node(kind, *inputs, outputs, **attributes):
    return helper.make_node(kind, list(inputs), list(outputs), **attributes)


def quotient(*nodes, constants=(), out=TensorProto.INT64):
    """A graph of its own that divides ``x`` by ``d``, which the nodes make."""
    ends = [helper.make_tensor_value_info(name, kind, None) for name, kind in (("x", TensorProto.INT64), ("y", out))]
    kept = [numpy_helper.from_array(np.array(value), name) for name, value in dict(constants).items()]
    graph = helper.make_graph([*nodes, node("Div", "x", "d", outputs=["y"])], "g", ends[:1], ends[1:], kept)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def a_scan(body_divisor):
    """The division inside of a Scan, whose body sees the values around it."""
    ends = [helper.make_tensor_value_info(name, TensorProto.INT64, []) for name in ("each", "part")]
    inner = helper.make_graph([node("Div", "each", body_divisor, outputs=["part"])], "body", ends[:1], ends[1:])
    ends = [helper.make_tensor_value_info(name, TensorProto.INT64, [None]) for name in ("x", "y")]
    one = numpy_helper.from_array(np.array(3), "three")
    nodes = [node("Scan", "x", outputs=["y"], body=inner, num_scan_inputs=1), node("Size", "x", outputs=["size"])]
    graph = helper.make_graph(nodes[::-1], "g", ends[:1], ends[1:], [one])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


SIZE = node("Size", "x", outputs=["n"])
DIVISIONS = {
    "by -1": quotient(constants={"d": -1}),
    "by 0": quotient(constants={"d": 0}),
    "by nothing": quotient(constants={"d": np.zeros(0, np.int64)}),
    "by one of several": quotient(constants={"d": [2, -1]}),
    "by an input": quotient(node("Identity", "x", outputs=["d"])),
    "by a size": quotient(SIZE, node("Identity", "n", outputs=["d"])),
    "by the least": quotient(SIZE, node("Min", "n", "one", outputs=["d"]), constants={"one": 1}),
    "by the largest with -1": quotient(SIZE, node("Max", "n", "one", outputs=["d"]), constants={"one": -1}),
    "by a fraction cast back": quotient(
        node("Cast", "x", outputs=["f"], to=TensorProto.FLOAT), node("Cast", "f", outputs=["d"], to=TensorProto.INT64)
    ),
    "by a constant node": quotient(node("Constant", outputs=["d"], value_int=-1)),
    "by a positive one cast down": quotient(node("Cast", "n", outputs=["d"], to=6), constants={"n": 1 << 32}),
    "in a body": a_scan("size"),
    "by another size of an input": quotient(node("Shape", "x", outputs=["d"], start=1, end=2)),
    "by all sizes of an input": quotient(node("Shape", "x", outputs=["d"])),
    "by the first size of another value": quotient(
        node("NonZero", "x", outputs=["n"]), node("Shape", "n", outputs=["d"], start=0, end=1)
    ),
}


@pytest.mark.parametrize("how", DIVISIONS)
def test_whole_numbers_are_divided_by_what_is_known_to_be_positive(how):
    with pytest.raises(ValueError, match="divide whole numbers by 0 or less"):
        check_graph(DIVISIONS[how], {})


@pytest.mark.parametrize(
    "graph",
    [
        quotient(constants={"d": 7}),
        quotient(constants={"d": np.array([1, 2], np.int64)}),
        quotient(node("Constant", outputs=["d"], value=numpy_helper.from_array(np.array([4])))),
        quotient(SIZE, node("Max", "n", "one", outputs=["d"]), constants={"one": 1}),
        a_scan("three"),
        # As earlier exporters wrote it: nothing is run for no region.
        quotient(node("Shape", "x", outputs=["s"], start=0, end=1), node("Squeeze", "s", outputs=["d"])),
    ],
)
def test_a_positive_divisor_is_allowed(graph):
    check_graph(graph, {})


def test_two_constants_of_one_name_are_refused():
    """Whoever took the other one would see another divisor."""
    model = onnx.load_from_string(quotient(constants={"d": 7}))
    model.graph.initializer.append(numpy_helper.from_array(np.array(-1), "d"))
    with pytest.raises(ValueError, match="two values of the name 'd'"):
        check_graph(model.SerializeToString(), {})


def test_a_constant_that_whoever_runs_it_may_replace_is_none():
    model = onnx.load_from_string(quotient(constants={"d": 7}))
    model.graph.input.append(helper.make_tensor_value_info("d", TensorProto.INT64, []))
    with pytest.raises(ValueError, match="divide whole numbers"):
        check_graph(model.SerializeToString(), {})


def test_a_number_in_an_encoding_that_runtimes_do_not_read_is_none():
    """They take Shape's ``end`` for absent then, and divide by all sizes: those of an empty input among them."""
    shape = node("Shape", "x", outputs=["d"], start=0)
    end = shape.attribute.add(name="end", type=onnx.AttributeProto.INT)
    end.MergeFromString(b"\x1a\x01\x01")  # the field of a number, as a field of bytes
    assert end.i == 0
    with pytest.raises(ValueError, match="divide whole numbers"):
        check_graph(quotient(shape), {})
