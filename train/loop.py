"""The one training loop, for both stages: Adam, checkpoints, and going on after an interruption."""

import hashlib
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topt_deploy.config.settings import Config, EnsembleConfig, Prompt4ReConfig, SrelConfig, TaskConfig
from topt_deploy.errors import BadConfig
from topt_deploy.freed_memory import keep_freed_memory
from topt_deploy.model.checkpoint import restore_training, save_training
from topt_deploy.model.row_tiles import SETTLED
from topt_deploy.model.training_device import check_device

from .progress import Reporter
from .training_step import CapturedGraph, CudaGraph, Step

LOG_EVERY = 25
"""Epochs between two readings of the loss: each one makes a GPU wait for the CPU."""


@dataclass(frozen=True, kw_only=True)
class TrainingDevice:
    """The device and the way in which steps are computed.

    Attributes:
        device: ``cpu`` or ``cuda``.
        precision: ``fp32``; ``tf32`` (CUDA: matrix products only); ``bf16`` (autocast, weights stay float32).
        compile: Compile the loss and its gradient with TorchInductor.
        capture: On CUDA, capture whole steps as a CUDA graph (:mod:`.training_step`), compiled or not.
    """

    device: torch.device
    precision: str = "fp32"
    compile: bool = False
    capture: bool = False

    @classmethod
    def choose(cls, device: str, precision: str | None, compile_: bool | None) -> "TrainingDevice":
        """Settle what was left open: TF32 and captured steps on CUDA, plain float32 on a CPU.

        Args:
            device, precision: As the user asked; None leaves the precision open.
            compile_: True to compile; None does not. Captured steps need no compiler: only False leaves them out.

        Raises:
            NoDevice: If CUDA was asked for and is not there.
            BadConfig: If the precision does not exist on the device.
        """
        check_device(device)
        cuda = device == "cuda"
        if precision == "tf32" and not cuda:
            raise BadConfig("precision tf32 exists on CUDA only", expected="fp32 or bf16", found="device cpu")
        return cls(
            device=torch.device(device),
            precision=precision or ("tf32" if cuda else "fp32"),
            compile=bool(compile_),
            capture=cuda and compile_ is not False,
        )

    def seed(self, seed: int, stage: str) -> None:
        """Seed every generator for a stage, so that no stage depends on what ran before it."""
        torch.manual_seed(zlib.crc32(f"{seed}/{stage}".encode()))

    def graph(self, generators: Sequence[torch.Generator]) -> CapturedGraph | None:
        """The object that captures steps which also draw from these generators; None if steps are not captured."""
        return CudaGraph(generators) if self.capture else None

    def compiled(self, loss: Callable[[], Mapping[str, Tensor]]) -> Callable[[], Mapping[str, Tensor]]:
        """The loss as this engine computes it: the same shapes at every step."""
        if not self.compile:
            return loss
        for function in SETTLED:
            torch.compiler.assume_constant_result(function)
        return torch.compile(loss, dynamic=False)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that a forward pass runs in."""
        if self.precision != "bf16":
            return nullcontext()
        # Weights in bfloat16 are not kept from one use to the next: a captured step must make its own.
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    @contextmanager
    def matmuls(self) -> Iterator[None]:
        """Matrix products of this precision, inside; what is computed outside of training steps stays float32."""
        products = torch.backends.cuda.matmul
        before = products.fp32_precision
        if self.precision == "tf32":
            products.fp32_precision = "tf32"
        try:
            yield
        finally:
            products.fp32_precision = before


def learning_rate(settings: SrelConfig | Prompt4ReConfig | EnsembleConfig, epoch: int) -> float:
    """The rate of an epoch: a function of the epoch alone, so that a resumed run needs no scheduler state."""
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * epoch / settings.epochs))
    return settings.lr


def fit(
    module: nn.Module,
    loss: Callable[[], Mapping[str, Tensor]],
    settings: SrelConfig | Prompt4ReConfig | EnsembleConfig,
    *,
    stage: str,
    identity: str,
    engine: TrainingDevice,
    reporter: Reporter,
    checkpoint: Path | None = None,
    checkpoint_every: int = 500,
    observe: Callable[[int], None] | None = None,
    capturable: bool = True,
    generators: Sequence[torch.Generator] = (),
) -> None:
    """Minimise the sum of the loss's terms over the module's parameters, in full batches.

    Goes on from ``checkpoint`` where there is one; the result is then bit for bit that of a run that was never
    interrupted, on the same machine with the same number of threads.

    Args:
        module: The module to train; left in training mode.
        loss: Computes the loss's terms, by name.
        settings: Epochs, rate, schedule and weight decay.
        stage: Name for people and files.
        identity: Hash of everything the stage depends on; a checkpoint with another one is refused.
        checkpoint: The stage's checkpoint file.
        observe: Called after every epoch with the number of epochs done; leaves the module in training mode.
        capturable: Off for a loss that cannot be captured as a CUDA graph: one of several tiles, which are computed
            again for the gradient (:mod:`topt_deploy.model.row_tiles`) and put random numbers back to do so.
        generators: Generators of the loss's random numbers, besides PyTorch's own generator. A checkpoint has none of
            their state.
    """
    adam = torch.optim.AdamW if settings.decoupled else torch.optim.Adam
    graph = engine.graph(generators) if capturable else None
    optimiser = adam(
        module.parameters(),
        lr=settings.lr if graph is None else torch.tensor(settings.lr, device=engine.device),
        weight_decay=settings.weight_decay,
        fused=True,
        capturable=graph is not None,
    )
    epoch = 0
    if checkpoint is not None and checkpoint.exists():
        epoch = restore_training(checkpoint, module, optimiser, identity=identity)["epoch"]
    reporter.rewind(stage, epoch)
    keep_freed_memory()
    module.train()
    step = Step(engine.compiled(loss), optimiser, engine.autocast, graph)
    with engine.matmuls(), reporter.stage(stage, epochs=settings.epochs, start=epoch) as progress:
        while epoch < settings.epochs:
            terms = step(learning_rate(settings, epoch))
            epoch += 1
            if observe is not None:
                observe(epoch)
            if epoch % LOG_EVERY == 0 or epoch == settings.epochs:
                values = dict(zip(terms, torch.stack([term.double() for term in terms.values()]).tolist(), strict=True))
                if not math.isfinite(sum(values.values())):
                    raise BadConfig(
                        f"{stage}: the loss is not finite at epoch {epoch}",
                        found=str(values),
                        fix="lower the learning rate, or use precision fp32",
                    )
                reporter.record(stage=stage, epoch=epoch, loss=sum(values.values()), terms=values)
                progress.update(epoch, sum(values.values()))
            if checkpoint is not None and (epoch % checkpoint_every == 0 or epoch == settings.epochs):
                save_training(checkpoint, module, optimiser, {"identity": identity, "epoch": epoch, "stage": stage})


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """The surroundings in which a run's stages train.

    Attributes:
        engine: Where and how steps are computed.
        reporter: Who is told of progress.
        identity: Hash of the run's data; a stage adds its settings.
        checkpoints: The folder of the stages' checkpoints; None keeps none.
    """

    engine: TrainingDevice
    reporter: Reporter
    identity: str = ""
    checkpoints: Path | None = None

    def fit(
        self,
        module: nn.Module,
        loss: Callable[[], Mapping[str, Tensor]],
        settings: SrelConfig | Prompt4ReConfig | EnsembleConfig,
        *,
        stage: str,
        config: Config,
        depends_on: SrelConfig | TaskConfig,
        observe: Callable[[int], None] | None = None,
        capturable: bool = True,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        """:func:`fit` a stage of a run; ``depends_on`` are all of the settings that its result depends on."""
        file = f"{stage.replace('/', '-')}.safetensors"
        fit(
            module,
            loss,
            settings,
            stage=stage,
            identity=hashlib.sha256(f"{self.identity}{config.seed}{depends_on}".encode()).hexdigest(),
            engine=self.engine,
            reporter=self.reporter,
            checkpoint=None if self.checkpoints is None else self.checkpoints / file,
            checkpoint_every=config.checkpoint_every,
            observe=observe,
            capturable=capturable,
            generators=generators,
        )
