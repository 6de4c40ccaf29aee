"""A city, a run and a bundle that every test may read and none may write to, made once for all workers."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest
from commands import Desk, Said, shell
from hypothesis import settings

from topt_deploy.cli import cli
from topt_deploy.console import run
from topt_deploy.runtime.cli.group import cli as runtime_cli

if TYPE_CHECKING:
    from topt_deploy.export.onnx_graph import Graph

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT.parent / "shared" / "data"
"""The research repositories' files (HAFusion, Prompt4RE), where this machine has them."""
KEEP = "TOPT_KEEP_BUNDLE"
"""Names a folder that the demo's bundle and tables are copied to, for the tests of the runtime-only environment."""
REGIONS = 77
SETTINGS = """\
preset = "srel"

[srel]
width = 48
ffn_width = 96
layers = 1
epochs = 30
lr = 2e-3

[prompt4re]
epochs = 20
lr = 5e-3 # so that what the prompts add is not too small to be tested
folds = 3

[tasks.crime.ensemble] # a head of either kind, so that every artifact has both
enabled = true
features = 16
members = 2
width = 8
epochs = 20
[tasks.crime.target]
transform = "cbrt"

[tasks.check_in]
[tasks.service_call]
"""

settings.register_profile("busy", deadline=None)  # a machine that is busy must not fail a test
settings.load_profile("busy")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run see."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


Once = Callable[[str, Callable[[Path], Said | None]], Said]


@pytest.fixture(scope="session")
def once(shared: Path) -> Once:
    """Make something below ``shared`` in whichever worker comes first; what was said is known to all."""

    def call(name: str, make: Callable[[Path], Said | None]) -> Said:
        said, failed = shared / f"{name}.said", shared / f"{name}.failed"
        with _locked(shared / f"{name}.lock"):
            assert not failed.exists(), f"{name} could not be made: {failed.read_text()}"
            if not said.exists():
                failed.write_text("see the first test that needed it")
                done = make(shared) or Said(0, "", "")
                assert done.code == 0, f"{name}: exit {done.code}\n{done.out}\n{done.err}"
                said.write_text(f"{done.out}\0{done.err}")
                failed.unlink()
        out, err = said.read_text().split("\0")
        return Said(0, out, err)

    return call


@pytest.fixture(scope="session")
def demo_city(shared: Path, once: Once) -> Path:
    """A synthetic city of 77 regions, as many as Chicago has, with settings that train in seconds."""

    def sample(folder: Path) -> Said:
        said = shell(f"topt-deploy sample --out demo --regions {REGIONS}", folder)
        (folder / "demo" / "topt.toml").write_text(SETTINGS)
        return said

    once("sample", sample)
    return shared / "demo"


@pytest.fixture(scope="session")
def demo_trained(once: Once, demo_city: Path) -> Said:
    """What ``topt-deploy train`` said of the demo."""
    return once("train", lambda _: shell("topt-deploy train", demo_city))


@pytest.fixture(scope="session")
def demo_run(demo_city: Path, demo_trained: Said) -> Path:
    """The demo's finished run."""
    (run,) = (demo_city / "runs").iterdir()
    return run


@pytest.fixture(scope="session")
def demo_exported(once: Once, demo_city: Path, demo_run: Path) -> Said:
    """What ``topt-deploy export --format onnx`` said of the demo."""

    def export(_: Path) -> Said:
        done = shell("topt-deploy export --format onnx", demo_city)
        if KEEP in os.environ and done.code == 0:
            keep = Path(os.environ[KEEP])
            shutil.copytree(demo_city / "model.topt", keep / "model.topt")
            for name in ("regions.parquet", "mobility.parquet"):
                shutil.copy(demo_city / name, keep)
        return done

    return once("export", export)


@pytest.fixture(scope="session")
def demo_bundle(demo_city: Path, demo_exported: Said) -> Path:
    """The demo's bundle."""
    return demo_city / "model.topt"


@pytest.fixture
def demo_graph(demo_bundle: Path) -> "Graph":
    """The demo's graph, as the exporter made it."""
    from topt_deploy.bundle.manifest import open_bundle
    from topt_deploy.export.onnx_graph import Graph

    opened = open_bundle(demo_bundle)
    variant = opened.manifest.variants["fp32"]
    places = {name: (offset, tuple(shape)) for name, (offset, shape) in variant["initializers"].items()}
    return Graph(model=opened.read(variant["graph"]), weights=opened.read(variant["weights"]), initializers=places)


