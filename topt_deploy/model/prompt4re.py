"""Stage 2, Prompt4RE: task-aware prompting of region embeddings (ToPT, section "Prompt4RE").

A head is M members with weights of their own that are computed as one batch. In training the members are the
folds and the final fit; in a deployed model they are the final fit, or an ensemble of it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from topt_deploy.config.settings import Prompt4ReConfig

from .layers import Dropout
from .row_tiles import Rows, for_each, in_tiles, take


class PromptBasis(nn.Module):
    """The frozen first step of a head: prompt vectors, standardised, in the basis of the training city.

    Prompts of N regions span at most N of the H ≫ N dimensions, and a gradient never leaves their span. So the
    vectors are standardised per dimension and rotated onto their R principal directions once; what is trained
    works on R numbers instead of H. With all components kept, any linear map of the vectors can still be had.

    *Shape:* (N, H) → (N, R)
    """

    mean: Tensor
    basis: Tensor

    def __init__(self, *, prompt_width: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(prompt_width))
        self.register_buffer("basis", torch.zeros(prompt_width, rank))

    @classmethod
    def fit(cls, prompts: Tensor, components: int = 0) -> "PromptBasis":
        """Fix the basis from the training city's prompts (N, H). Components are scaled to unit mean square in all.

        Args:
            prompts: All regions' vectors; no label is used.
            components: How many principal components to keep; 0 keeps all.
        """
        x = prompts.double()
        mean = x.mean(dim=0)
        std = x.std(dim=0, correction=0)
        scale = torch.where(std > 1e-6 * (1 + x.abs().amax(dim=0)), std, torch.inf)  # a constant carries nothing
        _, singular, right = torch.linalg.svd((x - mean) / scale, full_matrices=False)
        keep = int((singular > singular.amax() * 1e-5).sum())
        keep = max(1, min(keep, components or keep))
        # A fixed sign makes the basis the same on every machine: the largest entry of a direction is positive.
        right = right[:keep]
        largest = right.gather(1, right.abs().argmax(dim=1, keepdim=True))
        right = right * torch.where(largest < 0, -1.0, 1.0)
        size = singular[:keep].square().mean().div(len(x)).sqrt().clamp(min=1e-12)
        module = cls(prompt_width=x.shape[1], rank=keep)
        module.mean.copy_(mean)
        module.basis.copy_(right.T / scale[:, None] / size)
        return module

    def forward(self, prompts: Tensor) -> Tensor:
        # Real encoders' few huge dimensions, and the small entries that scale them, are beyond half (.precision).
        return torch.mm(prompts - self.mean, self.basis)


class MemberLinear(nn.Module):
    """M linear maps side by side.

    *Shape:* (M or 1, N, I) → (M, N, O)
    """

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class MemberLayerNorm(nn.Module):
    """M layer norms side by side.

    *Shape:* (M, N, W) → (M, N, W)
    """

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, 1, width))
        self.bias = nn.Parameter(torch.zeros(members, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:]) * self.weight + self.bias


class Alignment(nn.Module):
    """Prompt–region alignment: multi-head cross-attention, queries from E, keys and values from the prompts.

    P' = LayerNorm(MHA(E, P) + E·W_res).

    *Shape:* E (1, N, I), prompts (1, N, R) → (M, N, W), W the width of the values
    """

    def __init__(self, *, members: int, inputs: int, inner: int, rank: int, config: Prompt4ReConfig) -> None:
        super().__init__()
        self.heads = config.heads
        values = config.value_width or inner
        self.query = MemberLinear(members, inputs, inner)
        self.key = MemberLinear(members, rank, inner)
        self.value = MemberLinear(members, rank, values)
        self.residual = MemberLinear(members, inputs, values)
        self.norm = MemberLayerNorm(members, values)
        self.dropout = Dropout(config.dropout)

    def _split(self, x: Tensor) -> Tensor:
        """(M, N, W) → (M, heads, N, W / heads)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, embedding: Tensor, prompts: Tensor) -> Tensor:
        q, k, v = (
            self._split(self.query(embedding)),
            self._split(self.key(prompts)),
            self._split(self.value(prompts)),
        )
        q, to = q / math.sqrt(q.shape[-1]), k.transpose(-1, -2)  # once, and not for every tile

        def attend(q: Tensor, to: Tensor, v: Tensor) -> Tensor:
            return self.dropout((q @ to).softmax(dim=-1)) @ v  # (…, heads, t, W / heads), from (…, heads, t, N)

        def tile(rows: Rows) -> tuple[Tensor]:
            mixed = for_each(attend, take(q, rows, 2), to, v)
            return (mixed.transpose(1, 2).flatten(-2),)  # (M, t, W)

        (mixed,) = in_tiles(q.shape[2], tile, axis=1)
        out: Tensor = self.norm(mixed + self.residual(embedding))
        return out


