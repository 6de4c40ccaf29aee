"""The demo city's prompt vectors, which `topt-deploy sample` takes from train/datasets/sample_prompts.npz, made anew.

    python scripts/smollm2.py models/SmolLM2-135M-Instruct
    python scripts/demo_prompts.py models/SmolLM2-135M-Instruct

To be run after any change of the demo's texts or of the shipped templates: tests/train/datasets/test_sample.py tells.
In float32 in PyTorch on one thread of the CPU; two to five minutes.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from topt_deploy.progress import ProgressBar
from topt_deploy.prompts.encode import encode
from topt_deploy.prompts.pytorch.checkpoint import open_checkpoint
from topt_deploy.prompts.pytorch.load import torch_encoder
from topt_deploy.prompts.table import read_regions
from topt_deploy.prompts.templates import load_templates
from topt_deploy.train.datasets.sample import make_sample
from topt_deploy.train.datasets.sample_prompts import FILE, store_prompts
from topt_deploy.train.datasets.sample_recipe import TASKS

OUT = Path(__file__).resolve().parents[1] / "train" / "datasets" / FILE


def main() -> None:
    """Encode the default demo city and store its vectors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder of scripts/smollm2.py.")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    templates = load_templates()
    encoder = torch_encoder(open_checkpoint(options.model), device="cpu", precision="fp32")
    with TemporaryDirectory() as folder:
        city = make_sample(Path(folder)).out
        regions = read_regions(city / "regions.parquet", templates.wording)
    with ProgressBar() as progress:
        done = encode(regions, encoder, templates, list(TASKS), root=Path(), progress=progress)
    vectors = {task: done.table[f"prompt_{task}"].combine_chunks().flatten().to_numpy() for task in TASKS}
    store_prompts(
        options.out,
        regions.texts,
        {task: templates.sha256(task) for task in TASKS},
        {task: flat.reshape(len(regions), -1) for task, flat in vectors.items()},
        encoder=encoder.spec.identity,
        precision=encoder.precision,
    )
    print(f"{options.out}: {len(regions)} regions, {options.out.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
