"""Configuration: small frozen dataclasses, read from TOML, stored as JSON beside the weights.

A file names a ``preset`` to start from and overrides what it likes. ``[srel]``, ``[prompt4re]`` and
``[target]`` hold for every task; ``[tasks.NAME.srel]`` and so on for one. Tasks exist only here: a task's
name is the name of its label column.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

DEFAULT_PRESET = "default"
CONFIG_FILE = "topt.toml"
RESERVED_VIEWS = {
    "leverage",
    "mobility",
    "mobility_log",
    "mobility_two_hops",
    "trips",
    "destinations",
    "position",
    "local",
    "prompt",
}
RESERVED_TASKS = {
    "region_id", "city_id", "geometry", "lon", "lat", "task", "prediction", "lower", "upper", "status", "reason",
    "mobility", "mobility_log", "mobility_two_hops", "trips", "destinations", "position", "leverage",
}  # fmt: skip
"""Columns of the contract's tables, and inputs of the graph; a task is a column and an output beside them."""


@dataclass(frozen=True)
class Bounds:
    """The values that a number may take: ``low ≤ x < high``."""

    low: float = 0
    high: float = math.inf


Positive = Annotated[int, Bounds(1)]
Share = Annotated[float, Bounds(0, 1)]


@dataclass(frozen=True, kw_only=True)
class SrelConfig:
    """Stage 1, spatial-aware region embedding learning (SREL). Tasks with equal settings share one embedding.

    Attributes:
        width: D, the width of every layer and of the embedding.
        heads: Attention heads of the intra-view blocks and of the Graphormer layers.
        intra_blocks: Intra-view blocks.
        inter_blocks: External-attention blocks.
        layers: Graphormer layers.
        ffn_width: Inner width of the feed-forward layers.
        memory: d_m, slots of the external attention's memory.
        channels: c, channels that an attention score is expanded to.
        view_width: d', width of the view-weight score.
        deep_fc: Close every view's encoder, the external attention and the whole with HAFusion's fully connected
            layers, and start the external attention as HAFusion does. The paper's form.
        inputs: ``context`` reads log1p counts and what flows lead to, standardised, which fits any city. ``rows`` reads
            raw counts and every region's row of the OD matrix, as HAFusion does: the weights fit one city and an order
            of its regions, so that it can be evaluated under `paper` and not deployed.
        distance_bias: Use distances as a bias of the attention. Off is an ablation.
        centrality: Use the centrality of regions. Off is an ablation.
        bias: λ at the start, the weight of the adjacency in the attention scores.
        decay: The adjacency's form: exp(-d/ℓ), exp(-(d/ℓ)²) or 1/(1+d/ℓ).
        decay_length_m: ℓ in metres; 0 takes the city's median distance to the fifth nearest region.
        dropout: Share of hidden values that are dropped in training.
        epochs: Epochs of training.
        lr: Learning rate.
        schedule: How the learning rate changes over the epochs.
        weight_decay: Weight decay.
        decoupled: Decoupled weight decay (AdamW) in place of L2 in the gradient (Adam).
        mobility_weight: Weight of the loss term for flows. It sums over N² pairs.
        similarity_weight: Weight of the loss term for the similarity of views.
        balanced: Take the loss term for flows as a mean over pairs, relative to what equal shares would give, so that
            it is of the size of the others. Off is the paper's sum.
        regions: Train each epoch on at most this many regions, drawn anew, so that its time does not grow with N². 0
            is all of them, the paper's form.
    """

    width: Positive = 144
    heads: int = 1
    intra_blocks: int = 1
    inter_blocks: int = 2
    layers: int = 2
    ffn_width: Positive = 144
    memory: Positive = 36
    channels: Positive = 32
    view_width: Positive = 32
    deep_fc: bool = False
    inputs: Literal["context", "rows"] = "context"
    distance_bias: bool = True
    centrality: bool = True
    bias: float = 0.1
    decay: Literal["exponential", "gaussian", "inverse"] = "exponential"
    decay_length_m: float = 0.0
    dropout: Share = 0.1
    epochs: int = 4000
    lr: float = 7e-4
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 5e-4
    decoupled: bool = False
    mobility_weight: float = 1.0
    similarity_weight: float = 1.0
    balanced: bool = False
    regions: int = 0


