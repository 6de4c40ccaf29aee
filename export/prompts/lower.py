"""Linear maps and attention in ONNX, by precision and by form of the graph.

A graph comes in two forms on one file of weights. ``onnxruntime`` uses ONNX Runtime's own operators and computes in
8 bits where the weights are; ``standard`` has the standard's operators alone, with weights behind DequantizeLinear,
which OpenVINO turns into kernels of its own. ``tensorrt``, made where it is asked for, is ``standard`` with linear maps
and attention in half, unless the weights are fp32: TensorRT takes the types that it is given. Softmax, norms and what
else is between these is float32 there, too, and so are the network's inputs and outputs.

- ``fp32``: MatMul.
- ``fp16``: the weight in half precision, cast to float32 before it is used: half the file.
- ``int8``: weights per output channel. In ONNX Runtime also activations, per token (largest magnitude to 127): one
  scale for a whole activation, as DynamicQuantizeLinear has it, is ruined by the few huge values that real decoders
  have in single tokens. Activations are unsigned and weights signed, the one pair of types that every processor is fast
  at; weights are scaled so that sums of two products fit 16 bits, so that every processor's result is the exact one.
- ``int4``: blocks of 32 inputs with one scale each; MatMulNBits in ONNX Runtime. Both forms read the same codes of 0 to
  15: the one as packed bytes, the other as numbers of 4 bits, for which the weight lies as (out, in). TensorRT, which
  knows signed numbers of 4 bits alone, has codes of its own. A layer whose inputs do not come in whole blocks gets
  int8.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..quantize_weights import BLOCK, quantize_int4, quantize_int8
from .graph_builder import INT4, MICROSOFT, UINT4, Array, Builder

ONNXRUNTIME, STANDARD = FORMS = ("onnxruntime", "standard")
TENSORRT = "tensorrt"
PRECISIONS = ("fp32", "fp16", "int8", "int4")
FAR = np.float32(-1e30)
"""The value added to a score where a query may not attend; finite, so that attending to nothing gives no NaN."""
FLOAT, HALF = 1, 10
"""ONNX's numbers of the types."""
ZERO_IN_4_BITS = 8
"""The code that stands for nothing in codes of 0 to 15; MatMulNBits takes it where it is given none."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear map to be lowered.

    Attributes:
        name: In the checkpoint, without ``.weight``.
        load: Gives its weight, float32 (out, in).
        bias: Gives float32 (out,), or None.
        rank: Of what it is applied to.
    """

    name: str
    load: Callable[[], Array]
    bias: Callable[[], Array] | None
    rank: int

    @cached_property
    def weight(self) -> Array:
        """float32 (out, in), read when it is first needed."""
        return self.load()

    @cached_property
    def quantize_int8(self) -> tuple[Array, Array]:
        """int8 codes (in, out), and float32 scales (out,)."""
        codes, scale = quantize_int8(self.weight, np.float32, pairs_fit_16_bits=True)
        return codes.T, scale

    @cached_property
    def quantize_int4(self) -> tuple[Array, Array]:
        """Codes of −8 to 7 (out, in), and float32 scales (out, blocks)."""
        return quantize_int4(self.weight, np.float32)


def linear(graph: Builder, x: str, layer: Linear, precision: str, form: str) -> str:
    """Add nodes for x W' + b; the name of the result."""
    if precision == "int4" and layer.weight.shape[1] % BLOCK:
        precision = "int8"
    y = _LINEAR[precision, form](graph, x, layer)
    return y if layer.bias is None else graph.node("Add", [y, graph.weight(f"{layer.name}.bias", layer.bias)])


def _float32(graph: Builder, x: str, layer: Linear) -> str:
    return graph.node("MatMul", [x, graph.weight(f"{layer.name}.weight", lambda: layer.weight.T)])


def _float16(graph: Builder, x: str, layer: Linear) -> str:
    half = graph.weight(f"{layer.name}.half", lambda: layer.weight.T.astype(np.float16))
    return graph.node("MatMul", [x, graph.node("Cast", [half], to=FLOAT)])


def _int8(graph: Builder, layer: Linear) -> tuple[str, str]:
    codes = graph.weight(f"{layer.name}.codes", lambda: layer.quantize_int8[0])
    return codes, graph.weight(f"{layer.name}.scale", lambda: layer.quantize_int8[1])


def _int8_standard(graph: Builder, x: str, layer: Linear) -> str:
    return graph.node("MatMul", [x, graph.node("DequantizeLinear", _int8(graph, layer), axis=1)])


