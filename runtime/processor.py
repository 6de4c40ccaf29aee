"""The processor's instruction sets, as far as the result of a graph depends on them."""

import platform
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
X86 = frozenset({"x86_64", "amd64", "i686", "i386", "x86"})
VNNI = frozenset({"avx512_vnni", "avx_vnni"})
"""Names that Linux gives to the instructions that add products of 8-bit numbers in 32 bits. Processors with AMX have
the first of them."""

DECIDING = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
"""Instruction sets between which ONNX Runtime's and OpenVINO's kernels for few bits differ, from the oldest on."""


@cache
def instruction_sets() -> frozenset[str] | None:
    """Return the names of the processor's instruction sets as Linux lists them; None where the system does not say."""
    if not CPUINFO.is_file():
        return None
    for line in CPUINFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return None


def saturates_8_bit_sums() -> bool:
    """Tell whether ONNX Runtime may add pairs of 8-bit products in 16 bits here, which cuts off large sums.

    It does so on x86 processors without VNNI. On an x86 processor whose instruction sets the system does not tell,
    the answer is yes.
    """
    if platform.machine().lower() not in X86:
        return False
    known = instruction_sets()
    return known is None or not known & VNNI


def deciding_sets() -> tuple[str, ...] | None:
    """Return those of the processor's instruction sets that 8-bit products depend on; None where it is not known."""
    known = instruction_sets()
    return None if known is None else tuple(name for name in DECIDING if name in known)


def processor_name() -> str:
    """Return the processor's name and the instruction sets that 8-bit products depend on, for people."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, platform.machine())} ({', '.join(deciding_sets() or ()) or 'instruction sets not known'})"
