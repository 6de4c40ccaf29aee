"""The tiles of a traced model as ONNX: Scans over their rows, which the graph lays from the number of regions.

A model is traced with the tiles as an input, and with what a tile computes in line, between two operators of our own
(:func:`topt_deploy.model.row_tiles.in_tiles`, and :func:`~topt_deploy.model.row_tiles.for_each` within a tile). So it
is traced once, and nothing has to be said of what it reads from around it: a Scan's body may read whatever the graph
has computed before.
"""

from collections.abc import Iterable

import onnx
from onnx.helper import make_graph, make_node, make_tensor_value_info
from onnx.parser import parse_graph

from topt_deploy.model import row_tiles
from topt_deploy.model.row_tiles import EACH, STACK

_LAY_TILES = """tiles (float[N, F] first) => (int64[T, t] rows)
    <int64 zero = {0}, int64 one = {1}, int64 entries = {%d}, int64 least = {%d}, int64[1] second = {1}> {
        shape = Shape <start = 0, end = 1> (first)
        regions = Squeeze (shape)
        n = Max (regions, one)
        fitting = Div (entries, n)
        some = Max (fitting, least)
        height = Min (some, n)
        starts = Range (zero, n, height)
        start = Unsqueeze (starts, second)
        offsets = Range (zero, height, one)
        through = Add (start, offsets)
        last = Sub (n, one)
        rows = Min (through, last)
    }"""


def lay_tiles(graph: onnx.GraphProto) -> None:
    """Replace the last input, which is the tiles, by what computes it from the number of regions, where it is used."""
    rows = graph.input.pop().name
    if rows not in {name for node in graph.node for name in node.input}:
        return
    laid = parse_graph(_LAY_TILES % (row_tiles.ENTRIES, row_tiles.LEAST))
    names = {"first": graph.input[0].name, "rows": rows}
    for node in laid.node:
        node.input[:] = [names.get(name, f"tiles/{name}") for name in node.input]
        node.output[:] = [names.get(name, f"tiles/{name}") for name in node.output]
    for tensor in laid.initializer:
        tensor.name = f"tiles/{tensor.name}"
    graph.initializer.extend(laid.initializer)
    graph.node.extend([*laid.node, *(graph.node.pop(0) for _ in range(len(graph.node)))])


def make_scans(graph: onnx.GraphProto) -> None:
    """Move what lies between each of several things and their stack into the body of a Scan in the place of the stack.

    Scans may lie within one another. The inner one's stack comes first, as it has to for the outer one to read it.
    """
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    inside: list[onnx.NodeProto] = []
    of_each: set[str] = set()
    """The values that the nodes inside of what becomes a Scan give."""
    outside = []
    for node in graph.node:
        whole = _scan(node, inside, types) if _ours(node, STACK) else node
        if _ours(whole, EACH) or not of_each.isdisjoint(_read(whole)):
            inside.append(whole)
            of_each.update(whole.output)
        else:
            outside.append(whole)
    del graph.node[:]
    graph.node.extend(outside)


def _ours(node: onnx.NodeProto, operator: str) -> bool:
    return f"{node.domain}::{node.op_type}" == operator


def _read(node: onnx.NodeProto) -> set[str]:
    """The values that a node reads; of a Scan also what its body reads from around it."""
    read = set(node.input)
    for attribute in node.attribute:
        if attribute.HasField("g"):
            body = attribute.g
            own = {value.name for value in body.input}.union(*(inner.output for inner in body.node))
            read |= set().union(*map(_read, body.node)) - own
    return read


def _scan(stack: onnx.NodeProto, inside: list[onnx.NodeProto], types: dict[str, int]) -> onnx.NodeProto:
    """The Scan that stands for a stack: its body is what the stack needs of what is made of the innermost of each."""
    needed = set(stack.input)
    nodes: list[onnx.NodeProto] = []
    for node in reversed(inside):
        if not needed.isdisjoint(node.output):
            needed |= _read(node)
            nodes.insert(0, node)
    start = [node for node in nodes if _ours(node, EACH)][-1]
    of_start, body = set(start.output), []
    for node in nodes:
        if not of_start.isdisjoint(_read(node)):
            of_start.update(node.output)
            body.append(node)

    def declared(names: Iterable[str]) -> list[onnx.ValueInfoProto]:
        return [make_tensor_value_info(name, types[name], None) for name in names]

    one = make_graph(body, stack.name, declared(start.output), declared(stack.input))
    return make_node(
        "Scan", list(start.input), list(stack.output), name=stack.name, body=one, num_scan_inputs=len(start.input)
    )
