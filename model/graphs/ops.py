"""The operators of ``kinetok.kernels`` as ONNX nodes, each the counterpart of its folder's ``reference.py``."""

import math
from collections.abc import Sequence

import numpy as np

from kinetok.kernels.fsq.reference import level_constants
from kinetok.kernels.wavelet.reference import SCALING, wavelet_filter
from kinetok.model.graphs.builder import MICROSOFT, Graph


def rms_norm(g: Graph, x: str, scale: str, dtype: np.dtype, eps: float = 1e-5) -> str:
    """``x [..., d]`` in dtype, computed in fp32; scale in dtype too."""
    if g.opset >= 23:
        return g.node("RMSNormalization", x, scale, axis=-1, epsilon=eps, stash_type=1)
    wide = g.cast(x, np.float32) if dtype != np.float32 else x
    mean = g.node("ReduceMean", g.node("Mul", wide, wide), g.const([-1]), keepdims=1)
    root = g.node("Sqrt", g.node("Add", mean, g.const(eps, np.float32)))
    unit = g.node("Div", wide, root)
    return g.node("Mul", g.cast(unit, dtype) if dtype != np.float32 else unit, scale)


def add_rms_norm(g: Graph, x: str, more: str, scale: str, eps: float = 1e-5) -> tuple[str, str]:
    """fp32 ``x + more`` and its ``rms_norm``, in one operator of ONNX Runtime's."""
    op, inputs = "SkipSimplifiedLayerNormalization", [x, more, scale]
    normed, *_, total = g.nodes(op, inputs, 4, unused=(1, 2), domain=MICROSOFT, epsilon=eps)
    return total, normed


def rotate(g: Graph, x: str, table: tuple[str, str], positions: str, half: int) -> str:
    """fp32 ``x [B, H, T, 2 half]`` rotated by the rows ``positions [B, T]`` of the tables ``[positions, half]``."""
    if g.opset >= 23:
        return g.node("RotaryEmbedding", x, *table, positions, interleaved=1)
    cos, sin = (g.node("Unsqueeze", g.node("Gather", part, positions), g.const([1, 4])) for part in table)
    even, odd = g.nodes("Split", [g.reshape(x, 0, 0, 0, half, 2)], 2, axis=-1, num_outputs=2)
    first = g.node("Sub", g.node("Mul", even, cos), g.node("Mul", odd, sin))
    second = g.node("Add", g.node("Mul", even, sin), g.node("Mul", odd, cos))
    return g.reshape(g.node("Concat", first, second, axis=-1), 0, 0, 0, 2 * half)


def attention(g: Graph, q: str, k: str, v: str, visible: str, head_dim: int, dtype: np.dtype, *, target: str) -> str:
    """Mixed values ``[B, H, T, hd]``; visible bool ``[B, 1, T, S]``; the softmax in fp32 for target "ort".

    target "tensorrt": its parsers refuse to be told the softmax's precision, and its builders an fp32 Attention with free
    axes, which is spelt out.
    """
    if g.opset >= 23 and target == "ort":
        return g.node("Attention", q, k, v, visible, scale=head_dim**-0.5, softmax_precision=1)
    if g.opset >= 23 and dtype != np.float32:
        return g.node("Attention", q, k, v, visible, scale=head_dim**-0.5)
    scaled = g.node("Mul", q, g.const(head_dim**-0.5, dtype))
    scores = g.node("MatMul", scaled, g.transpose(k, 0, 1, 3, 2))
    if dtype != np.float32:
        scores = g.cast(scores, np.float32)
    scores = g.node("Where", visible, scores, g.const(np.finfo(np.float32).min, np.float32))
    weights = g.node("Softmax", scores, axis=-1)
    if dtype != np.float32:
        weights = g.cast(weights, dtype)
    return g.node("MatMul", weights, v)


def cached_heads(head_dim: int) -> bool:
    """Whether ``cached_attention`` takes heads of this size."""
    return head_dim % 16 == 0


