"""OpenVINO as a backend of prompt encoders: a network with its keys and values kept once."""

import ctypes
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from topt_deploy.freed_memory import give_back_from
from topt_deploy.prompts.graph_backend import (
    PAST,
    PRESENT,
    import_openvino,
)

GROUP, MOST_SCALED_TOGETHER = 32, 256
"""Inputs that share a scale: OpenVINO's own choice, and the most that do."""
BLOCK_BYTES = 1 << 16
"""From this size on a block of memory is given back as soon as it is free."""
MADV_DONTNEED = 4


class OpenVinoNetwork:
    """A network on OpenVINO.

    A decoder's keys and values, the largest thing in memory besides the weights, are kept in the type that it computes
    in, and once: it is asked for those of new tokens alone, and they are put behind the others when they are read.

    Args:
        path: The graph, beside its weights.
        weights: The weights. OpenVINO maps them, and rearranges them to a copy of its own in the first run.
        threads: Threads within an operator; 0 leaves the choice to OpenVINO.
        precision: Of the weights. With fp32 it computes in float32, where OpenVINO would take bfloat16 on processors
            that are fast at it.
    """

    def __init__(self, path: Path, *, weights: Path, threads: int, precision: str) -> None:
        openvino = import_openvino()
        _free_at_once()
        core = openvino.Core()
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        model = core.read_model(path)
        self._tensor, self._kind = openvino.Tensor, core.get_property("CPU", "INFERENCE_PRECISION_HINT")
        if precision == "fp32":
            settings["INFERENCE_PRECISION_HINT"], self._kind = "f32", openvino.Type.f32
        elif precision == "int8":
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(_scaled_together(model))
        _new_alone(model)
        typed = openvino.preprocess.PrePostProcessor(model)
        for port in model.inputs:
            if port.any_name.startswith(PAST):
                typed.input(port.any_name).tensor().set_element_type(self._kind)
        for port in model.outputs:
            if port.any_name.startswith(PRESENT):
                typed.output(port.any_name).tensor().set_element_type(self._kind)
        compiled = core.compile_model(typed.build(), "CPU", settings)
        self.inputs = tuple(port.any_name for port in compiled.inputs)
        self._request = compiled.create_infer_request()
        self._unread: Path | None = weights

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        """Compute the named outputs."""
        past: dict[str, list[Any]] = {}
        for name, value in inputs.items():
            if name.startswith(PAST):  # parts of ours, or before the first token an array of none
                past[name] = value if isinstance(value, list) else [self._tensor(self._kind, value.shape)]
                self._request.set_tensor(name, self._joined(past[name]))
            else:
                self._request.set_tensor(name, self._tensor(value, shared_memory=True))
        self._request.infer(share_outputs=True)  # else every output would be copied, for a result that nobody reads
        if self._unread is not None:
            _let_go(self._unread)
            self._unread = None
        found: dict[str, Any] = {}
        for name in outputs:
            output = self._request.get_tensor(name)
            if name.startswith(PRESENT):
                new = self._tensor(self._kind, output.shape)
                output.copy_to(new)
                found[name] = [*past[name.replace(PRESENT, PAST, 1)], new]
            else:
                found[name] = output.data.copy()
        return found

    def _joined(self, parts: list[Any]) -> Any:
        """One tensor (B, K, P, D) of the parts, which takes their place in the list, so that nothing is kept twice."""
        if len(parts) > 1:
            b, k, _, d = parts[0].shape
            whole = self._tensor(self._kind, (b, k, sum(part.shape[2] for part in parts), d))
            np.concatenate([part.data for part in parts], axis=2, out=whole.data)
            parts[:] = [whole]
        return parts[0]


def _scaled_together(model: Any) -> int:
    """The number of inputs of a linear map that share a scale, if the processor multiplies in 8 bits (VNNI, no AMX).

    With OpenVINO's 32 a sixth of the time goes into scales. A divisor of every map's inputs: others are slower.
    """
    weights = [op.input_value(1).get_partial_shape() for op in model.get_ops() if op.get_type_name() == "MatMul"]
    widths = [weight[0].get_length() for weight in weights if weight.is_static and len(weight) == 2]
    common = math.gcd(*widths)
    return max((size for size in range(GROUP, MOST_SCALED_TOGETHER + 1) if common % size == 0), default=GROUP)


def _let_go(path: Path) -> None:
    """Take a mapped file's pages out of this process's memory; whoever touches one gets it from the file again."""
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.exists() else ():
        ends, rights, *_, name = line.split(maxsplit=5)
        if name == str(path.resolve()) and rights.startswith("r--"):  # never written to: nothing is lost
            start, stop = (int(end, 16) for end in ends.split("-"))
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_DONTNEED)


def _new_alone(model: Any) -> None:
    """Have a decoder put out new tokens' keys and values, which its graph puts behind the past ones to attend to."""
    for result in model.get_results():
        everything = result.input_value(0)
        names = everything.get_names()
        if any(name.startswith(PRESENT) for name in names):
            _, new = everything.get_node().input_values()
            everything.get_tensor().set_names(set())
            new.get_tensor().set_names(names)
            result.input(0).replace_source_output(new)


def _free_at_once() -> None:
    """Have glibc give blocks back to the system as soon as they are freed.

    A decoder's tensors grow with every call; glibc would keep the smaller ones, a third of the memory in the end.
    """
    give_back_from(BLOCK_BYTES)
