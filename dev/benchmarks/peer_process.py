"""One row of dev/benchmarks/peers.py, a process in the environment of the peer: a peer's needs nothing of topt-deploy.

PYTHON peer_process.py ENGINE MODEL TOKENS OUT
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Rows = Sequence[Sequence[int]]
Encode = Callable[[Rows], Any]
PASSES, ENOUGH_S = 3, 15.0
"""The quickest of so many passes counts; a way that has taken so many seconds already is not repeated."""


def one_by_one(mean: Callable[[Sequence[int]], Any]) -> Encode:
    """A full pass for every task: the mean (H,) of the last hidden states of each."""
    return lambda rows: np.stack([mean(row) for row in rows])


def published(model: Path, dtype: str) -> Encode:
    """The research code's way, in transformers: logits and all hidden states are kept."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def mean(row: Sequence[int]) -> Any:
        return whole(torch.tensor(row)[None], output_hidden_states=True).hidden_states[-1][0].mean(0).float().numpy()

    return one_by_one(mean)


def inputs(row: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """The inputs of a feature extraction that was exported by optimum, of those that it asks for."""
    ids = np.array(row, np.int64)[None]
    known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(row))[None]}
    return {name: known[name] for name in names}


def onnxruntime(model: Path) -> Encode:
    """optimum-onnx's export in ONNX Runtime itself, which needs less memory than through optimum's class."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(next(model.glob("*.onnx")), options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    return one_by_one(lambda row: session.run(["last_hidden_state"], inputs(row, names))[0][0].mean(0))


def openvino(model: Path) -> Encode:
    """optimum-intel's export in OpenVINO itself, with OpenVINO's own settings."""
    from openvino import Core

    compiled = Core().compile_model(model / "openvino_model.xml", "CPU", {"INFERENCE_NUM_THREADS": 1})
    names = [port.any_name for port in compiled.inputs]
    return one_by_one(lambda row: compiled(inputs(row, names))["last_hidden_state"][0].mean(0))


def without_bfloat16(bundle: Path) -> Encode:
    """An encoder bundle on OpenVINO as on a processor that has no bfloat16: it asks the processor, not oneDNN."""
    import openvino as ov

    class Core(ov.Core):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    ov.Core = Core
    return ours(bundle, "openvino")


def ours(bundle: Path, engine: str) -> Encode:
    """An encoder bundle, as topt-run opens it."""
    from topt_deploy.prompts.pooling import pooled
    from topt_deploy.prompts.prompt import Prompt, TokenSequence
    from topt_deploy.runtime.prompt_encoder import open_encoder

    backend = open_encoder(bundle, engine=engine, threads=1).encoder.backend

    def encode(rows: Rows) -> Any:
        made = [TokenSequence(ids=np.array(row), positions=np.arange(len(row))[None]) for row in rows]
        return pooled(backend, [Prompt(sequences=tuple(made))])[0]

    return encode


ENGINES: dict[str, Callable[[Path], Encode]] = {
    "torch float32": lambda model: published(model, "float32"),
    "torch bfloat16": lambda model: published(model, "bfloat16"),
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "ours on onnxruntime": lambda model: ours(model, "onnxruntime"),
    "ours on openvino in float32": without_bfloat16,
    "ours on openvino": lambda model: ours(model, "openvino"),
}


def timed(encode: Encode, rows: Rows) -> tuple[float, Any]:
    """Processor seconds of the quickest pass, and its vectors."""
    seconds: list[float] = []
    while len(seconds) < PASSES and sum(seconds) < ENOUGH_S:
        began = time.process_time()
        vectors = encode(rows)
        seconds.append(time.process_time() - began)
    return min(seconds), vectors


def main() -> None:
    """Measure and write what was found."""
    engine, model, tokens, out = sys.argv[1:]
    rows: Rows = json.loads(Path(tokens).read_text())
    encode = ENGINES[engine](Path(model))
    seconds, vectors = timed(encode, rows)
    # Three full passes are three times one; what reads once what tasks have in common takes longer for the first.
    one = timed(encode, rows[:1])[0] if engine.startswith("ours") else seconds / len(rows)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    found = {"seconds": seconds, "one": one, "peak": peak, "vectors": vectors.tolist()}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
