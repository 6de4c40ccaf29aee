"""Stage 1: train SREL on the features of a city, or of several. No label is used."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn

from topt_deploy.config.settings import Config, SrelConfig
from topt_deploy.data.city import City, Schema
from topt_deploy.data.features import POSITION, feature_widths
from topt_deploy.errors import BadConfig
from topt_deploy.model.layers import drawn
from topt_deploy.model.row_tiles import Matrix, held_on, matrix, one_tile
from topt_deploy.model.srel import Srel, SrelLoss

from .loop import Workplace

Array = np.ndarray[Any, Any]


def similarity_targets(city: City, device: torch.device | str = "cpu") -> dict[str, Matrix]:
    """Cosine similarities between the regions' raw counts, per view (N, N). An empty region is similar to none."""
    targets = {}
    for view, counts in city.views.items():
        norm = np.linalg.norm(counts, axis=1, keepdims=True)
        unit = torch.tensor(counts / np.where(norm == 0, 1, norm), dtype=torch.float64, device=device)
        targets[view] = matrix(len(unit), partial(_products, unit))
    return targets


def _products(unit: Tensor, rows: slice) -> Tensor:
    return (unit[rows] @ unit.T).float()


def flow_target(city: City, device: torch.device | str = "cpu") -> Matrix | None:
    """The OD matrix that stage 1 reconstructs, over its mean (N, N)."""
    if city.flows is None:
        return None
    n, target = len(city), np.asarray(city.flows.target, dtype=np.float64)
    over_mean = (target / (target.sum() / n**2)).astype(np.float32)
    sparse = csr_array((over_mean, (city.flows.origin, city.flows.dest)), shape=(n, n))
    return matrix(n, _rows(sparse, device), _rows(sparse.T.tocsr(), device))


def some_targets(
    city: City, flows: csr_array | None, some: Array, device: torch.device | str
) -> tuple[dict[str, Matrix], Tensor | None]:
    """:func:`similarity_targets` and :func:`flow_target` between some of the regions, (n, n)."""
    similar: dict[str, Matrix] = {}
    for view, counts in city.views.items():
        own = counts[some]
        norm = np.linalg.norm(own, axis=1, keepdims=True)
        unit = torch.tensor(own / np.where(norm == 0, 1, norm), dtype=torch.float64, device=device)
        similar[view] = (unit @ unit.T).float()
    if flows is None:
        return similar, None
    between = flows[some][:, some].toarray()
    mean = between.mean()
    return similar, torch.tensor(between / (mean or 1.0), dtype=torch.float32, device=device)


def _rows(sparse: csr_array, device: torch.device | str) -> Callable[[slice], Tensor]:
    """Rows of a sparse (N, N), made dense where they are read: a GPU waits for no copy."""
    n, starts = sparse.shape[0], sparse.indptr.tolist()
    columns = torch.tensor(sparse.indices, dtype=torch.int64, device=device)
    values = torch.tensor(sparse.data, device=device)
    row = torch.tensor(np.repeat(np.arange(n), np.diff(sparse.indptr)), device=device)

    def rows(some: slice) -> Tensor:
        first, last, _ = some.indices(n)
        part = slice(starts[first], starts[last])
        dense = torch.zeros(last - first, n, dtype=values.dtype, device=device)
        dense[row[part] - first, columns[part]] = values[part]
        return dense

    return rows


class SrelTraining(nn.Module):
    """SREL with the decoders it is trained through."""

    def __init__(self, srel: Srel, loss: SrelLoss) -> None:
        super().__init__()
        self.srel = srel
        self.loss = loss


def train_embedding(
    city: City,
    inputs: Mapping[str, Tensor],
    schema: Schema,
    config: Config,
    name: str,
    place: Workplace,
    *,
    rows: bool = False,
    observe: Callable[[int, Srel], None] | None = None,
) -> Srel:
    """Train the stage-1 model ``name`` of :meth:`Config.embeddings`.

    Args:
        inputs: :func:`topt_deploy.data.features.features` as tensors on the engine's device.
        rows: The inputs are those of ``srel.inputs = "rows"``, and not of a model that is to be deployed.
        observe: Called with the number of epochs done and the model, after every epoch.

    Returns:
        The trained model in evaluation mode, on the engine's device.

    Raises:
        BadConfig: If the settings ask for rows, and these inputs are not.
    """
    settings = config.embeddings()[name]
    if settings.inputs == "rows" and not rows:
        raise BadConfig(
            "the weights of srel.inputs = 'rows' fit one city and one order of its regions", column="srel.inputs",
            expected="'context'", found="'rows'",
            fix="use it under `topt-deploy evaluate --protocol paper` alone",
        )  # fmt: skip
    stage, device = f"srel/{name}", place.engine.device
    place.engine.seed(config.seed, stage)
    srel = Srel({view: inputs[view].shape[1] for view in feature_widths(schema)}, settings)
    position = inputs[POSITION].cpu()
    srel.fit_statistics({k: v.cpu() for k, v in inputs.items()}, *(position[block] for block in city.blocks))
    with held_on(device):
        if city.parts or 0 < settings.regions < len(city):
            return _train_on_samples(city, inputs, srel, config, settings, stage, place, observe)
        loss = SrelLoss(similarity_targets(city, device), flow_target(city, device), settings)
        training = SrelTraining(srel, loss).to(device)
        with torch.no_grad():
            adjacency = srel.adjacency(inputs[POSITION])  # depends on no weight: computed once

        def after(epoch: int) -> None:
            if observe is not None:
                observe(epoch, srel)
                training.train()

        place.fit(
            training,
            lambda: loss(srel(inputs, adjacency)),
            settings,
            stage=stage,
            config=config,
            depends_on=settings,
            observe=after,
            capturable=one_tile(len(city)),
        )
    return srel.eval()