def _int8_onnxruntime(graph: Builder, x: str, layer: Linear) -> str:
    unit, zero = graph.constant(np.float32(1 / 127)), graph.constant(np.uint8(128))
    if x not in graph.quantised:
        size = graph.node("ReduceMax", [graph.node("Abs", [x]), graph.constant([layer.rank - 1])], keepdims=1)
        size = graph.node("Max", [size, graph.constant(np.finfo(np.float32).tiny)])
        graph.quantised[x] = graph.node("QuantizeLinear", [graph.node("Div", [x, size]), unit, zero]), size
    token_codes, size = graph.quantised[x]
    codes, scale = _int8(graph, layer)
    y = graph.node("MatMulIntegerToFloat", [token_codes, codes, unit, scale, zero], domain=MICROSOFT)
    return graph.node("Mul", [y, size])


def _int4(graph: Builder, layer: Linear, *, packed: bool) -> tuple[str, str]:
    """Codes of 0 to 15 and scales, by output and block; both forms read the same bytes."""
    out, width = layer.weight.shape
    codes = graph.weight(
        f"{layer.name}.uint4",
        lambda: (layer.quantize_int4[0] + ZERO_IN_4_BITS).astype(UINT4),
        bytes_as=(out, width // BLOCK, BLOCK // 2) if packed else None,
    )
    return codes, graph.weight(f"{layer.name}.block_scale", lambda: layer.quantize_int4[1])


def _int4_onnxruntime(graph: Builder, x: str, layer: Linear) -> str:
    out, width = layer.weight.shape
    form = {"K": width, "N": out, "bits": 4, "block_size": BLOCK}
    return graph.node("MatMulNBits", [x, *_int4(graph, layer, packed=True)], domain=MICROSOFT, **form)


def _int4_standard(graph: Builder, x: str, layer: Linear) -> str:
    codes, scale = _int4(graph, layer, packed=False)
    zero = graph.constant(np.full(layer.quantize_int4[1].shape, ZERO_IN_4_BITS, UINT4))
    weight = graph.node("DequantizeLinear", [codes, scale, zero], axis=1, block_size=BLOCK)
    return graph.node("MatMul", [x, graph.node("Transpose", [weight], perm=[1, 0])])


def _product_in_half(graph: Builder, x: str, weight: str) -> str:
    return graph.node("Cast", [graph.node("MatMul", [_half(graph, x), weight])], to=FLOAT)


def _half(graph: Builder, x: str) -> str:
    """A value in half; what reads it more than once shares this."""
    if x not in graph.halves:
        graph.halves[x] = graph.node("Cast", [x], to=HALF)
    return graph.halves[x]


def _float16_tensorrt(graph: Builder, x: str, layer: Linear) -> str:
    return _product_in_half(graph, x, graph.weight(f"{layer.name}.half", lambda: layer.weight.T.astype(np.float16)))


def _int8_tensorrt(graph: Builder, x: str, layer: Linear) -> str:
    codes = graph.weight(f"{layer.name}.codes", lambda: layer.quantize_int8[0])
    scale = graph.weight(f"{layer.name}.half_scale", lambda: _half_scale(layer.quantize_int8[1]))
    return _product_in_half(graph, x, graph.node("DequantizeLinear", [codes, scale], axis=1))


def _int4_tensorrt(graph: Builder, x: str, layer: Linear) -> str:
    codes = graph.weight(f"{layer.name}.int4", lambda: layer.quantize_int4[0].T.astype(INT4))
    scale = graph.weight(f"{layer.name}.int4_half_scale", lambda: _half_scale(layer.quantize_int4[1].T))
    return _product_in_half(graph, x, graph.node("DequantizeLinear", [codes, scale], axis=0, block_size=BLOCK))


def _half_scale(scale: Array) -> Array:
    """A scale in half, and none of them nothing."""
    half = scale.astype(np.float16)
    some: Array = np.where(half == 0, np.finfo(np.float16).smallest_subnormal, half)
    return some


_LINEAR: dict[tuple[str, str], Callable[[Builder, str, Linear], str]] = {
    ("fp32", ONNXRUNTIME): _float32,
    ("fp32", STANDARD): _float32,
    ("fp16", ONNXRUNTIME): _float16,
    ("fp16", STANDARD): _float16,
    ("int8", ONNXRUNTIME): _int8_onnxruntime,
    ("int8", STANDARD): _int8_standard,
    ("int4", ONNXRUNTIME): _int4_onnxruntime,
    ("int4", STANDARD): _int4_standard,
    ("fp32", TENSORRT): _float32,
    ("fp16", TENSORRT): _float16_tensorrt,
    ("int8", TENSORRT): _int8_tensorrt,
    ("int4", TENSORRT): _int4_tensorrt,
}


def attention(
    graph: Builder,
    inputs: Sequence[str],
    precision: str,
    form: str,
    *,
    scale: float,
    queries: int,
    keys: int,
    width: int,
) -> str:
    """Add nodes for :func:`.traced_operators.attention`, whose attributes these are; the name of the result."""
    mask = _far(graph, inputs[3]) if len(inputs) > 3 else None
    if form == ONNXRUNTIME:
        return _attention_onnxruntime(graph, inputs[:3], mask, scale, queries, keys, width)
    if form == TENSORRT and precision != "fp32":
        return _attention_in_half(graph, inputs[:3], mask, scale, queries, keys)
    return _attention_standard(graph, inputs[:3], mask, scale, queries, keys)


def _far(graph: Builder, allowed: str) -> str:
    """The values that keep a query from attending where it may not; layers that share a mask share them."""
    if allowed not in graph.far:
        graph.far[allowed] = graph.node("Where", [allowed, graph.constant(np.float32(0)), graph.constant(FAR)])
    return graph.far[allowed]


def _attention_onnxruntime(
    graph: Builder, inputs: Sequence[str], mask: str | None, scale: float, queries: int, keys: int, width: int
) -> str:
    """Queries that share a key head are rows of one product: no key is copied, or packed twice."""
    q, k, v = inputs
    shared = queries // keys
    rows = graph.node("Reshape", [q, graph.constant([0, keys, -1, width])])  # (B, K, G·S, D)
    scores = graph.node("FusedMatMul", [rows, k], domain=MICROSOFT, transB=1, alpha=float(scale))  # (B, K, G·S, L)
    if mask is not None:
        scores = graph.node("Add", [scores, _repeated(graph, mask, shared)])
    mixed = graph.node("MatMul", [graph.node("Softmax", [scores], axis=-1), v])
    size = graph.node("Concat", [graph.constant([0, queries]), _size(graph, q, 2), _size(graph, v, 3)], axis=0)
    return graph.node("Reshape", [mixed, size])


def _repeated(graph: Builder, mask: str, times: int) -> str:
    """A mask (B, 1, S, L), repeated for the query heads that share a key head; layers with one mask share this."""
    if times == 1:
        return mask
    name = f"{mask} {times} times"
    if name not in graph.far:
        graph.far[name] = graph.node("Concat", [mask] * times, axis=2)
    return graph.far[name]


def _attention_in_half(
    graph: Builder, inputs: Sequence[str], mask: str | None, scale: float, queries: int, keys: int
) -> str:
    """The same with both products in half. Queries are scaled first: their products would leave half's range."""
    q, k, v = inputs
    k, v = (_half(graph, x) for x in (k, v))
    if queries != keys:
        k, v = (_every_query_its_own(graph, x, queries, keys) for x in (k, v))
    q = graph.node("Cast", [graph.node("Mul", [q, graph.constant(np.float32(scale))])], to=HALF)
    scores = graph.node("MatMul", [q, graph.node("Transpose", [k], perm=[0, 1, 3, 2])])
    scores = graph.node("Cast", [scores], to=FLOAT)
    if mask is not None:
        scores = graph.node("Add", [scores, mask])
    weights = graph.node("Cast", [graph.node("Softmax", [scores], axis=-1)], to=HALF)
    return graph.node("Cast", [graph.node("MatMul", [weights, v])], to=FLOAT)


def _attention_standard(
    graph: Builder, inputs: Sequence[str], mask: str | None, scale: float, queries: int, keys: int
) -> str:
    """In the four dimensions and the order that compilers know as attention."""
    q, k, v = inputs
    if queries != keys:
        k, v = (_every_query_its_own(graph, x, queries, keys) for x in (k, v))
    scores = graph.node("MatMul", [q, graph.node("Transpose", [k], perm=[0, 1, 3, 2])])
    scores = graph.node("Mul", [scores, graph.constant(np.float32(scale))])
    if mask is not None:
        scores = graph.node("Add", [scores, mask])
    return graph.node("MatMul", [graph.node("Softmax", [scores], axis=-1), v])


def _every_query_its_own(graph: Builder, x: str, queries: int, keys: int) -> str:
    """Key heads (B, K, L, D) as often as query heads read them, (B, G·K, L, D)."""
    times = graph.constant([1, 1, queries // keys, 1, 1])
    wide = graph.node("Expand", [graph.node("Unsqueeze", [x, graph.constant([2])]), times])
    size = graph.node("Concat", [graph.constant([0, queries, -1]), _size(graph, x, 3)], axis=0)
    return graph.node("Reshape", [wide, size])


def _size(graph: Builder, x: str, axis: int) -> str:
    return graph.node("Shape", [x], start=axis, end=axis + 1)
