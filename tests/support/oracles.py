"""The model's equations once more, as slow loops over plain numbers in float64, to compare with."""

import math
from collections.abc import Callable

import numpy as np

Array = np.ndarray


def array(tensor) -> Array:
    """A tensor's values in float64."""
    return tensor.detach().double().numpy()


def linear(x: Array, module) -> Array:
    """x (N, I) through a torch.nn.Linear, one product at a time."""
    weight = array(module.weight)
    bias = array(module.bias) if module.bias is not None else np.zeros(len(weight))
    out = np.zeros((len(x), len(weight)))
    for n in range(len(x)):
        for o in range(len(weight)):
            out[n, o] = bias[o] + sum(weight[o, i] * x[n, i] for i in range(x.shape[1]))
    return out


def softmax(values) -> list[float]:
    """Softmax of a few numbers."""
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
    """Layer norm of every row."""
    out = np.zeros_like(x)
    for n, row in enumerate(x):
        mean = sum(row) / len(row)
        variance = sum((v - mean) ** 2 for v in row) / len(row)
        out[n] = [(v - mean) / math.sqrt(variance + eps) * w + b for v, w, b in zip(row, weight, bias, strict=True)]
    return out


def attention(q: Array, k: Array, v: Array, heads: int, bias: Array | None = None) -> tuple[Array, Array]:
    """Multi-head attention, query by query: mixed values (N, W), head-averaged weights (N, N)."""
    n, width = q.shape
    size, values = width // heads, v.shape[1] // heads
    mixed, average = np.zeros(v.shape), np.zeros((n, len(k)))
    for h in range(heads):
        part, own = slice(h * size, (h + 1) * size), slice(h * values, (h + 1) * values)
        for i in range(n):
            scores = []
            for j in range(len(k)):
                score = sum(a * b for a, b in zip(q[i, part], k[j, part], strict=True)) / math.sqrt(size)
                scores.append(score + (0.0 if bias is None else bias[i, j]))
            for j, weight in enumerate(softmax(scores)):
                mixed[i, own] += weight * v[j, own]
                average[i, j] += weight / heads
    return mixed, average


def self_attention(x: Array, module, bias: Array | None = None) -> tuple[Array, Array]:
    """topt_deploy.model.layers.SelfAttention."""
    projected = linear(x, module.qkv)
    width = x.shape[1]
    q, k, v = projected[:, :width], projected[:, width : 2 * width], projected[:, 2 * width :]
    mixed, weights = attention(q, k, v, module.heads, bias)
    return linear(mixed, module.out), weights


def feed_forward(x: Array, update: Array, module) -> Array:
    """topt_deploy.model.layers.FeedForward."""
    x = layer_norm(x + update, array(module.norm1.weight), array(module.norm1.bias))
    inner = np.maximum(linear(x, module.linear1), 0)
    x = x + linear(inner, module.linear2)
    return layer_norm(x, array(module.norm2.weight), array(module.norm2.bias))


def score_feature(scores: Array, module) -> Array:
    """topt_deploy.model.fusion.ScoreFeature, with the shift inside the softmax as the paper writes it."""
    a, b = array(module.scale), array(module.shift)
    n = len(scores)
    pooled = np.zeros((n, len(a)))
    for i in range(n):
        for c in range(len(a)):
            channel = [a[c] * scores[i, j] + b[c] for j in range(n)]
            pooled[i, c] = sum(w * s for w, s in zip(softmax(channel), channel, strict=True))
    return linear(pooled, module.proj)


def view_encoder(x: Array, module) -> Array:
    """topt_deploy.model.fusion.ViewEncoder."""
    x = (x - array(module.standardize.mean)) / array(module.standardize.scale)
    x = np.maximum(linear(x, module.proj), 0)
    for block in module.blocks:
        if hasattr(block, "attention"):
            mixed, weights = self_attention(x, block.attention)
            x = feed_forward(x, mixed + score_feature(weights, block.score_feature), block.feed_forward)
        else:
            x = deep_fc(x, block)
    return x


def deep_fc(x: Array, module) -> Array:
    """topt_deploy.model.layers.DeepFc: two linear maps, LeakyReLU of slope 0.3, a third, LeakyReLU."""
    first, second, _, third, _ = module
    x = leaky_relu(linear(linear(x, first), second))
    return leaky_relu(linear(x, third))


def leaky_relu(x: Array) -> Array:
    """LeakyReLU of slope 0.3."""
    return np.where(x > 0, x, 0.3 * x)