def _train_on_samples(
    city: City,
    inputs: Mapping[str, Tensor],
    srel: Srel,
    config: Config,
    settings: SrelConfig,
    stage: str,
    place: Workplace,
    observe: Callable[[int, Srel], None] | None,
) -> Srel:
    """Stage 1 on some of the regions of every city, drawn anew each epoch, so that an epoch's time does not grow with
    N². The loss is the cities' mean: a large city teaches no more than a small one."""
    samples = [
        _Sample(part, {name: x[block] for name, x in inputs.items()}, srel, settings.regions)
        for part, block in zip(city.parts or (city,), city.blocks, strict=True)
    ]
    loss = SrelLoss(*samples[0].targets(torch.arange(samples[0].count)), settings)
    training = SrelTraining(srel, loss).to(place.engine.device)

    def terms() -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for sample in samples:
            some = sample.draw()
            similarities, loss.flow = sample.targets(some)
            loss.similarities = dict(similarities)
            for name, term in loss(sample.embedded(some)).items():
                share = term / len(samples)
                total[name] = total[name] + share if name in total else share
        return total

    def after(epoch: int) -> None:
        if observe is not None:
            observe(epoch, srel)
            training.train()

    place.fit(
        training, terms, settings, stage=stage, config=config, depends_on=settings, observe=after, capturable=False
    )
    return srel.eval()


class _Sample:
    """At most so many of a city's regions, drawn anew where it has more.

    Args:
        city: The city.
        inputs: Its features.
        srel: The model, whose statistics are fixed.
        regions: How many; 0 takes all.
    """

    def __init__(self, city: City, inputs: Mapping[str, Tensor], srel: Srel, regions: int) -> None:
        self.city, self.inputs, self.srel = city, inputs, srel
        self.count, self.device = min(regions or len(city), len(city)), inputs[POSITION].device
        self.flows, self.kept = None, None
        if self.count == len(city):  # always the same regions: what depends on no weight is computed once
            self.kept = similarity_targets(city, self.device), flow_target(city, self.device)
            self.adjacency = srel.adjacency(inputs[POSITION])
        elif city.flows is not None:
            target = np.asarray(city.flows.target, dtype=np.float64)
            self.flows = csr_array((target, (city.flows.origin, city.flows.dest)), shape=(len(city), len(city)))

    def draw(self) -> Tensor:
        """Regions in order. PyTorch's generator draws: a checkpoint has its state."""
        return drawn(torch.arange(len(self.city)), self.count)

    def targets(self, some: Tensor) -> tuple[dict[str, Matrix], Matrix | None]:
        """:func:`similarity_targets` and :func:`flow_target` between these regions."""
        return self.kept or some_targets(self.city, self.flows, some.numpy(), self.device)

    def embedded(self, some: Tensor) -> Tensor:
        """Embeddings of these regions, which see each other alone (n, D)."""
        if self.kept:
            whole: Tensor = self.srel(self.inputs, self.adjacency)
            return whole
        some = some.to(self.device)
        views = {name: self.inputs[name][some] for name in self.srel.encoders.names}
        embedding: Tensor = self.srel(views, self.srel.adjacency(self.inputs[POSITION][some]))
        return embedding


def without_trace(device: torch.device) -> AbstractContextManager[None]:
    """Random numbers that are drawn inside are put back, so that training goes on as if nothing had been looked at."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@torch.no_grad()
def embed_with_dropout(srel: Srel, inputs: Mapping[str, Tensor], adjacency: Matrix) -> Tensor:
    """Embeddings E (N, D) in training mode, as the published code reads them; without a trace in training.

    Args:
        adjacency: Of the regions, :class:`topt_deploy.model.srel.Adjacency`.
    """
    device = inputs[POSITION].device
    with held_on(device), without_trace(device):
        embedding: Tensor = srel.train()(inputs, adjacency)
        return embedding


@torch.no_grad()
def embed(srel: Srel, inputs: Mapping[str, Tensor], city: City | None = None) -> Tensor:
    """Embeddings E (N, D) in evaluation mode; regions of several cities see those of their own alone."""
    if city is not None and city.parts:
        return torch.cat([embed(srel, {k: x[block] for k, x in inputs.items()}) for block in city.blocks])
    with held_on(inputs[POSITION].device):
        return srel.eval()(inputs, srel.adjacency(inputs[POSITION]))
