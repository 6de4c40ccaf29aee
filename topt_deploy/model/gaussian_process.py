"""The kernel part of a head: Gaussian process regression with a sum of kernels, as a linear map of fixed features.

Every view has a linear kernel and radial ones of a few lengths; what each kernel weighs is found by maximising the
evidence on the training regions alone. One regression has them all, the next ones leave out the shortest lengths;
their mean varies less with the regions it was fitted on than any of them. A radial kernel is computed with random
Fourier features (Rahimi & Recht, NeurIPS 2007; orthogonal: Yu et al., NeurIPS 2016), in training as in serving. So the
trained part is a linear map: it holds no row of the training city, and costs the same whatever N is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from topt_deploy.config.settings import EnsembleConfig
from topt_deploy.data.features import POSITION

from .layers import ByName, Standardize, drawn, repeated, standardized
from .row_tiles import Rows, in_tiles, take

PROMPT = "prompt"
"""The view that a task's prompt coordinates are. They share one scale (PromptBasis): principal directions count by
their variance, which standardising each would undo."""
LOCAL = "local"
"""The view that positions are once more, for kernels so short that they take many frequencies."""
LOCAL_FREQUENCIES = 4
"""As many times the frequencies of another kernel has a local one: a city is many of its lengths wide."""
RADIAL = "radial kernels"
"""The regression without linear kernels: far from what it was fitted on it says the mean."""
NOISE = 0.1
"""Noise variance that evidence maximisation starts from, for targets of unit variance."""
PRIOR_DEVIATION = 2.0
"""Of the logarithm of every weight, and of the noise, about where they start."""
RATE = 0.1
EVIDENCE_REGIONS = 400
"""At most so many regions, drawn at random, say what the kernels weigh; every region takes part in the fit itself."""
VERY_STRONG = 10.0
"""Local kernels are taken by the training sets whose log evidence they raise by more than this, twice what Kass &
Raftery (JASA 1995) call very strong: so few steps find either maximum only roughly. Most cities do without."""
BATCH = 1 << 22
"""Entries of kernel matrices that are held at once: training sets beyond it come in turns."""


class ViewKernels(nn.Module):
    """The feature maps of one view's kernels, whose inner products are the kernels.

    With z the standardised view (N, F), linear: z·z'/F; radial of length ℓ: exp(−|z − z'|² / 2Fℓ²).

    *Shape:* (N, F) → (N, K)
    """

    frequencies: Tensor

    def __init__(
        self,
        width: int,
        *,
        lengths: Sequence[float],
        linear: bool,
        features: int,
        standardize: bool = True,
        limit: float = 0.0,
    ) -> None:
        super().__init__()
        self.standardize = Standardize(width, limit) if standardize else None
        self.lengths, self.linear, self.features = tuple(lengths), linear, features
        self.register_buffer("frequencies", torch.zeros(width, len(self.lengths) * features))

    @property
    def sizes(self) -> list[int]:
        """Features of each kernel, the linear one first; their sum is K."""
        linear = [self.frequencies.shape[0]] if self.linear else []
        return linear + [2 * self.features] * len(self.lengths)

    def fit(self, x: Tensor, generator: torch.Generator) -> None:
        """Fix the statistics from the training city's regions, and draw the frequencies."""
        if self.standardize is not None:
            self.standardize.fit(x)
        width = x.shape[1]
        drawn = [
            orthogonal_frequencies(width, self.features, generator) / (length * math.sqrt(width))
            for length in self.lengths
        ]
        self.frequencies.copy_(torch.cat(drawn, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        z = x if self.standardize is None else self.standardize(x)
        angles = torch.mm(z, self.frequencies).unflatten(1, (len(self.lengths), self.features))
        waves = torch.cat([angles.cos(), angles.sin()], dim=2).flatten(1) / math.sqrt(self.features)
        return torch.cat([z / math.sqrt(z.shape[1]), waves], dim=1) if self.linear else waves

    def divisors(self) -> list[float]:
        """The number that the features of each kernel are divided by."""
        linear = [math.sqrt(self.frequencies.shape[0])] if self.linear else []
        return linear + [math.sqrt(self.features)] * len(self.lengths)

    def by_kind(self, columns: Tensor) -> list[Tensor]:
        """Of the features' numbers (K,) those of z, of the cosines and of the sines."""
        linear, waves = columns.split([self.linear * self.frequencies.shape[0], 2 * self.frequencies.shape[1]])
        cosines, sines = waves.view(len(self.lengths), 2, self.features).unbind(dim=1)
        return [linear, cosines.flatten(), sines.flatten()]


def orthogonal_frequencies(width: int, count: int, generator: torch.Generator) -> Tensor:
    """Frequencies of the radial kernel of length 1 (F, count), each normal up to its sign, which no cosine of a
    difference depends on, and orthogonal in groups of F."""
    groups = []
    for _ in range(-(-count // width)):
        direction, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        length = torch.randn(width, width, generator=generator, dtype=torch.float64).norm(dim=0)
        groups.append(direction * length)
    return torch.cat(groups, dim=1)[:, :count].float()


class KernelHead(nn.Module):
    """ŷ on the standardised target scale, by P regressions: linear maps of all views' kernel features.

    *Shape:* {view: (N, F_v)} → (R, P, N)

    Args:
        widths: F_v of every view.
        config: Lengths, numbers of features, and which views have no linear kernel.
        rows: R, training sets whose regressions it holds.
    """

    coefficients: Tensor
    divisors: Tensor
    order: Tensor

    def __init__(self, widths: Mapping[str, int], config: EnsembleConfig, rows: int = 1) -> None:
        super().__init__()
        self.steps, self.lengths = config.steps, sorted(config.lengths)
        self.nests, self.radial = config.kernel, config.radial
        lengths = {POSITION: config.position_lengths, LOCAL: config.local_lengths}
        self.views = ByName(
            {
                view: ViewKernels(
                    width,
                    lengths=lengths.get(view, config.lengths),
                    linear=view not in (*config.not_linear, LOCAL),
                    features=config.features * (LOCAL_FREQUENCIES if view == LOCAL else 1),
                    standardize=view != PROMPT,
                    limit=config.clip,
                )
                for view, width in widths.items()
            }
        )
        self.register_buffer("coefficients", torch.zeros(rows, len(self.regressions()), sum(self.sizes)))
        views = [view for _, view in self.views.items() if isinstance(view, ViewKernels)]
        divisors = torch.tensor([divisor for view in views for divisor in view.divisors()])
        self.register_buffer("divisors", repeated(divisors, self.sizes, dim=0), persistent=False)
        columns = torch.arange(sum(self.sizes)).split([sum(view.sizes) for view in views])
        kinds = zip(*(view.by_kind(own) for view, own in zip(views, columns, strict=True)), strict=True)
        self.register_buffer("order", torch.cat([part for kind in kinds for part in kind]), persistent=False)

    @property
    def sizes(self) -> list[int]:
        """Features of every kernel, in order."""
        return [size for view in self.views for size in self.views[view].sizes]  # type: ignore[union-attr]

    def regressions(self) -> dict[str, list[int]]:
        """The kernels of every regression, by the regression's name: all, then without the shortest length, and so on;
        and last, where asked, all but the linear ones of what is counted. Positions keep their lengths."""
        lengths: list[float] = []
        linear: set[int] = set()
        for name in self.views:
            view = self.views[name]
            assert isinstance(view, ViewKernels)
            own = [math.inf] * len(view.lengths) if name in (POSITION, LOCAL) else list(view.lengths)
            linear |= {len(lengths)} if view.linear and name != PROMPT else set()
            lengths += [math.inf] * view.linear + own
        nests = self.lengths if self.nests else []
        named = {
            f"kernels from {least:g}": [q for q, length in enumerate(lengths) if length >= least] for least in nests
        }
        radial = [q for q in range(len(lengths)) if q not in linear]
        return named | ({RADIAL: radial} if self.radial else {})

    def local(self) -> set[int]:
        """The kernels of :data:`LOCAL`."""
        first = 0
        for name in self.views:
            stop = first + len(self.views[name].sizes)  # type: ignore[arg-type]
            if name == LOCAL:
                return set(range(first, stop))
            first = stop
        return set()

    def fit_features(self, inputs: Mapping[str, Tensor], seed: int) -> None:
        """Fix statistics and frequencies. No label is used."""
        generator = torch.Generator().manual_seed(seed)
        for view in self.views:
            self.views[view].fit(inputs[view], generator)  # type: ignore[operator]

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """All kernels' features side by side (N, ΣK)."""
        return torch.cat([self.views[view](inputs[view]) for view in self.views], dim=1)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        # All views' waves at once, and the coefficients in that order: the fewer nodes, the sooner a graph starts.
        views = {name: view for name, view in self.views.items() if isinstance(view, ViewKernels)}
        own = {name: (view.standardize, inputs[name]) for name, view in views.items() if view.standardize is not None}
        z = {**inputs, **standardized(own)}
        coefficients = (self.coefficients / self.divisors).index_select(2, self.order).flatten(0, 1).t()

        def tile(rows: Rows) -> tuple[Tensor]:  # 6,000 numbers a region: 2.4 GB at 100,000 regions
            seen = {name: take(z[name], rows) for name in views}
            # In half, or with frequencies of few bits, these would be the features of another kernel (.precision).
            angles = torch.cat([torch.mm(seen[name], view.frequencies) for name, view in views.items()], dim=1)
            linear = [seen[name] for name, view in views.items() if view.linear]
            kinds = [*([torch.cat(linear, dim=1)] if linear else []), angles.cos(), angles.sin()]
            ends = list(accumulate(kind.shape[1] for kind in kinds))
            # Slices and no split, which is not computed in advance. mm, which half leaves alone (.half_precision); the
            # features are the large side, and are not transposed.
            out = torch.mm(kinds[0], coefficients[: ends[0]])  # (t, R·P)
            for kind, start, end in zip(kinds[1:], ends, ends[1:], strict=False):
                out = out + torch.mm(kind, coefficients[start:end])
            return (out,)

        (out,) = in_tiles(next(iter(z.values())).shape[0], tile)
        return out.t().unflatten(0, self.coefficients.shape[:2])


@dataclass(frozen=True, kw_only=True)
class KernelFit:
    """Fits of S training sets: coefficients (S, ΣK) of :class:`KernelHead`, kernel weights (S, Q), noise (S,)."""

    coefficients: Tensor
    weights: Tensor
    noise: Tensor


def maximise_evidence(
    features: Tensor,
    sizes: Sequence[int],
    targets: Tensor,
    known: Tensor,
    *,
    steps: int,
    like: Sequence[int] | None = None,
    local: Sequence[int] = (),
) -> KernelFit:
    """Gaussian process regression whose kernel weights and noise maximise the evidence (type II, MacKay 1992).

    −log p(y) = ½ yᵀC⁻¹y + ½ log|C| + const with C = Σ_q w_q K_q + σ²I, over a training set's regions; a log-normal
    prior of deviation :data:`PRIOR_DEVIATION` keeps every w_q near 1/Q. All in float64, training sets side by side.

    Args:
        features: (N, ΣK), of all regions.
        sizes: Features of each of the Q kernels.
        targets: (S, N), standardised; anything where not known.
        known: bool (S, N): the regions that a training set holds.
        steps: Steps of Adam on the logarithms of w and σ².
        like: For every training set, the one whose kernel weights and noise it takes: its own number, or that of one
            that holds all of its regions. By default each has its own.
        local: Kernels that a training set has only if they raise its log evidence by more than :data:`VERY_STRONG`.
    """
    phi = features.double()
    like = list(range(len(known))) if like is None else list(like)
    own_rows = sorted(set(like))
    everything = known, torch.where(known, targets.double(), 0.0)
    y, known = everything[1][own_rows], known[own_rows]
    m = known.double()
    if len(phi) <= EVIDENCE_REGIONS and 2 * int(known.any(dim=0).sum()) >= len(phi):
        chunk = max(1, BATCH // len(phi) ** 2)
        turns = [(phi, *turn) for turn in zip(y.split(chunk), m.split(chunk), strict=True)]
    else:
        # Of a large city, or of one with few labels, each on its own regions, or as many of them as are drawn: what
        # another training set knows makes no difference.
        some = [draw_regions(row, EVIDENCE_REGIONS) for row in known]
        turns = [(phi[i], own[None, i], m[r, None, i]) for r, (i, own) in enumerate(zip(some, y, strict=True))]
    logs = torch.cat([_with_local(*turn, sizes, steps, local) for turn in turns])
    taken = [own_rows.index(row) for row in like]
    weights, noise = logs[taken, :-1].exp(), logs[taken, -1].exp()
    known, y = everything
    per_feature = repeated(weights, sizes, dim=1)  # (S, ΣK)
    coefficients = torch.stack([_solve(phi, *row) for row in zip(y, known, per_feature, noise, strict=True)])
    return KernelFit(coefficients=coefficients, weights=weights, noise=noise)


def draw_regions(known: Tensor, most: int) -> Tensor:
    """At most so many of a training set's regions, in order.

    Args:
        known: bool (N,), the training set.
    """
    return drawn(known.nonzero()[:, 0], most, torch.Generator().manual_seed(0))


def _with_local(
    phi: Tensor, y: Tensor, known: Tensor, sizes: Sequence[int], steps: int, local: Sequence[int]
) -> Tensor:
    """Of :func:`_maximise`, with the weight 0 for local kernels where the evidence for them is not very strong."""
    kernels = torch.stack([(part @ part.T).flatten() for part in phi.split(list(sizes), dim=1)])  # (Q, n²)
    logs, evidence = _maximise(kernels, y, known, steps)
    if not local:
        return logs
    kept = [q for q in range(len(sizes)) if q not in local]
    fewer, without = _maximise(kernels[kept], y, known, steps)
    padded = torch.full_like(logs, -math.inf)
    padded[:, [*kept, len(sizes)]] = fewer
    return torch.where((evidence > without + VERY_STRONG)[:, None], logs, padded)


def _maximise(kernels: Tensor, y: Tensor, known: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Logarithms of the kernels' weights and, last, of the noise (S, Q + 1); the log evidence there, up to a constant
    (S,)."""
    q = len(kernels)
    start = torch.tensor([-math.log(q)] * q + [math.log(NOISE)], dtype=y.dtype, device=y.device).repeat(len(y), 1)
    logs = start.clone()
    adam = torch.optim.Adam([logs], lr=RATE)
    for _ in range(steps):
        _, gradient = log_evidence(logs, kernels, y, known)
        logs.grad = (logs - start) / PRIOR_DEVIATION**2 - gradient
        adam.step()
    return logs, log_evidence(logs, kernels, y, known)[0]


def log_evidence(logs: Tensor, kernels: Tensor, y: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """The log evidence of S training sets up to a constant, −½ yᵀα − ½ log|C| with α = C⁻¹y, and its gradient by the
    logarithms: ½ w_q tr((ααᵀ − C⁻¹) K_q), and σ² in place of w_q and K_q (Rasmussen & Williams 2006, equation 5.9).

    By formula it takes a half to a third of the time of PyTorch's gradient of a Cholesky factor.

    *Shape:* logs (S, Q + 1), kernels (Q, n²), y and known (S, n) → (S,), (S, Q + 1)
    """
    weights, noise = logs[:, :-1].exp(), logs[:, -1:].exp()
    pairs = known[:, :, None] * known[:, None, :]
    covariance = (weights @ kernels).view_as(pairs) * pairs
    # What is not known is alone, with variance 1 and target 0: a factor 1 of the evidence.
    covariance.diagonal(dim1=1, dim2=2).add_(known * noise + (1 - known))
    factor = torch.linalg.cholesky(covariance)
    alpha = torch.cholesky_solve(y[..., None], factor)  # (S, n, 1)
    evidence = -0.5 * (y * alpha[..., 0]).sum(dim=1) - factor.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    rest = (alpha @ alpha.mT - torch.cholesky_inverse(factor)) * pairs
    by_noise = rest.diagonal(dim1=1, dim2=2).sum(dim=1, keepdim=True)
    return evidence, 0.5 * torch.cat([weights * (rest.flatten(1) @ kernels.T), noise * by_noise], dim=1)


def _solve(phi: Tensor, y: Tensor, known: Tensor, weights: Tensor, noise: Tensor) -> Tensor:
    """Coefficients (ΣK) of one training set: the posterior mean, w Φᵀ (Φ w Φᵀ + σ²I)⁻¹ y over its n regions, and for
    more regions than features the same as √w (√w ΦᵀΦ √w + σ²I)⁻¹ √w Φᵀ y: nothing is n × n then."""
    used = weights > 0  # a training set without local kernels needs none of their many features
    if not used.all():
        coefficients = torch.zeros_like(weights)
        coefficients[used] = _solve(phi[:, used], y, known, weights[used], noise)
        return coefficients
    seen = phi[known]
    if len(seen) > seen.shape[1]:
        root = weights.sqrt()
        scaled = seen * root
        precision = scaled.T @ scaled + noise * torch.eye(len(root), dtype=phi.dtype, device=phi.device)
        return root * torch.linalg.solve(precision, scaled.T @ y[known])
    scaled = seen * weights
    covariance = seen @ scaled.T + noise * torch.eye(len(seen), dtype=phi.dtype, device=phi.device)
    return scaled.T @ torch.linalg.solve(covariance, y[known])