def external_attention(x: Array, module) -> Array:
    """topt_deploy.model.fusion.ExternalAttention: softmax over the views, then rows that sum to one."""
    keys, values = array(module.keys.weight), array(module.values.weight)  # (d_m, D), (D, d_m)
    n, views, _ = x.shape
    out = np.zeros_like(x)
    for i in range(n):
        score = np.array([[float(x[i, v] @ slot) for slot in keys] for v in range(views)])
        by_slot = np.array([softmax(score[:, m]) for m in range(len(keys))]).T  # (V, d_m)
        for v in range(views):
            weights = by_slot[v] / sum(by_slot[v])
            for m, weight in enumerate(weights):
                out[i, v] += weight * values[:, m]
    return out


def view_fusion(views: Array, module) -> tuple[Array, Array]:
    """topt_deploy.model.fusion.ViewFusion."""
    n, count, width = views.shape
    others = views
    for block in module.blocks:
        if hasattr(block, "keys"):
            others = external_attention(others, block)
        else:
            others = np.stack([deep_fc(one, block) for one in others])
    own, theirs = module.mix_own.item(), module.mix_others.item()
    mixed = (own * views + theirs * others) / (own + theirs)
    score = np.stack([linear(mixed[i], module.score) for i in range(n)])
    leaky: Callable[[float], float] = lambda value: value if value > 0 else 0.3 * value  # noqa: E731
    totals = []
    for v in range(count):
        total = 0.0
        for i in range(n):
            for u in range(count):
                pair = linear(score[i, v][None], module.score_from) + linear(score[i, u][None], module.score_to)
                total += leaky(float(pair[0, 0]))
        totals.append(total / (n * count))
    weights = np.array(softmax(totals))
    out = np.zeros((n, width))
    for v in range(count):
        out += weights[v] * mixed[:, v]
    return out, weights


def haversine_m(lonlat: Array, radius_m: float) -> Array:
    """Great-circle distances by the haversine formula, in float64."""
    n = len(lonlat)
    out = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            lon1, lat1, lon2, lat2 = map(math.radians, (*lonlat[i], *lonlat[j]))
            h = math.sin((lat2 - lat1) / 2) ** 2
            h += math.cos(lat1) * math.cos(lat2) * math.sin((lon2 - lon1) / 2) ** 2
            out[i, j] = 2 * radius_m * math.asin(min(1.0, math.sqrt(h)))
    return out


def srel(views: dict[str, Array], adjacency: Array, module) -> Array:
    """topt_deploy.model.srel.Srel, evaluation mode."""
    encoded = np.stack([view_encoder(views[name], encoder) for name, encoder in module.encoders.items()], axis=1)
    x, _ = view_fusion(encoded, module.fusion)
    if module.centrality is not None:
        strength = np.array([sum(row) for row in adjacency])
        x = x + linear((strength / max(strength))[:, None], module.centrality)
    bias = None if module.bias is None else module.bias.item() * adjacency
    for layer in module.layers:
        mixed, _ = self_attention(x, layer.attention, bias)
        x = feed_forward(x, mixed, layer.feed_forward)
    if len(module.mlp) == 5:
        return deep_fc(x, module.mlp)
    first, _, last = module.mlp
    return linear(leaky_relu(linear(x, first)), last)


def member_linear(x: Array, module, member: int) -> Array:
    """One member's map of topt_deploy.model.prompt4re.MemberLinear."""
    weight, bias = array(module.weight)[member], array(module.bias)[member, 0]
    return np.array([[bias[o] + sum(row * weight[:, o]) for o in range(weight.shape[1])] for row in x])


def alignment(embedding: Array, prompts: Array, module, member: int) -> Array:
    """One member of topt_deploy.model.prompt4re.Alignment: P' = LayerNorm(MHA(E, P) + E·W_res)."""
    q = member_linear(embedding, module.query, member)
    k = member_linear(prompts, module.key, member)
    v = member_linear(prompts, module.value, member)
    mixed, _ = attention(q, k, v, module.heads)
    total = mixed + member_linear(embedding, module.residual, member)
    return layer_norm(total, array(module.norm.weight)[member, 0], array(module.norm.bias)[member, 0])


def prompt4re(embedding: Array, prompts: Array | None, module, member: int) -> Array:
    """One member of topt_deploy.model.prompt4re.Prompt4Re, evaluation mode."""
    joined = embedding
    if prompts is not None:
        source = prompts if module.alignment is None else alignment(embedding, prompts, module.alignment, member)
        joined = np.concatenate([embedding, member_linear(source, module.soft_prompt, member)], axis=1)
    out = member_linear(joined, module.linear, member)
    if module.hidden is not None:
        hidden = np.maximum(member_linear(joined, module.hidden, member), 0)
        out = out + member_linear(hidden, module.hidden_out, member)
    return out[:, 0]
