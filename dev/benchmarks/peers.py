"""The prompt encoder beside its peers on the same weights and text: writes tables of docs/background/peers.md.

    python dev/benchmarks/peers.py                      # an hour on a quiet machine; goes on where it was stopped
    python dev/benchmarks/peers.py --only openvino      # rows with this in their names are measured anew

SmolLM2 comes out of the services' folder (`make services`). Every peer has an environment of its own in build/peers,
made here, and every figure is of a process of its own on one thread.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from encoder import TASKS, child, long_text
from page_sections import read_section, this_processor, with_part, write_section

from topt_deploy.runtime.processor import VNNI, instruction_sets

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
WORK = ROOT / "build" / "peers"
PAGE = ROOT / "docs/background/peers.md"
FOUND, TOKENS = WORK / "found", WORK / "tokens.json"
CHECKPOINT = WORK / "SmolLM2-135M-Instruct"
OLDER = WORK / "SmolLM2-for-transformers-4"
OPTIMUM = ("-m", "optimum.commands.optimum_cli")
TORCH = "torch==2.13.0"
PYTHON_PEERS = {  # by environment: what pip installs
    "optimum-onnx": ("optimum-onnx==0.1.0", "onnxruntime==1.31.1", TORCH),
    "optimum-intel": ("optimum-intel[openvino]==2.2.0", TORCH),
}
LLAMA_CPP = ("node-llama-cpp@3.21.1", "@node-llama-cpp/linux-x64@3.21.1")
PUBLISHED = "published, float32"
Measured = dict[str, dict[str, Any]]
"""By row: seconds, one (task's seconds), peak in bytes, vectors (T, H)."""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        engine: Of peer_process.py, or "llama.cpp".
        model: What it runs, in build/peers.
        environment: Of :data:`PYTHON_PEERS`, or "" for this one.
        options: More arguments.
    """

    engine: str
    model: str
    environment: str = ""
    options: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        """True of an encoder bundle."""
        return self.engine.startswith("ours")


ROWS = {
    PUBLISHED: Row("torch float32", CHECKPOINT.name),
    "published, bfloat16": Row("torch bfloat16", CHECKPOINT.name),
    "llama.cpp Q8_0": Row("llama.cpp", "Q8_0.gguf"),
    "llama.cpp Q8_0, flash attention": Row("llama.cpp", "Q8_0.gguf", options=("flash",)),
    "llama.cpp Q4_0": Row("llama.cpp", "Q4_0.gguf"),
    "llama.cpp Q4_0, flash attention": Row("llama.cpp", "Q4_0.gguf", options=("flash",)),
    "llama.cpp Q4_1, the shipped file": Row("llama.cpp", "Q4_1.gguf"),
    "llama.cpp Q4_1, flash attention": Row("llama.cpp", "Q4_1.gguf", options=("flash",)),
    **{f"optimum-onnx {p}": Row("onnxruntime", f"optimum-onnx-{p}", "optimum-onnx") for p in ("fp32", "int8")},
    **{f"optimum-intel {p}": Row("openvino", f"optimum-intel-{p}", "optimum-intel") for p in ("fp32", "int8", "int4")},
    **{
        f"ours, {name} {p}": Row(f"ours on {engine}", f"{CHECKPOINT.name}-{p}.topt")
        for name, engine in (("ONNX Runtime", "onnxruntime"), ("OpenVINO", "openvino"))
        for p in ("fp32", "fp16", "int8", "int4")
    },
}


def run(*command: object, **environment: str) -> None:
    """Run a command on one thread, without a network of models."""
    ours = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    subprocess.run([str(part) for part in command], env=ours, check=True, stdout=sys.stderr)


def python_of(environment: str) -> Path:
    """An environment's Python; the environment is made if it is not there."""
    folder = WORK / environment
    if not environment:
        return Path(sys.executable)
    if not (folder / "made").exists():
        shutil.rmtree(folder, ignore_errors=True)
        run(sys.executable, "-m", "venv", folder)
        run(folder / "bin/python", "-m", "pip", "install", "--quiet", *PYTHON_PEERS[environment])
        # PyPI's torchvision is built for CUDA's torch and does not load with another; a text model needs none.
        run(folder / "bin/python", "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision")
        (folder / "made").touch()
    return folder / "bin/python"


def llama_cpp() -> Path:
    """The folder of node-llama-cpp, whose binaries are in a package of their own: nothing else is downloaded."""
    folder = WORK / "node-llama-cpp"
    if not (folder / "made").exists():
        quiet = ("--silent", "--no-audit", "--ignore-scripts", "--omit=optional")
        run("npm", "install", *quiet, "--prefix", folder, *LLAMA_CPP)
        (folder / "made").touch()
    return folder


def recoded(source: Path, out: Path, kind: str) -> None:
    """Write a GGUF file's linear maps and embeddings in another format, as llama.cpp's own tool rounds them."""
    import gguf

    reader, wanted = gguf.GGUFReader(source), gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            array = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=array)
    for tensor in reader.tensors:
        keep = tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0)
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        data = tensor.data if keep else gguf.quants.quantize(numbers, wanted)
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type if keep else wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def for_transformers_4(out: Path) -> None:
    """Copy the checkpoint, and say for transformers 4, too, what only transformers 5 reads where it stands."""
    shutil.copytree(CHECKPOINT, out)
    for name, more in (
        ("config.json", lambda c: {"rope_theta": c["rope_parameters"]["rope_theta"]}),
        ("tokenizer_config.json", lambda c: {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        content = json.loads((out / name).read_text())
        (out / name).write_text(json.dumps(content | more(content)))


def make(model: str, services: Path) -> Path:
    """Make the model of a row by the peer's own command, as its documentation has it, unless it is there."""
    path = WORK / model
    if path.exists():
        return path
    out = WORK / f"unfinished-{model}"  # which gets its name when it is whole
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    if path == CHECKPOINT:
        run(sys.executable, ROOT / "scripts/smollm2.py", out, PYTHONPATH=str(services / "smollm2"))
    elif path == OLDER:
        for_transformers_4(out)
    elif path.suffix == ".gguf":
        source = next((services / "smollm2").resolve().glob("**/*Q4_1.gguf"))
        out.symlink_to(source) if path.stem == "Q4_1" else recoded(source, out, path.stem)
    elif path.suffix == ".topt":
        child("--export", CHECKPOINT, out, path.stem.rpartition("-")[2])
    else:
        run(*export_command(model, services), out)
    out.rename(path)
    return path


def export_command(model: str, services: Path) -> tuple[object, ...]:
    """optimum's command, up to the folder that it writes."""
    peer, _, precision = model.rpartition("-")
    if model == "optimum-onnx-int8":
        form = "--avx512_vnni" if (instruction_sets() or frozenset()) & VNNI else "--avx2"
        whole = make("optimum-onnx-fp32", services)
        return (python_of(peer), *OPTIMUM, "onnxruntime", "quantize", "--onnx_model", whole, form, "-o")
    asked: tuple[object, ...] = ("--model", make(OLDER.name, services), "--task", "feature-extraction")
    if peer == "optimum-onnx":
        return (python_of(peer), *OPTIMUM, "export", "onnx", *asked)
    asked += ("--weight-format", precision)
    if precision == "int4":
        asked += ("--group-size", "64")  # 576 inputs are no multiple of 128, the size of a group by default
    return (python_of(peer), *OPTIMUM, "export", "openvino", *asked)


def make_tokens() -> None:
    """Write the token ids of every task's input, which all rows read."""
    from topt_deploy.prompts.pytorch.checkpoint import open_checkpoint
    from topt_deploy.prompts.templates import load_templates

    checkpoint = open_checkpoint(str(CHECKPOINT))
    host = checkpoint.spec.host(checkpoint.tokenizer)
    questions = [load_templates(None).question(task) for task in TASKS]
    prompt = host.prompt(long_text(host), (), questions)
    TOKENS.write_text(json.dumps([sequence.ids.tolist() for sequence in prompt.sequences]))


def measure(row: Row, model: Path, out: Path, **environment: str) -> None:
    """One row's process, which writes ``out``."""
    if row.engine == "llama.cpp":
        run("node", HERE / "peer_llama_cpp.mjs", llama_cpp(), model, TOKENS, out, *row.options, **environment)
    else:
        run(python_of(row.environment), HERE / "peer_process.py", row.engine, model, TOKENS, out, **environment)


def smallest_cosine(vectors: Iterable[Any], exact: Iterable[Any]) -> float:
    """The smallest cosine of two tables of vectors (T, H), row by row."""
    a, b = np.array(vectors, float), np.array(exact, float)
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def table(found: Measured, rows: Mapping[str, Row]) -> list[str]:
    """The table of all rows, and the one of :func:`beside`."""
    base = found[PUBLISHED]
    cosine = {name: round(smallest_cosine(cell["vectors"], base["vectors"]), 5) for name, cell in found.items()}
    lines = [
        "| | seconds | speed | one task, seconds | peak memory | of published | smallest cosine |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in filter(found.__contains__, rows):
        cell = found[name]
        lines.append(
            f"| {name} | {cell['seconds']:.2f} | {base['seconds'] / cell['seconds']:.1f} | {cell['one']:.2f} "
            f"| {cell['peak'] / 1e6:,.0f} MB | {cell['peak'] / base['peak']:.2f} | {cosine[name]:.5f} |"
        )
    return [*lines, "", *beside(found, rows, cosine)]


def beside(found: Measured, rows: Mapping[str, Row], cosine: Mapping[str, float]) -> list[str]:
    """A table of each peer, the fastest first, beside the fastest of ours at no lower cosine."""
    seconds = {name: cell["seconds"] for name, cell in found.items()}
    ours = sorted((name for name in found if rows[name].ours), key=seconds.__getitem__)
    peers = sorted((n for n in found if not rows[n].ours and n != PUBLISHED), key=seconds.__getitem__)
    lines = [
        "| peer | cosine | the fastest of ours that is no less exact | cosine | times as fast |",
        "|---|---|---|---|---|",
    ]
    for peer in [*peers, PUBLISHED]:
        exact = next((name for name in ours if cosine[name] >= cosine[peer] or peer == PUBLISHED), None)
        own = ("none", "–", "–") if exact is None else (
            exact.removeprefix("ours, "), f"{cosine[exact]:.5f}", f"{seconds[peer] / seconds[exact]:.1f}"
        )  # fmt: skip
        named = f"{peer} (beside any of ours)" if peer == PUBLISHED else peer
        lines.append(f"| {named} | {cosine[peer]:.5f} | {' | '.join(own)} |")
    return lines


def main() -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--services", type=Path, default=ROOT / ".services", help="folder of `make services`")
    parser.add_argument("--only", metavar="TEXT", help="measure these rows anew, and no others")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    make(CHECKPOINT.name, arguments.services)
    if not TOKENS.exists():
        make_tokens()
    FOUND.mkdir(exist_ok=True)
    files = {name: FOUND / f"{name}.json" for name in ROWS}
    for name, row in ROWS.items():
        if arguments.only not in name if arguments.only else files[name].exists():
            continue
        measure(row, make(row.model, arguments.services), files[name])
        print(name, flush=True)
    found: Measured = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    if PUBLISHED not in found:
        raise SystemExit(f"nothing to compare with: {PUBLISHED!r} has not been measured")
    days = sorted({str(date.fromtimestamp(files[name].stat().st_mtime)) for name in found})
    lengths = [len(row) for row in json.loads(TOKENS.read_text())]
    lines = [
        f"Measured by `make peers` on {' and '.join(days)}. {len(lengths)} tasks of {min(lengths):,} to "
        f"{max(lengths):,} tokens.",
        "",
        *table(found, ROWS),
    ]
    write_section(PAGE, "table", with_part(read_section(PAGE, "table"), this_processor(), "\n".join(lines)))


if __name__ == "__main__":
    main()