@pytest.fixture
def demo_traced(demo_graph: "Graph", monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of the demo take its graph as it is: tracing it again is nearly all of an export's time."""
    from topt_deploy.export import city_bundle

    monkeypatch.setattr(city_bundle, "export_graph", lambda model, inputs: demo_graph)


@pytest.fixture(scope="session")
def published() -> Path:
    """The research repositories' files."""
    if not (PUBLISHED / "HAFusion").is_dir():
        pytest.skip(f"no published data at {PUBLISHED}: clone HAFusion and Prompt4RE there")
    return PUBLISHED


@pytest.fixture(scope="session")
def chicago(shared: Path, once: Once, published: Path) -> Path:
    """Real Chicago, imported: 77 community areas with Llama's prompt vectors."""
    once(
        "chicago",
        lambda folder: shell(
            f"topt-deploy import hafusion {published / 'HAFusion'} --city Chi --out chicago"
            f" --prompt4re {published / 'Prompt4RE'} --encoder llama",
            folder,
        ),
    )
    return shared / "chicago"


Encoders = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_models(shared: Path, once: Once) -> Callable[[str], Path]:
    """A tiny model's folder, by its family (encoders_exported.py)."""

    def model(family: str) -> Path:
        def make(folder: Path) -> None:
            from encoders_exported import MAKERS

            (folder / "models").mkdir(exist_ok=True)
            MAKERS[family](folder / "models" / family)

        once(f"model-{family}", make)
        return shared / "models" / family

    return model


@pytest.fixture(scope="session")
def encoders(shared: Path, once: Once, tiny_models: Callable[[str], Path]) -> Encoders:
    """A tiny model's exported bundle, by family and precision."""

    def exported(family: str, precision: str = "fp32") -> Path:
        model = tiny_models(family)

        def make(folder: Path) -> None:
            from encoders_exported import EXPORTED, export_all

            export_all(model, folder / f"encoders-{family}", EXPORTED[family])

        once(f"encoders-{family}", make)
        return shared / f"encoders-{family}" / f"{precision}.topt"

    return exported


@pytest.fixture(scope="session")
def prompted(shared: Path, once: Once, tiny_models: Callable[[str], Path], encoders: Encoders) -> Path:
    """A small city trained with a tiny text model's prompts: ``beside.topt`` refers to its encoder ``encoder.topt``,
    ``model.topt`` holds it, and ``bare.parquet`` has the regions without prompts."""

    def make(folder: Path) -> None:
        from prompted_city import make_prompted_city

        make_prompted_city(folder / "prompted", tiny_models("text"), encoders("text"))
        if KEEP in os.environ:
            shutil.copytree(folder / "prompted", Path(os.environ[KEEP]) / "prompted")

    once("prompted", make)
    return shared / "prompted"


@pytest.fixture(scope="session")
def default_city(shared: Path, once: Once) -> Path:
    """A city with ``model.topt``, of the default's structure and size and hardly trained."""

    def make(folder: Path) -> Said:
        from default_city import make_default_city

        done = make_default_city(folder / "default")
        if KEEP in os.environ and done.code == 0:
            shutil.copytree(
                folder / "default", Path(os.environ[KEEP]) / "default", ignore=shutil.ignore_patterns("runs")
            )
        return done

    once("default", make)
    return shared / "default"


@pytest.fixture(scope="session")
def pictured(shared: Path, once: Once, tiny_models: Callable[[str], Path], encoders: Encoders) -> Path:
    """A small city with images, ``encoder.topt``, and ``prompts.parquet``, what PyTorch makes of it."""

    def make(folder: Path) -> Said:
        from encode_city import write_city

        city = folder / "pictured"
        write_city(city)
        shutil.copytree(encoders("qwen2_5_vl"), city / "encoder.topt")
        done = shell(f"topt-deploy encode pictured --model {tiny_models('qwen2_5_vl')} --no-cache", folder)
        if KEEP in os.environ and done.code == 0:
            shutil.copytree(city, Path(os.environ[KEEP]) / "pictured")
        return done

    once("pictured", make)
    return shared / "pictured"


@pytest.fixture
def desk(tmp_path: Path, demo_bundle: Path) -> Desk:
    """The demo city and its bundle in a folder of the test's own."""
    folder = tmp_path / "desk"
    shutil.copytree(demo_bundle, folder / "model.topt")
    for name in ("regions.parquet", "mobility.parquet"):
        shutil.copy(demo_bundle.with_name(name), folder)
    return Desk(folder)


def _within(command: click.Command, capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Call ``command`` within this process: no seconds to start it, and the same exit."""

    def call(*arguments: object) -> Said:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            run(command, [str(argument) for argument in arguments])
        assert isinstance(left.value.code, int)
        return Said(left.value.code, *capfd.readouterr())

    return call


@pytest.fixture
def reseal() -> Callable[[Path, Callable[[dict], object]], None]:
    """Change a bundle's manifest and seal it again, as someone who means harm can do."""

    def call(bundle: Path, change: Callable[[dict], object]) -> None:
        record = json.loads((bundle / "manifest.json").read_text())
        for name, facts in record["files"].items():
            data = (bundle / name).read_bytes()
            facts |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        change(record)
        text = json.dumps(record)
        (bundle / "manifest.json").write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        (bundle / "manifest.json.sha256").write_text(f"{digest}  manifest.json\n")

    return call


@pytest.fixture
def topt_run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """``topt-run`` within this process."""
    return _within(runtime_cli, capfd)


@pytest.fixture
def topt_deploy(capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """``topt-deploy`` within this process."""
    return _within(cli, capfd)


@pytest.fixture
def refused(topt_run: Callable[..., Said], desk: Desk) -> Callable[..., dict[str, object]]:
    """Call ``topt-run predict``, which must fail with ``code`` and leave the folder as it was.

    Twice: for people where there is no output yet, and for machines where an older output stands. Returns what the
    machine is told; every one of ``parts`` is in the text for people.
    """

    def call(code: int, *parts: str, arguments: tuple[object, ...] = (), regions: Path | None = None) -> dict:
        command = ("predict", regions or desk.regions, *arguments)
        before = desk.state()
        said = topt_run(*command)
        assert said.code == code, said
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert "Traceback" not in said.err
        for part in parts:
            assert part in said.err, f"{part!r} is not in:\n{said.err}"
        assert desk.state() == before
        if not desk.out.exists():
            desk.out.write_bytes(b"an older output")
            desk.receipt.write_bytes(b"and its receipt")
        before = desk.state()
        said = topt_run(*command, "--log-format", "json")
        assert said.code == code
        (line,) = said.err.splitlines()
        facts = json.loads(line)
        assert facts["exit_code"] == code
        assert facts["message"]
        assert desk.state() == before
        return facts

    return call
