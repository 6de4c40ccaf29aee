"""Check what this project promises of a GPU, on a machine with one, in nine minutes at most: make gpu-check.

    python3 dev/benchmarks/gpu_check.py                       # all of it; writes gpu-report.json and gpu-report.md
    python3 dev/benchmarks/gpu_check.py --write-docs          # and puts the table into docs/reference/status.md
    python3 dev/benchmarks/gpu_check.py --device cpu --size tiny        # the script itself, without a GPU

It runs from a checkout, whether the project is installed or not, and needs PyTorch; every part names what else it
needs, and is skipped by name where that is absent. Every part is a process of its own with a time of its own.
One file: every part of the check is a process of this very file, which has to be copied to the machine with the GPU.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/reference/status.md"
BEGIN, END = "<!-- gpu-check: begin -->", "<!-- gpu-check: end -->"
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
TASKS = ("crime", "check_in", "service_call")
EXPECTED = "expected.npy"
"""The encoder's vectors by PyTorch on the CPU."""
TOTAL_S = 530.0
"""All parts together, below nine minutes."""
LEAST_S = 15.0
"""With less left, a part is not begun."""
PREDICTIONS = 1e-3
"""Relative difference of predictions allowed between CUDA and the CPU."""
COSINE = 0.999
TRAINED = {"fp32": 0.02, "tf32": 0.05, "bf16": 0.15, "compiled": 0.05}
"""Relative difference of a trained stage's predictions from the CPU's: a training amplifies how sums are rounded."""
TARGETS = {1: 2.0, 3: 5.0}
"""Times as fast as the published way, by number of tasks."""
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "regions": 120, "epochs": 100, "presets": ("default", "srel"), "tasks": TASKS, "settings": (),
        "tokens": 2000, "repeats": 5,
        "sizes": {  # Qwen2.5-0.5B's proportions
            "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
            "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True,
        },
    },
    "tiny": {
        "regions": 24, "epochs": 3, "presets": ("default",), "tasks": ("crime",), "tokens": 60, "repeats": 1,
        "settings": ("ensemble.features=8", "ensemble.steps=3", "ensemble.members=1", "prompt4re.folds=3"),
        "sizes": {
            "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": 1024,
        },
    },
}  # fmt: skip
"""The work at each size."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: What.
        status: passed, failed or skipped.
        reason: Why it was skipped, or what was wrong.
        figures: What was measured.
    """

    name: str
    status: str
    reason: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, good: bool, reason: str = "", **figures: Any) -> "Check":
        """Passed or failed; the reason is of a failure."""
        return cls(
            name=name, status=PASSED if good else FAILED, reason="" if good else reason or "beyond the limit",
            figures=figures,
        )  # fmt: skip

    @classmethod
    def skipped(cls, name: str, reason: str) -> "Check":
        """Skipped, and why."""
        return cls(name=name, status=SKIPPED, reason=reason)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a part computes, and how much.

    Attributes:
        device: ``cuda`` or ``cpu``.
        size: Of :data:`SIZES`.
        work: A folder that the parts share.
    """

    device: str
    size: str
    work: Path

    def __getitem__(self, name: str) -> Any:
        return SIZES[self.size][name]

    @property
    def judged(self) -> bool:
        """True if speed is judged: at tiny sizes it means nothing."""
        return self.size == "full"


def bootstrap() -> None:
    """Make the stages importable as they are once installed, from a checkout that is not."""
    sys.path.insert(0, str(ROOT))
    sys.path.append(str(ROOT / "tests" / "support"))
    import topt_deploy

    if find_spec("topt_deploy.train") is None:
        topt_deploy.__path__.append(str(ROOT))


def command(*arguments: object) -> None:
    """Run a command of ours in this process; its errors are raised."""
    from topt_deploy.cli import cli

    cli.main([str(argument) for argument in arguments], standalone_mode=False)


# --- training


def train(setting: Setting) -> Iterator[Check]:
    """Both stages on the device, in every precision, against the CPU's result, without dropout: devices draw apart."""
    import numpy as np
    import torch

    from topt_deploy.config.load import load_config
    from topt_deploy.data.city import infer_schema, read_city
    from topt_deploy.data.features import features
    from topt_deploy.model.topt import all_features
    from topt_deploy.train.ensemble import train_ensemble
    from topt_deploy.train.loop import TrainingDevice, Workplace
    from topt_deploy.train.progress import Reporter
    from topt_deploy.train.prompt4re import fold_of, train_head, training_sets
    from topt_deploy.train.srel import embed, train_embedding

    folder = _city(setting)
    epochs = [f"{part}.epochs={setting['epochs']}" for part in ("srel", "prompt4re", "ensemble")]
    still = ["srel.dropout=0", "prompt4re.dropout=0", "ensemble.dropout=0", "ensemble.input_dropout=0"]
    overrides = [*epochs, *still, *setting["settings"]]
    config = load_config(preset="srel", tasks=["crime"], overrides=overrides)
    # Both stages are compared by themselves: the ensemble goes without them.
    forest = load_config(preset="default", tasks=["crime"], overrides=[*overrides, "ensemble.topt=false"])
    columns = ["prompt_crime"]
    regions, mobility = folder / "regions.parquet", folder / "mobility.parquet"
    schema = infer_schema(regions, views=config.views, mobility=True, prompts=columns)
    city = read_city(regions, mobility, schema, labels=["crime"])
    labels = training_sets(city.labels["crime"], fold_of(city.labels["crime"], folds=10, seed=0, drop_zeros=False))

    def run(engine: TrainingDevice) -> tuple[Mapping[str, Any], float]:
        inputs = {name: torch.tensor(values, device=engine.device) for name, values in features(city).items()}
        place = Workplace(engine=engine, reporter=Reporter(quiet=True))
        prompts = inputs["prompt_crime"]
        began = time.perf_counter()
        if engine.compile:  # the networks alone: a compiler takes minutes over an attention's gradient
            ensemble = train_ensemble(inputs, schema, prompts, labels, forest, "crime", place)
            return {"ensemble": ensemble.predicted}, time.perf_counter() - began
        srel = train_embedding(city, inputs, schema, config, config.embedding_of("crime"), place)
        found = {"embedding": embed(srel, inputs).cpu().numpy()}
        embedding = torch.tensor(found["embedding"], device=engine.device)
        head = train_head(embedding, all_features(inputs, schema), prompts, labels, config, "crime", place)
        ensemble = train_ensemble(inputs, schema, prompts, labels, forest, "crime", place)
        found |= {"prompt4re": head.predicted, "ensemble": ensemble.predicted}
        return found, time.perf_counter() - began

    def apart(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
        size = {name: np.linalg.norm(values - values.mean()) for name, values in expected.items()}
        return {name: float(np.linalg.norm(found[name] - expected[name]) / size[name]) for name in found}

    torch.set_num_threads(1)  # more are slower with so few regions
    expected, base_s = run(TrainingDevice(device=torch.device("cpu")))
    yield Check.of("training on the CPU", True, seconds=round(base_s, 1))
    device, cuda = torch.device(setting.device), setting.device == "cuda"
    ways: dict[str, tuple[str, TrainingDevice]] = {
        "fp32, steps as they are": ("fp32", TrainingDevice(device=device)),
        "fp32, captured steps": ("fp32", TrainingDevice(device=device, capture=True)),
        "tf32, captured steps": ("tf32", TrainingDevice(device=device, precision="tf32", capture=True)),
        "bf16, captured steps": ("bf16", TrainingDevice(device=device, precision="bf16", capture=cuda)),
        "fp32, networks compiled and captured": ("compiled", TrainingDevice(device=device, compile=True, capture=True)),
    }
    for way, (limit, engine) in ways.items():
        name = f"training: {way}"
        if not cuda and (engine.capture or engine.compile):
            yield Check.skipped(name, "needs CUDA")
            continue
        with _faults(name) as fault:
            found, seconds = run(engine)
            error = apart(found, expected)
            figures = {"seconds": round(seconds, 1), **{f"apart_{k}": round(v, 5) for k, v in error.items()}}
            worst = max(v for k, v in error.items() if k != "embedding")  # which may turn as a whole
            yield Check.of(name, worst <= TRAINED[limit], f"more than {TRAINED[limit]} apart", **figures)
        yield from fault


# --- the fused model


def fused(setting: Setting) -> Iterator[Check]:
    """The fused model of both presets on the device, against PyTorch on the CPU."""
    from topt_deploy.runtime import load

    for preset in setting["presets"]:
        name = f"fused model, preset {preset}, on {setting.device}"
        with _faults(name) as fault:
            folder, run = _run(setting, preset)
            command("export", run, "--format", "onnx", "--out", folder / f"{preset}.topt")
            began = time.perf_counter()
            city = load(folder / f"{preset}.topt", device=setting.device)
            yield _predicted(name, city, folder, run, open_s=round(time.perf_counter() - began, 2))
        yield from fault


def _predicted(name: str, city: Any, folder: Path, run: Path, **figures: Any) -> Check:
    """A loaded bundle's predictions of the training city against those of PyTorch on the CPU."""
    import numpy as np

    from topt_deploy.model.checkpoint import load_model, load_tensors
    from topt_deploy.model.topt import predict
    from topt_deploy.run_folder import INPUTS_FILE, MODEL_FILE

    tables = (folder / "regions.parquet", folder / "mobility.parquet")
    city.predict(*tables)
    began = time.perf_counter()
    table = city.predict(*tables, wide=True).sort_by("region_id")
    seconds = time.perf_counter() - began
    error, ranks = 0.0, True
    model = load_model(run / MODEL_FILE)
    outputs = predict(model, load_tensors(run / INPUTS_FILE)[0])
    for task in model.spec.config.tasks:
        expected, found = outputs[task].numpy(), table.column(task).to_numpy()
        error = max(error, float((abs(found - expected) / np.maximum(abs(expected), 1)).max()))
        ranks &= _same_ranking(found, expected)
    return Check.of(
        name, error <= PREDICTIONS and ranks, "predictions differ", relative_difference=error, same_ranking=ranks,
        predict_s=round(seconds, 4), **figures,
    )  # fmt: skip


def _same_ranking(found: Any, expected: Any) -> bool:
    """True if regions are in the same order, except those that differ by less than the limit."""
    import numpy as np

    ordered = np.asarray(found)[np.argsort(expected, kind="stable")]
    return bool((np.diff(ordered) >= -2 * PREDICTIONS * np.maximum(1, abs(ordered[1:]))).all())


# --- the prompt encoder


def encoder(setting: Setting) -> Iterator[Check]:
    """The prompt encoder in half precision on the device, against PyTorch in float32 on the CPU."""
    import numpy as np

    from topt_deploy.prompts.pooling import pooled
    from topt_deploy.prompts.pytorch.checkpoint import open_checkpoint
    from topt_deploy.prompts.pytorch.load import torch_backend

    model = _decoder(setting)
    checkpoint = open_checkpoint(str(model))
    prompt = _prompt(checkpoint.spec.host(checkpoint.tokenizer), setting)
    expected = pooled(torch_backend(checkpoint, device="cpu", precision="fp32"), [prompt])[0]
    np.save(setting.work / EXPECTED, expected)
    half = "fp16" if setting.device == "cuda" else "bf16"
    name = f"prompt encoder, PyTorch {half} on {setting.device}"
    with _faults(name) as fault:
        cosine = _cosine(
            pooled(torch_backend(checkpoint, device=setting.device, precision=half), [prompt])[0], expected
        )
        yield Check.of(name, cosine >= COSINE, cosine=round(cosine, 6))
    yield from fault
    name = f"prompt encoder, ONNX Runtime fp16 on {setting.device}"
    with _faults(name) as fault:
        opened = _opened(setting, setting.device)
        cosine = _cosine(opened.encoder.vectors([prompt])[0], expected)
        yield Check.of(name, cosine >= COSINE, cosine=round(cosine, 6))
    yield from fault


def engines(setting: Setting) -> Iterator[Check]:
    """Engines of TensorRT and of TensorRT-RTX, of the fused model and of the prompt encoder: built, and run."""
    import numpy as np
    import torch

    if setting.device != "cuda":
        for flavour in ("tensorrt", "rtx"):
            yield Check.skipped(f"engines of {flavour}", "needs CUDA")
        return
    from topt_deploy.errors import NoDevice
    from topt_deploy.runtime import load
    from topt_deploy.runtime.prompt_encoder import open_encoder
    from topt_deploy.tensorrt.library import find_library

    folder, run = _run(setting, "default")
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    for flavour in ("tensorrt", "rtx"):
        name, own = f"engines of {flavour}", ("--capability", capability) if flavour == "rtx" else ()
        try:
            library = find_library(flavour)
        except NoDevice as error:
            yield Check.skipped(name, error.message)
            continue
        with _faults(name) as fault:
            out = folder / f"{flavour}.topt"
            began = time.perf_counter()
            command(
                "export", run, "--format", "trt", "--flavour", flavour, "--precision", "fp32", *own, "--out", out
            )  # fmt: skip
            built = time.perf_counter() - began
            began = time.perf_counter()
            city = load(out, device="tensorrt")
            figures = {"version": library.version, "export_s": round(built, 1)}
            yield _predicted(name, city, folder, run, **figures, open_s=round(time.perf_counter() - began, 1))
        yield from fault
        name = f"prompt encoder, {flavour} fp16"
        with _faults(name) as fault:
            place, model = _engines_of(setting, flavour), _decoder(setting)
            command(
                "export", "--encoder-only", "--prompt-encoder", model, "--encoder-bundle", place,
                "--encoder-precision", "fp16", "--format", "trt", "--flavour", flavour, *own,
            )  # fmt: skip
            began = time.perf_counter()
            opened = open_encoder(place, device="tensorrt")
            seconds = time.perf_counter() - began
            prompt, expected = _host_prompt(setting), np.load(setting.work / EXPECTED)
            cosine = _cosine(opened.encoder.vectors([prompt])[0], expected)
            yield Check.of(name, cosine >= COSINE, cosine=round(cosine, 6), open_s=round(seconds, 1))
        yield from fault


# --- speed


def speed(setting: Setting) -> Iterator[Check]:
    """One region, one task and three: the published way in PyTorch, eager and compiled, and ours."""
    import torch
    from transformers import AutoModelForCausalLM

    from topt_deploy.prompts.pytorch.checkpoint import open_checkpoint
    from topt_deploy.prompts.pytorch.load import torch_backend
    from topt_deploy.runtime.prompt_encoder import open_encoder

    model, device = _decoder(setting), setting.device
    checkpoint = open_checkpoint(str(model))
    host = checkpoint.spec.host(checkpoint.tokenizer)
    prompts = {tasks: _prompt(host, setting, tasks) for tasks in TARGETS}
    dtype = torch.float16 if device == "cuda" else torch.float32
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval().to(device)

    def published(run: Callable[..., Any], prompt: Any) -> Any:
        """One full pass per task with logits and all hidden states, the last one's mean."""
        vectors = []
        with torch.inference_mode():
            for sequence in prompt.sequences:
                out = run(torch.tensor(sequence.ids, device=device)[None], output_hidden_states=True, use_cache=False)
                vectors.append(out.hidden_states[-1][0].float().mean(dim=0).cpu())
        return torch.stack(vectors).numpy()

    def timed(run: Callable[[Any], Any]) -> dict[int, float]:
        return {tasks: _best(partial(run, prompt), setting["repeats"]) for tasks, prompt in prompts.items()}

    base = timed(partial(published, whole))
    yield _speed("published way, PyTorch eager", base, base)
    name = "published way, torch.compile"
    if setting.judged:
        with _faults(name) as fault:
            compiled = torch.compile(whole, dynamic=False)  # anew for every length: one task's
            yield _speed(name, {1: _best(partial(published, compiled, prompts[1]), setting["repeats"])}, base)
        yield from fault
    else:
        yield Check.skipped(name, "compiling takes minutes at any size")
    whole = None
    half = "fp16" if device == "cuda" else "fp32"
    backend = torch_backend(checkpoint, device=device, precision=half)
    yield _speed(f"ours, PyTorch {half}", timed(partial(_pooled, backend)), base)
    backend = None
    ways: dict[str, Callable[[], Any]] = {f"ours, exported fp16 on {device}": lambda: _opened(setting, device)}
    for flavour in ("tensorrt", "rtx"):
        if (place := _engines_of(setting, flavour)).exists():  # part engines made it
            ways[f"ours, engines of {flavour} fp16"] = partial(open_encoder, place, device="tensorrt")
    for name, way in ways.items():
        with _faults(name) as fault:
            encoder_ = way().encoder
            yield _speed(name, timed(lambda prompt, own=encoder_: own.vectors([prompt])), base, judged=setting.judged)
        yield from fault


def _pooled(backend: Any, prompt: Any) -> Any:
    from topt_deploy.prompts.pooling import pooled

    return pooled(backend, [prompt])


def _speed(name: str, seconds: Mapping[int, float], base: Mapping[int, float], *, judged: bool = False) -> Check:
    times = {tasks: base[tasks] / seconds[tasks] for tasks in seconds}
    figures = {f"seconds_{tasks}": round(s, 4) for tasks, s in seconds.items()}
    figures |= {f"times_{tasks}": round(t, 2) for tasks, t in times.items()}
    good = not judged or all(times[tasks] >= target for tasks, target in TARGETS.items())
    wanted = " and ".join(f"{target:g} times with {tasks}" for tasks, target in TARGETS.items())
    return Check.of(f"speed: {name}", good, f"wanted {wanted} task(s)", **figures)


def _best(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest run, after one that nobody counts; what runs gives an array, and so has waited."""
    run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


# --- what the parts share


@contextmanager
def _faults(name: str) -> Iterator[list[Check]]:
    """Turn an error inside into a check: skipped if something is missing, else failed."""
    from topt_deploy.errors import NoDevice, ToptError

    found: list[Check] = []
    try:
        yield found
    except NoDevice as error:
        found.append(Check.skipped(name, f"{error.message}; {error.found or ''}".rstrip("; ")))
    except (ToptError, RuntimeError, TypeError, ValueError, ImportError, OSError) as error:
        found.append(Check(name=name, status=FAILED, reason=f"{type(error).__name__}: {str(error).splitlines()[0]}"))


def _city(setting: Setting) -> Path:
    folder = setting.work / "city"
    if not (folder / "regions.parquet").exists():
        from topt_deploy.train.datasets.sample import make_sample

        make_sample(folder, regions=setting["regions"])
    return folder


def _run(setting: Setting, preset: str) -> tuple[Path, Path]:
    """A trained run on the CPU: what is exported is to be right, not good."""
    folder, run = _city(setting), setting.work / f"run-{preset}"
    if not (run / "run.json").exists() or not (run / "model.safetensors").exists():
        short = [f"{part}.epochs={min(20, setting['epochs'])}" for part in ("srel", "prompt4re", "ensemble")]
        options = [option for one in (*short, *setting["settings"]) for option in ("--set", one)]
        options += [option for task in setting["tasks"] for option in ("--task", task)]
        command("train", folder, "--preset", preset, "--out", run, *options)
    return folder, run


def _decoder(setting: Setting) -> Path:
    """A decoder of random weights, saved once."""
    folder = setting.work / "decoder"
    if not folder.exists():
        from encoders_text import tiny_text

        tiny_text(folder, **setting["sizes"], head_dim=64)
    return folder


def _prompt(host: Any, setting: Setting, tasks: int = 3) -> Any:
    """A geo-text of so many tokens, and questions of so many tasks."""
    from topt_deploy.prompts.templates import load_templates

    text = "Included POIs: 1 kind 0 (1.00%)"
    while len(host.prompt(text, (), [""]).sequences[0].ids) < setting["tokens"]:
        text += "".join(f", {7 * k % 90 + 1} kind {k} ({k % 9}.{k % 7}1%)" for k in range(10))
    return host.prompt(text, (), [load_templates(None).question(task) for task in TASKS[:tasks]])


def _host_prompt(setting: Setting) -> Any:
    from topt_deploy.prompts.pytorch.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(_decoder(setting)))
    return _prompt(checkpoint.spec.host(checkpoint.tokenizer), setting)


def _engines_of(setting: Setting, flavour: str) -> Path:
    return setting.work / f"encoder-{flavour}.topt"


def _opened(setting: Setting, device: str) -> Any:
    """The exported encoder in half precision, on a device."""
    from topt_deploy.export.prompts.encoder_bundle import make_encoder
    from topt_deploy.runtime.prompt_encoder import open_encoder

    out = setting.work / "encoder-fp16.topt"
    make_encoder(
        str(_decoder(setting)), out, precision="fp16", templates=None, max_pixels=None, say=lambda text: None
    )  # fmt: skip
    return open_encoder(out, device=device)


def _cosine(found: Any, expected: Any) -> float:
    import numpy as np

    product = (found.astype(float) * expected.astype(float)).sum(axis=1)
    return float((product / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)).min())


# --- the whole


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part: what it runs, what it needs, and how long it may take."""

    run: Callable[[Setting], Iterator[Check]]
    needs: Sequence[str]
    seconds: float


_BASE = ("torch", "numpy", "pyarrow", "click")
_TRAINING = (*_BASE, "scipy", "sklearn", "safetensors")
_EXPORT = ("onnx", "onnxscript", "onnx_ir", "ml_dtypes", "onnxruntime")
_ENCODER = (*_BASE, "transformers", "tokenizers", "safetensors", "PIL", "jinja2", *_EXPORT)
PARTS: dict[str, Part] = {
    "train": Part(run=train, needs=_TRAINING, seconds=150),
    "fused": Part(run=fused, needs=(*_TRAINING, *_EXPORT), seconds=110),
    "encoder": Part(run=encoder, needs=_ENCODER, seconds=110),
    "engines": Part(run=engines, needs=(*_TRAINING, *_ENCODER), seconds=120),
    "speed": Part(run=speed, needs=_ENCODER, seconds=140),
}
"""By name, in order."""


def device_facts() -> dict[str, Any]:
    """The GPU and the versions; ``cuda`` is false, with the reason, where there is none."""
    names = ("torch", "onnxruntime-gpu", "onnxruntime", "transformers", "tensorrt", "tensorrt-rtx", "numpy")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    facts: dict[str, Any] = {"versions": versions, "cuda": False}
    if find_spec("torch") is None:
        return facts | {"why_not": "PyTorch is not installed"}
    import torch

    if not torch.cuda.is_available():
        return facts | {"why_not": f"PyTorch {torch.__version__} finds no CUDA device"}
    about = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return facts | {
        "cuda": True, "name": about.name, "capability": f"{about.major}.{about.minor}",
        "memory_gib": round(about.total_memory / 2**30, 1), "cuda_version": torch.version.cuda, "driver": driver,
    }  # fmt: skip


def run_part(name: str, setting: Setting, seconds: float) -> list[Check]:
    """A part in a process of its own; what it says before its time is over counts."""
    missing = [module for module in PARTS[name].needs if find_spec(module) is None]
    if missing:
        return [Check.skipped(name, f"not installed: {', '.join(missing)}")]
    arguments = ["--part", name, "--device", setting.device, "--size", setting.size, "--work", str(setting.work)]
    log = setting.work / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdout=file, stderr=subprocess.STDOUT, text=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
    lines = log.read_text(errors="replace").splitlines()
    checks = [Check(**json.loads(line.removeprefix("check "))) for line in lines if line.startswith("check {")]
    if code is None:
        checks.append(Check(name=f"{name} as a whole", status=FAILED, reason=f"not done within {seconds:.0f} s"))
    elif code:
        last = next((line for line in reversed(lines) if line.strip()), "")
        checks.append(Check(name=f"{name} as a whole", status=FAILED, reason=f"ended with {code}: {last}"))
    return checks


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    facts = report["device"]
    where = (
        "{name}, compute capability {capability}, {memory_gib} GiB, driver {driver}".format(**facts)
        if facts["cuda"]
        else f"no GPU ({facts['why_not']})"
    )
    versions = ", ".join(f"{name} {found}" for name, found in facts["versions"].items() if found != "not installed")
    lines = [
        f"{report['date']}, {where}; {versions}. {report['summary']}",
        "",
        "| check | | figures |",
        "|---|---|---|",
    ]
    for check in report["checks"]:
        figures = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in check["figures"].items())
        said = " ".join(part for part in (check["status"], f"({check['reason']})" if check["reason"] else "") if part)
        lines.append(f"| {check['name']} | {said} | {figures} |")
    return "\n".join(lines) + "\n"


def put_between(page: str, text: str) -> str:
    """The page with what stands between the markers replaced."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{PAGE}: the markers {BEGIN} and {END} are not there")
    return f"{before}{BEGIN}\n{text}{END}{after}"


def whole(setting: Setting) -> dict[str, Any]:
    """Run every part, and report."""
    began, facts = time.monotonic(), device_facts()
    checks: list[Check] = []
    for name, part in PARTS.items():
        left = TOTAL_S - (time.monotonic() - began)
        if setting.device == "cuda" and not facts["cuda"]:
            checks.append(Check.skipped(name, facts["why_not"]))
        elif left < LEAST_S:
            checks.append(Check.skipped(name, "no time left"))
        else:
            checks += run_part(name, setting, min(part.seconds, left) if setting.judged else left)
        print(f"{name}: {checks[-1].status} {checks[-1].reason}", file=sys.stderr, flush=True)
    count = {status: sum(check.status == status for check in checks) for status in (PASSED, FAILED, SKIPPED)}
    ran = "" if facts["cuda"] and setting.device == "cuda" else "Nothing was run on a GPU. "
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": facts,
        "on": setting.device,
        "size": setting.size,
        "seconds": round(time.monotonic() - began, 1),
        "summary": ran + ", ".join(f"{number} {status}" for status, number in count.items()) + ".",
        "checks": [asdict(check) for check in checks],
    }


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    parser.add_argument("--out", type=Path, default=Path("gpu-report.json"), help="a table goes beside it, as .md")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/reference/status.md")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        bootstrap()
        setting = Setting(device=arguments.device, size=arguments.size, work=arguments.work)
        for check in PARTS[arguments.part].run(setting):
            print("check " + json.dumps(asdict(check)), flush=True)
        return
    with tempfile.TemporaryDirectory() as work:
        report = whole(Setting(device=arguments.device, size=arguments.size, work=Path(work)))
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    text = table(report)
    arguments.out.with_suffix(".md").write_text(text)
    if arguments.write_docs:
        PAGE.write_text(put_between(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")
    print(text)
    sys.exit(any(check["status"] == FAILED for check in report["checks"]))


if __name__ == "__main__":
    main()
