"""What the processor's flags say of sums of 8-bit products."""

import platform

import pytest

from topt_deploy.runtime import processor


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    """Pretend to be a processor with a machine name and Linux's line of flags."""

    def pretend(machine, text):
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
        if text is not None:
            (tmp_path / "cpuinfo").write_text(text)
        processor.instruction_sets.cache_clear()

    yield pretend
    processor.instruction_sets.cache_clear()


@pytest.mark.parametrize(
    ("machine", "text", "saturates"),
    [
        ("x86_64", "model name\t: AMD EPYC\nflags\t\t: sse2 avx avx2 fma\n", True),
        ("x86_64", "flags\t\t: avx2 avx512f avx512bw\n", True),
        ("x86_64", "flags\t\t: avx2 avx512f avx512_vnni\n", False),
        ("x86_64", "flags\t\t: avx2 avx_vnni\n", False),
        ("AMD64", None, True),
        ("x86_64", "nothing that Linux would say\n", True),
        ("aarch64", "Features\t: fp asimd asimddp\n", False),
        ("arm64", None, False),
    ],
)
def test_who_cuts_off_sums(cpuinfo, machine, text, saturates):
    cpuinfo(machine, text)
    assert processor.saturates_8_bit_sums() is saturates


def test_the_name_says_what_8_bit_products_depend_on(cpuinfo):
    cpuinfo("x86_64", "model name\t: AMD EPYC\nflags\t\t: sse2 avx2 avx_vnni\n")
    assert processor.processor_name() == "AMD EPYC (avx2, avx_vnni)"
