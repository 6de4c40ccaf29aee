"""The small ONNX graphs between an encoder's networks, which ship in runtime/backends/glue/, made anew.

    python scripts/glue_graphs.py

They keep numbers on the device where one network leaves them and the next reads them. They depend on the types of the
numbers alone, not on a model: hence they ship with the program, and every bundle of every schema uses them as they are.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from onnx import ModelProto, NodeProto, TensorProto, checker, helper

OUT = Path(__file__).resolve().parents[1] / "runtime" / "backends" / "glue"
KINDS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
"""Types of what the exported networks read and put out."""
OPSET = 20
IR_VERSION = 9

Value = tuple[str, int, Sequence[str]]
"""Name, type and names of the axes."""


def join_graph(kind: int) -> ModelProto:
    """``first`` (a, H) and ``second`` (b, H) one behind the other: ``joined`` (a + b, H), all of a type."""
    return _model(
        [helper.make_node("Concat", ["first", "second"], ["joined"], axis=0)],
        [("first", kind, ["a", "width"]), ("second", kind, ["b", "width"])],
        ("joined", kind, ["m", "width"]),
    )


def place_graph(features: int, hidden: int) -> ModelProto:
    """Rows ``index`` (B, S) of ``text`` (n, H) and ``features`` (m, H) behind it: ``embeds`` (B, S, H).

    Args:
        features: The type of ``features``.
        hidden: The type of ``text`` and of ``embeds``.
    """
    return _model(
        [
            helper.make_node("Cast", ["features"], ["cast"], to=hidden),
            helper.make_node("Concat", ["text", "cast"], ["rows"], axis=0),
            helper.make_node("Gather", ["rows", "index"], ["embeds"], axis=0),
        ],
        [
            ("text", hidden, ["n", "width"]),
            ("features", features, ["m", "width"]),
            ("index", TensorProto.INT64, ["batch", "tokens"]),
        ],
        ("embeds", hidden, ["batch", "tokens", "width"]),
    )


def sums_graph(hidden: int, kind: int) -> ModelProto:
    """``select`` (B, R, S) of ones and zeros times ``hidden`` (B, S, H): ``sums`` (B, R, H).

    Args:
        hidden: The type of ``hidden``.
        kind: The type of ``select`` and ``sums``, and of the sums on the way.
    """
    return _model(
        [
            helper.make_node("Cast", ["hidden"], ["cast"], to=kind),
            helper.make_node("MatMul", ["select", "cast"], ["sums"]),
        ],
        [("select", kind, ["batch", "ranges", "tokens"]), ("hidden", hidden, ["batch", "tokens", "width"])],
        ("sums", kind, ["batch", "ranges", "width"]),
    )


def shipped_graphs() -> Iterator[tuple[str, ModelProto]]:
    """The graphs that the runtime opens, each with its file's name."""
    for name, kind in KINDS.items():
        yield f"join-{name}.onnx", join_graph(kind)
        yield f"sums-{name}.onnx", sums_graph(kind, TensorProto.DOUBLE)
    for features, hidden in product(KINDS, KINDS):
        yield f"place-{features}-{hidden}.onnx", place_graph(KINDS[features], KINDS[hidden])


def _model(nodes: Sequence[NodeProto], inputs: Sequence[Value], output: Value) -> ModelProto:
    graph = helper.make_graph(
        nodes, "glue", [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*output)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    checker.check_model(model, full_check=True)
    return model


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for name, model in shipped_graphs():
        (OUT / name).write_bytes(model.SerializeToString(deterministic=True))
