"""Stage 1: train SREL on a city's features. No label is used."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn

from topt_deploy.config.settings import Config, SrelConfig
from topt_deploy.data.city import City, Schema
from topt_deploy.data.features import POSITION, feature_widths
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
    observe: Callable[[int, Srel], None] | None = None,
) -> Srel:
    """Train the stage-1 model ``name`` of :meth:`Config.embeddings`.

    Args:
        inputs: :func:`topt_deploy.data.features.features` as tensors on the engine's device.
        observe: Called with the number of epochs done and the model, after every epoch.

    Returns:
        The trained model in evaluation mode, on the engine's device.
    """
    settings = config.embeddings()[name]
    stage, device = f"srel/{name}", place.engine.device
    place.engine.seed(config.seed, stage)
    srel = Srel(feature_widths(schema), settings)
    srel.fit_statistics({k: v.cpu() for k, v in inputs.items()}, inputs[POSITION].cpu())
    with held_on(device):
        if 0 < settings.regions < len(city):
            return _train_on_some(city, inputs, srel, config, settings, stage, place, observe)
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


def _train_on_some(
    city: City,
    inputs: Mapping[str, Tensor],
    srel: Srel,
    config: Config,
    settings: SrelConfig,
    stage: str,
    place: Workplace,
    observe: Callable[[int, Srel], None] | None,
) -> Srel:
    """Stage 1 on some of the regions, drawn anew each epoch: an epoch's time does not grow with the city."""
    device, n = place.engine.device, len(city)
    flows = None
    if city.flows is not None:
        target = np.asarray(city.flows.target, dtype=np.float64)
        flows = csr_array((target, (city.flows.origin, city.flows.dest)), shape=(n, n))
    start = torch.arange(settings.regions).numpy()
    loss = SrelLoss(*some_targets(city, flows, start, device), settings)
    training = SrelTraining(srel, loss).to(device)
    views = [name for name in inputs if name in srel.encoders.names]

    def terms() -> dict[str, Tensor]:
        some = torch.randperm(n)[: settings.regions].sort().values  # PyTorch's generator: a checkpoint has its state
        similarities, loss.flow = some_targets(city, flows, some.numpy(), device)
        loss.similarities = dict(similarities)
        some = some.to(device)
        return loss(srel({name: inputs[name][some] for name in views}, srel.adjacency(inputs[POSITION][some])))

    def after(epoch: int) -> None:
        if observe is not None:
            observe(epoch, srel)
            training.train()

    place.fit(
        training, terms, settings, stage=stage, config=config, depends_on=settings, observe=after, capturable=False
    )
    return srel.eval()


@torch.no_grad()
def embed(srel: Srel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Embeddings E (N, D) in evaluation mode."""
    with held_on(inputs[POSITION].device):
        return srel.eval()(inputs, srel.adjacency(inputs[POSITION]))