def cached_attention(
    g: Graph,
    qkv: str,
    past: tuple[str, str],
    last: str,
    filled: str,
    table: tuple[str, str],
    heads: int,
    head_dim: int,
) -> list[str]:
    """fp32 ``qkv [B, 1, 3 d]`` of one token a row: rotated, written to the cache ``[B, H, S, hd]``, attended over it.

    Returns mixed values ``[B, 1, d]`` and the cache's keys and values, which are written in place where a caller binds them
    to ``past``'s memory. last: int32 ``[B]``, each row's position, behind which nothing is read; filled: the largest + 1.
    """
    return g.nodes(
        "GroupQueryAttention",
        [qkv, "", "", *past, last, filled, *table],
        3,
        domain=MICROSOFT,
        num_heads=heads,
        kv_num_heads=heads,
        do_rotary=1,
        rotary_interleaved=1,
        scale=head_dim**-0.5,
    )


def layer_norm(g: Graph, x: str, scale: str, bias: str, eps: float) -> str:
    return g.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=eps)


def gelu(g: Graph, x: str) -> str:
    """The exact one: x / 2 * (1 + erf(x / sqrt 2))."""
    inner = g.node("Erf", g.node("Mul", x, g.const(0.5**0.5, np.float32)))
    return g.node("Mul", g.node("Mul", x, g.const(0.5, np.float32)), g.node("Add", inner, g.const(1, np.float32)))


def gelu_tanh(g: Graph, x: str) -> str:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    cube = g.node("Mul", g.node("Mul", x, x), x)
    inner = g.node("Add", x, g.node("Mul", cube, g.const(0.044715, np.float32)))
    bent = g.node("Tanh", g.node("Mul", inner, g.const((2 / math.pi) ** 0.5, np.float32)))
    return g.node("Mul", g.node("Mul", x, g.const(0.5, np.float32)), g.node("Add", bent, g.const(1, np.float32)))


def silu(g: Graph, x: str) -> str:
    return g.node("Mul", x, g.node("Sigmoid", x))


def fsq_dequantize(g: Graph, tokens: str, levels: Sequence[int]) -> str:
    """int64 tokens ``[B, n]`` to codes fp32 ``[B, n, levels]``."""
    _, _, _, width, basis = level_constants(tuple(levels))
    digits = g.node("Mod", g.node("Div", g.node("Unsqueeze", tokens, g.const([2])), g.const(basis)), g.const(levels))
    centred = g.cast(g.node("Sub", digits, g.const(width)), np.float32)
    return g.node("Div", centred, g.const(width, np.float32))


def idwt(g: Graph, x: str, levels: int, wavelet: str, gain: float) -> str:
    """fp32 ``[B, n, C 2^levels]`` of a packet tree to ``[B, n 2^levels, C]``."""
    taps = SCALING[wavelet]
    for _ in range(levels):
        low, high = g.nodes("Split", [x], 2, axis=2, num_outputs=2)
        x = _synthesis(g, low, high, taps, gain)
    return x


def _synthesis(g: Graph, low: str, high: str, taps: Sequence[float], gain: float) -> str:
    def scaled(value: str, factor: float) -> str:
        return g.node("Mul", value, g.const(factor * gain, np.float32))

    if len(taps) == 2:
        phases = [scaled(g.node(op, low, high), taps[0]) for op in ("Add", "Sub")]
    else:
        length, lead, side = g.size(low, 1), len(taps) // 2 - 1, len(taps) // 4
        around = g.node("Sub", g.range(g.node("Add", length, g.const([2 * side]))), g.const(side))
        at = g.node("Mod", around, length)
        wrapped = [g.node("Gather", band, at, axis=1) for band in (low, high)]
        phases = []
        for phase in (0, 1):
            terms = []
            for k in range((phase + lead) % 2, len(taps), 2):
                first = side + (phase + lead - k) // 2
                last = g.node("Add", length, g.const([first]))
                for band, filters in zip(wrapped, (taps, wavelet_filter(taps)), strict=True):
                    terms.append(scaled(g.slice(band, 1, first, last), filters[k]))
            phases.append(g.node("Sum", *terms))
    stacked = g.node("Concat", *(g.node("Unsqueeze", phase, g.const([2])) for phase in phases), axis=2)
    return g.node("Reshape", stacked, g.node("Concat", g.const([0, -1]), g.size(low, 2), axis=0))
