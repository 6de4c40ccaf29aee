"""Accuracy and speed of every precision on both backends, by instruction set: docs/background/instruction-sets.md.

    python dev/benchmarks/instruction_sets.py        # adds this processor's columns; ten minutes on a quiet machine

Columns of other processors stay as they are. SmolLM2 and its bundles are made in build/peers, and measured, as
dev/benchmarks/peers.py does it: a process of its own for each figure, on one thread.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path

from page_sections import joined, read_section, this_processor, write_section
from peers import (
    CHECKPOINT,
    FOUND,
    PUBLISHED,
    ROOT,
    ROWS,
    TOKENS,
    WORK,
    make,
    make_tokens,
    measure,
    smallest_cosine,
)

from topt_deploy.runtime.processor import instruction_sets

PAGE = ROOT / "docs/background/instruction-sets.md"
HELD = {"AVX-512": ("AVX512_CORE", "avx512_vnni"), "AVX-512 VNNI": ("AVX512_CORE_VNNI", "avx512_bf16")}
"""Lower sets to which OpenVINO can be held with weights of few bits: oneDNN's name of each, and what a processor
has that has more. Held to AVX2, OpenVINO still plans for AVX-512 and finds no kernel; its products in float32 and ONNX
Runtime's are MLAS's, which asks the processor itself."""
WITHOUT_BFLOAT16 = "ours on openvino in float32"


def limits() -> Iterator[tuple[str, Mapping[str, str]]]:
    """The processor as it is, and the lower instruction sets that it can be held to: name and environment."""
    yield "", {}
    known = instruction_sets() or frozenset()
    for name, (isa, more) in HELD.items():
        if more in known:
            yield name, {"ONEDNN_MAX_CPU_ISA": isa}


def cells(held: str, environment: Mapping[str, str], services: Path) -> dict[str, str]:
    """One column: the smallest cosine and the processor seconds of every row that the limit concerns."""
    FOUND.mkdir(exist_ok=True)
    exact = FOUND / f"{PUBLISHED}.json"
    if not exact.exists():
        measure(ROWS[PUBLISHED], CHECKPOINT, exact)
    published = json.loads(exact.read_text())
    column = {"measured on": str(date.today())}
    if not held:
        column["published, float32"] = f"{published['seconds']:.2f} s"
    for name, row in ROWS.items():
        if not row.ours or (held and not ("OpenVINO" in name and "int" in name)):
            continue
        row = replace(row, engine=WITHOUT_BFLOAT16) if held else row
        out = FOUND / f"{name}{held and f', held to {held}'}.json"
        if not out.exists():
            measure(row, make(row.model, services), out, **environment)
        found = json.loads(out.read_text())
        cosine = smallest_cosine(found["vectors"], published["vectors"])
        column[name.removeprefix("ours, ")] = f"{cosine:.5f}, {found['seconds']:.2f} s"
        print(held, name, column[name.removeprefix("ours, ")], flush=True)
    return column


def main() -> None:
    """Measure this processor and write its columns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--services", type=Path, default=ROOT / ".services", help="folder of `make services`")
    services = parser.parse_args().services
    WORK.mkdir(parents=True, exist_ok=True)
    make(CHECKPOINT.name, services)
    if not TOKENS.exists():
        make_tokens()
    processor = this_processor()
    own = {}
    for held, environment in limits():
        own[f"{processor}{held and f', held to {held}'}"] = cells(held, environment, services)
    write_section(PAGE, "table", joined(read_section(PAGE, "table"), own, processor))


if __name__ == "__main__":
    main()