class Prompt4Re(nn.Module):
    """A task's head: soft prompt S from the prompts, F = [E ‖ S], ŷ = FNN(F), for M members at once.

    *Shape:* E (N, I), prompts (N, R) or None → ŷ (M, N), on the standardised target scale

    Args:
        members: M.
        inputs: I, what the head sees of a region: D, or more where features are passed along (``skip``).
        width: D, the width of the soft prompt unless the settings give another.
        rank: R, the width of :class:`PromptBasis`; 0 without prompts.
        config: Stage-2 settings. ``alignment`` off projects the prompts instead of aligning them.
    """

    def __init__(self, *, members: int, inputs: int, width: int, rank: int, config: Prompt4ReConfig) -> None:
        super().__init__()
        self.prompted = rank > 0
        self.alignment = None
        inner, width = config.width or width, config.soft_prompt or width
        if self.prompted:
            if config.alignment:
                self.alignment = Alignment(members=members, inputs=inputs, inner=inner, rank=rank, config=config)
            aligned = config.value_width or inner
            self.soft_prompt = MemberLinear(members, aligned if config.alignment else rank, width)
        joined = inputs + width if self.prompted else inputs
        self.linear = MemberLinear(members, joined, 1)
        nn.init.normal_(self.linear.weight, std=math.sqrt(2 / (joined + 1)))  # Xavier, as the authors have it
        self.hidden = self.hidden_out = None
        if config.hidden:
            self.hidden = MemberLinear(members, joined, config.hidden)
            self.hidden_out = MemberLinear(members, config.hidden, 1)
            nn.init.zeros_(self.hidden_out.weight)  # so that the FNN starts from the ridge fit as well
        self.dropout = Dropout(config.dropout)

    def start_from_ridge(self, fit: "RidgeFit", *, prompts_from_zero: bool) -> None:
        """Set the FNN's E part from ridge fits, and the soft prompt's part, if asked, to zero."""
        with torch.no_grad():
            if prompts_from_zero:
                self.linear.weight.zero_()
            self.linear.weight[:, : fit.coefficients.shape[1], 0] = fit.coefficients
            self.linear.bias[:, 0, 0] = fit.intercepts

    def forward(self, embedding: Tensor, prompts: Tensor | None) -> Tensor:
        joined = embedding[None]  # (1, N, I)
        if self.prompted:
            assert prompts is not None
            source = prompts[None] if self.alignment is None else self.alignment(joined, prompts[None])
            soft = self.soft_prompt(source)  # S (M, N, D)
            joined = torch.cat([joined.expand(len(soft), -1, -1), soft], dim=-1)  # F = [E ‖ S]
        out = self.linear(joined)
        if self.hidden is not None and self.hidden_out is not None:
            out = out + self.hidden_out(self.dropout(torch.relu(self.hidden(joined))))
        return out.squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class RidgeFit:
    """Ridge regressions of M members.

    Attributes:
        coefficients: (M, I).
        intercepts: (M,).
        alphas: The α of each (M,).
        left_out: The prediction of every region that a member is fitted on by the fit without it (M, N), anything for
            the others; None where α was given.
    """

    coefficients: Tensor
    intercepts: Tensor
    alphas: Tensor
    left_out: Tensor | None = None


ALPHAS = tuple(10 ** (k / 2) for k in range(-2, 9))
"""The grid that leave-one-out chooses α from: 0.1 to 10⁴ by half decades."""


def ridge(x: Tensor, y: Tensor, weights: Tensor, alpha: float) -> RidgeFit:
    """Ridge regressions with an unpenalised intercept, one per member, in float64.

    One singular value decomposition per member gives the fit, and the exact leave-one-out errors, for every α.

    Args:
        x: (N, I).
        y: (M, N).
        weights: (M, N) ∈ {0, 1}: the regions that a member is fitted on.
        alpha: α; 0 lets every member choose its own by leave-one-out among its own regions.
    """
    x, y, weights = x.double(), y.double(), weights.double()
    count = weights.sum(dim=1, keepdim=True)
    mean_x = weights @ x / count  # (M, I)
    mean_y = (weights * y).sum(dim=1, keepdim=True) / count
    u, s, vt = torch.linalg.svd((x[None] - mean_x[:, None]) * weights[..., None], full_matrices=False)
    target = (y - mean_y) * weights
    rotated = (u * target[..., None]).sum(dim=1)  # (M, R) = Uᵀy
    left_out = None
    if alpha:
        alphas = torch.full_like(count[:, 0], alpha)
    else:
        grid = torch.tensor(ALPHAS, dtype=x.dtype, device=x.device)
        shrink = s[:, None].square() / (s[:, None].square() + grid[:, None])  # (M, A, R)
        fitted = torch.einsum("mnr,mar->man", u, shrink * rotated[:, None])
        leverage = torch.einsum("mnr,mar->man", u.square(), shrink) + 1 / count[:, None]
        # A region that decides its own fit has leverage 1; the clamp makes its α lose instead of dividing by zero.
        error = (target[:, None] - fitted) / (1 - leverage).clamp(min=1e-9)
        best = (error.square() * weights[:, None]).sum(dim=2).argmin(dim=1)
        alphas, left_out = grid[best], y - error[torch.arange(len(y), device=x.device), best]
    scaled = rotated * s / (s.square() + alphas[:, None]).clamp(min=1e-300)
    coefficients = (vt * scaled[..., None]).sum(dim=1)
    intercepts = mean_y[:, 0] - (coefficients * mean_x).sum(dim=1)
    return RidgeFit(coefficients=coefficients, intercepts=intercepts, alphas=alphas, left_out=left_out)
