"""Exported graphs of a test's own, run by the runtime's ONNX Runtime, and their faults."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx.helper import make_node

from topt_deploy.export.onnx_graph import WEIGHTS, Graph
from topt_deploy.runtime.backends.onnxruntime import MappedSession


def run_graph(graph: Graph, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a city's graph puts out, from its two files; by task."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "topt.onnx"
        path.write_bytes(graph.model)
        path.with_name(WEIGHTS).write_bytes(graph.weights)
        session = MappedSession(path)
        outputs = [value.name for value in onnx.load_model_from_string(graph.model).graph.output]
        return session.run({name: inputs[name] for name in session.inputs}, outputs)


def weights_rotated(graph: Graph) -> Graph:
    """The manifest's list gives every weight the place of the next one of its shape; graph and weights are right."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, (_, shape) in graph.initializers.items():
        alike.setdefault(tuple(shape), []).append(name)
    places = dict(graph.initializers)
    for names in alike.values():
        for name, following in zip(names, [*names[1:], names[0]], strict=True):
            places[name] = graph.initializers[following]
    assert places != graph.initializers
    return Graph(model=graph.model, weights=graph.weights, initializers=places)


def second_tile_off_by_one(graph: Graph) -> Graph:
    """Every tile but the first begins one row too late; what fits into one tile is right."""
    proto = onnx.load_model_from_string(graph.model)
    nodes = proto.graph.node
    (place,) = (i for i, node in enumerate(nodes) if "tiles/starts" in node.output)
    nodes[place].output[0] = "tiles/right"
    nodes.insert(place + 1, make_node("Min", ["tiles/right", "tiles/one"], ["tiles/late"]))
    nodes.insert(place + 2, make_node("Add", ["tiles/right", "tiles/late"], ["tiles/starts"]))
    return Graph(model=proto.SerializeToString(), weights=graph.weights, initializers=graph.initializers)


def scales_of_other_channels(bundle: Path) -> None:
    """Every scale of an encoder's 8-bit weights becomes its neighbour's, in both forms."""
    for file in bundle.glob("decoder.*.onnx"):
        proto = onnx.load(file, load_external_data=False)
        scales = [tensor for tensor in proto.graph.initializer if tensor.name.endswith(".scale")]
        assert scales
        for tensor in scales:
            tensor.raw_data = np.roll(np.frombuffer(tensor.raw_data, np.float32), 1).tobytes()
        file.write_bytes(proto.SerializeToString())


def stale_question(record: dict[str, Any]) -> None:
    """A manifest's first question is another one than the vectors were made with."""
    task = next(iter(record["templates"]["tasks"].values()))
    task["question"] = task["question"][:-1] + " at night?"


def stale_wording(record: dict[str, Any]) -> None:
    """A manifest's texts are worded otherwise than those that the vectors were made with."""
    record["templates"]["geo_text"]["coordinates"] = "Centre: {lat}, {lon}"