@dataclass(frozen=True, kw_only=True)
class Prompt4ReConfig:
    """Stage 2, task-aware prompting (Prompt4RE).

    Attributes:
        enabled: Off is the ablation without Prompt4RE: a regression on the embedding.
        prompt: ``task`` reads ``prompt_<task>``; ``none`` reads ``prompt_none``, the ablation without
            task-relevant prompt.
        alignment: Off is the ablation without alignment: the prompt is projected and concatenated.
        components: Principal components of the prompt vectors that are kept; 0 keeps all.
        width: Width of the attention; 0 takes the embedding's. The authors' code has the prompt's own.
        value_width: Width of the attention's values; 0 takes ``width``.
        soft_prompt: Width of the soft prompt; 0 takes the embedding's.
        heads: Attention heads.
        skip: Besides the embedding, the head also sees the features and prompts themselves, standardised.
        hidden: Width of a hidden layer in the FNN; 0 is the paper's single linear layer.
        dropout: Share of hidden values that are dropped in training.
        epochs: Epochs of training.
        lr: Learning rate.
        schedule: How the learning rate changes over the epochs.
        weight_decay: Weight decay.
        decoupled: Decoupled weight decay (AdamW) in place of L2 in the gradient (Adam).
        ridge_alpha: α of the ridge fit that the FNN starts from; 0 chooses it by leave-one-out, inside the training
            regions of each fold.
        ridge_penalty: Keep α's penalty in the loss and start the prompt's part at zero, so that training moves away
            from the ridge fit only for what the prompts explain. Off is the paper: training starts from the ridge fit.
        regions: Train each epoch on at most this many regions of a city, drawn anew, so that its time does not grow
            with N². 0 takes all.
        members: Independently initialised heads whose mean is the prediction.
        folds: Folds of the held-out estimate.
        fold_seed: Seed of the folds: KFold(folds, shuffle=True, random_state=fold_seed).
    """

    enabled: bool = True
    prompt: Literal["task", "none"] = "task"
    alignment: bool = True
    components: int = 0
    width: int = 0
    value_width: int = 0
    soft_prompt: int = 0
    heads: int = 4
    skip: bool = False
    hidden: int = 0
    dropout: Share = 0.1
    epochs: int = 3000
    lr: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 0.0
    decoupled: bool = False
    ridge_alpha: float = 1.0
    ridge_penalty: bool = False
    regions: int = 0
    members: Positive = 1
    folds: int = 10
    fold_seed: int = 2024


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """The default's head: ToPT's two stages beside plain regressions on the same views, what flows lead to, positions
    and prompts. The section ``prompt4re`` says which prompts, and how many of their components.

    Attributes:
        enabled: Off is the paper's form.
        kernel: Use the Gaussian processes. Off is an ablation.
        network: Use the networks. Off is an ablation.
        trees: Extremely randomised trees, such as 64; 0 leaves them out. They help in some cities with many labels, and
            a bundle takes longer to predict with them (dev/LOG.md).
        trees_labels: Labels that the smallest training set of a task needs for the trees.
        tree_depth: Their depth, at most.
        radial: Predict regions unlike the labelled ones by one more Gaussian process, which has no linear kernels of
            what is counted.
        topt: Use SREL's embedding with a Prompt4RE head on it.
        embedding: Use SREL's embedding in the Prompt4RE head. Off is the ablation without SREL: the head has the
            features and prompts alone.
        inner_folds: Folds within each training set that decide the weights of the parts; below 2 all weigh the same.
        clip: A standardised feature counts no further from the mean than this many standard deviations; 0 is no limit.
        lengths: Lengthscales of the radial kernels of every view, in units of a standardised feature's spread. There
            are as many Gaussian processes: one with all of them, one without the shortest, and so on.
        position_lengths: The same for the positions.
        local_lengths: Further lengthscales of the positions, short ones, for what regions next to each other have in
            common. A training set has them only if the evidence for them is very strong.
        not_linear: Views without a linear kernel: those in which a region's values may lie far outside the others'.
        features: Random frequencies of every radial kernel.
        steps: Steps of evidence maximisation.
        members: Networks in the ensemble.
        width: Width of the networks.
        layers: Residual layers of the networks.
        input_dropout: Share of the features that are dropped in training.
        dropout: Share of hidden values that are dropped in training.
        epochs: Epochs of training.
        lr: Learning rate.
        schedule: How the learning rate changes over the epochs.
        weight_decay: Weight decay.
        decoupled: Decoupled weight decay (AdamW) in place of L2 in the gradient (Adam).
    """

    enabled: bool = False
    kernel: bool = True
    network: bool = True
    trees: Annotated[int, Bounds(0)] = 0
    trees_labels: Annotated[int, Bounds(0)] = 0
    tree_depth: Annotated[int, Bounds(1, 12)] = 6
    radial: bool = False
    topt: bool = False
    embedding: bool = True
    inner_folds: int = 0
    clip: Annotated[float, Bounds(0)] = 0.0
    lengths: tuple[float, ...] = (0.7, 1.5)
    position_lengths: tuple[float, ...] = (0.3, 1.0)
    local_lengths: tuple[float, ...] = ()
    not_linear: tuple[str, ...] = ("land_use", "position", "destinations")
    features: Positive = 128
    steps: int = 60
    members: Positive = 4
    width: Positive = 32
    layers: int = 2
    input_dropout: Share = 0.4
    dropout: Share = 0.3
    epochs: int = 600
    lr: float = 5e-3
    schedule: Literal["constant", "cosine"] = "cosine"
    weight_decay: float = 1e-2
    decoupled: bool = True


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """How counts enter the loss.

    Attributes:
        transform: The transform that is applied to counts before the Gaussian likelihood; predictions are
            transformed back. ``auto`` is ``cbrt``, or ``none`` in a training set whose counts a ridge predicts better
            without the root.
        likelihood: ``gaussian`` is the paper's squared error; the others have a log link on the count itself.
        drop_zeros: Leave regions with a zero count out of training and of the held-out figures (the published
            protocol for check-ins). They still get a prediction.
        extrapolate: Allow predictions further beyond the training labels than their spread supports
            (:data:`topt_deploy.model.target.BEYOND`).
    """

    transform: Literal["none", "sqrt", "cbrt", "log1p", "auto"] = "none"
    likelihood: Literal["gaussian", "poisson", "negative_binomial"] = "gaussian"
    drop_zeros: bool = False
    extrapolate: bool = False


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One task's settings."""

    srel: SrelConfig = field(default_factory=SrelConfig)
    prompt4re: Prompt4ReConfig = field(default_factory=Prompt4ReConfig)
    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
    target: TargetConfig = field(default_factory=TargetConfig)

    def with_labels(self, labels: int) -> "TaskConfig":
        """The settings for so many labels: without trees where these are too few, and something else is there."""
        own = self.ensemble
        if labels >= own.trees_labels or not (own.kernel or own.network or own.topt):
            return self
        return dataclasses.replace(self, ensemble=dataclasses.replace(self.ensemble, trees=0))

    @property
    def embeds(self) -> bool:
        """True if the task builds on an embedding."""
        return not self.ensemble.enabled or (self.ensemble.topt and self.ensemble.embedding)

    def prompt_column(self, task: str) -> str | None:
        """The column the task's prompt vectors are read from; None without prompts."""
        if not self.prompt4re.enabled:
            return None
        return "prompt_none" if self.prompt4re.prompt == "none" else f"prompt_{task}"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of a training run.

    Attributes:
        preset: The preset that the settings start from.
        seed: Seed of every random number in training.
        views: Count columns to read, by the prefix of their names.
        mobility: Read flows.
        checkpoint_every: Epochs between checkpoints.
        tasks: Settings per task, by label column.
    """

    preset: str = DEFAULT_PRESET
    seed: int = 0
    views: tuple[str, ...] = ("poi", "land_use")
    mobility: bool = True
    checkpoint_every: Positive = 500
    tasks: Mapping[str, TaskConfig] = field(default_factory=dict)

    def prompt_columns(self) -> tuple[str, ...]:
        """Every prompt column that some task reads, once."""
        columns = (task.prompt_column(name) for name, task in self.tasks.items())
        return tuple(dict.fromkeys(column for column in columns if column is not None))

    def embeddings(self) -> dict[str, SrelConfig]:
        """The distinct stage-1 models: name (of the first task that uses it) and settings."""
        groups: dict[SrelConfig, str] = {}
        for name, task in self.tasks.items():
            if task.embeds:
                groups.setdefault(task.srel, name)
        return {name: srel for srel, name in groups.items()}

    def embedding_of(self, task: str) -> str:
        """The name, among :meth:`embeddings`, of the stage-1 model that ``task`` builds on."""
        return next(name for name, srel in self.embeddings().items() if srel == self.tasks[task].srel)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    def as_json(self) -> str:
        """JSON text that :func:`.load.config_from_dict` reads back."""
        return json.dumps(self.as_dict(), indent=2)
