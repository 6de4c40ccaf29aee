"""The tiles of a traced model as ONNX: Scans over their rows, which the graph lays from the number of regions.

A model is traced with the tiles as an input, and with what a tile computes in line, between two operators of our own
(:func:`topt_deploy.model.row_tiles.in_tiles`). So it is traced once, and nothing has to be said of what it reads from
around it: a Scan's body may read whatever the graph has computed before.
"""

import onnx
from onnx.helper import make_graph, make_node, make_tensor_value_info
from onnx.parser import parse_graph

from topt_deploy.model import row_tiles
from topt_deploy.model.row_tiles import ROWS_OF_TILE, STACK

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
    """Move what lies between a tile's rows and their stack into the body of a Scan in the place of the stack."""
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    inside: list[onnx.NodeProto] = []
    of_tiles: set[str] = set()
    """The values that the nodes inside of tiles give."""
    outside = []
    for node in graph.node:
        if _ours(node, STACK):
            outside.append(_scan(node, inside, types))
        elif _ours(node, ROWS_OF_TILE) or not of_tiles.isdisjoint(node.input):
            inside.append(node)
            of_tiles.update(node.output)
        else:
            outside.append(node)
    del graph.node[:]
    graph.node.extend(outside)


def _ours(node: onnx.NodeProto, operator: str) -> bool:
    return f"{node.domain}::{node.op_type}" == operator


def _scan(stack: onnx.NodeProto, inside: list[onnx.NodeProto], types: dict[str, int]) -> onnx.NodeProto:
    """The Scan that stands for a stack: its body is what the stack needs of the nodes inside of tiles."""
    needed = set(stack.input)
    nodes: list[onnx.NodeProto] = []
    for node in reversed(inside):
        if not needed.isdisjoint(node.output):
            needed.update(node.input)
            nodes.append(node)
    *nodes, start = nodes
    body = make_graph(
        list(reversed(nodes)),
        stack.name,
        [make_tensor_value_info(start.output[0], onnx.TensorProto.INT64, None)],
        [make_tensor_value_info(name, types[name], None) for name in stack.input],
    )
    return make_node("Scan", list(start.input), list(stack.output), name=stack.name, body=body, num_scan_inputs=1)
