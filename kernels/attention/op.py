"""Registration of the attention operators and their checked public functions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels.attention import backends, reference
from kinetok.kernels.ops import check_caches, check_device, check_floats, check_whole, kernel_op, takes_op

LARGEST_HEAD = 128

_prefix_attention = kernel_op(reference.prefix_attention)
_prefix_attention_backward = kernel_op(reference.prefix_attention_backward)
_decode_attention = kernel_op(reference.decode_attention)


def _contiguous(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_prefix_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, text_lengths: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    rows, positions, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return _contiguous(q), q.new_empty((rows, heads, positions), dtype=wide)


@_prefix_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, text_lengths: Tensor, lengths: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _contiguous(q), _contiguous(k), _contiguous(v)


@_decode_attention.register_fake
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, kv_scale: Tensor | None = None) -> Tensor:
    return _contiguous(q)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_prefix_attention_backward(grad, *ctx.saved_tensors), None, None


_prefix_attention.register_autograd(_backward, setup_context=_save)


def _through_op(q: Tensor, k: Tensor, v: Tensor, text_lengths: Tensor, lengths: Tensor | None) -> Tensor:
    if q.shape[3] > LARGEST_HEAD:
        raise UserError(f"expected a head size of at most {LARGEST_HEAD}, got {q.shape[3]}")
    lengths = torch.full_like(text_lengths, q.shape[1]) if lengths is None else lengths
    return _prefix_attention(q, k, v, text_lengths, lengths)[0]


def _by_formula(q: Tensor, k: Tensor, v: Tensor, text_lengths: Tensor, lengths: Tensor | None) -> Tensor:
    lengths = torch.full_like(text_lengths, q.shape[1]) if lengths is None else lengths
    return reference.prefix_attention(q, k, v, text_lengths, lengths)[0]


PREFIX: dict[str, Callable[..., Tensor]] = {
    "reference": _by_formula,
    "triton": _through_op,
    "sdpa": backends.sdpa,
    "varlen": backends.varlen,
    "flash": backends.flash,
}
DECODE: dict[str, Callable[..., Tensor]] = {
    "reference": reference.decode_attention,
    "triton": _decode_attention,
    "sdpa": backends.sdpa_decode,
    "varlen": backends.varlen_decode,
    "flash": backends.flash_decode,
}


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_lengths: Tensor,
    lengths: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Attention ``[B, T, H, hd]`` over a text prefix and causal motion, scaled by 1 / sqrt(hd) (section 3).

    q, k, v ``[B, T, H, hd]`` of one dtype. Key j is seen by query i if j <= i, or if both are among the row's first
    text_lengths ``[B]`` positions. lengths ``[B]``: positions of a row that count (None: all); the result, and every
    gradient, is 0 from there on, whatever the padding holds. Scores, sums and gradients are accumulated in fp32.

    backend: "reference" (the formula), "triton" (flash attention, log-sum-exps kept for the backward pass; head size up
    to 128), "sdpa", "varlen" (torch's varlen_attn) or "flash" (the package flash_attn). None takes "triton" for CUDA
    tensors and "sdpa" for others; nothing ever falls back to another. With "triton", and with "sdpa" on a CPU where
    lengths are given, a row's bits do not depend on the other rows.
    Raises ``UserError`` where shapes do not fit or the backend does not run here (``attention_backends`` says which do).
    """
    rows = q.shape[:1]
    if q.ndim != 4 or not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        raise UserError(
            f"expected q, k and v [B, T, H, hd] of one shape and dtype, got {[[*x.shape, x.dtype] for x in (q, k, v)]}"
        )
    check_floats(q=q)
    for given in (text_lengths, lengths):
        if given is not None and given.shape != rows:
            raise UserError(f"expected lengths {list(rows)}, got {list(given.shape)}")
    check_whole(text_lengths=text_lengths, lengths=lengths)
    check_device(q, k, v, text_lengths, lengths)
    if backend is None and takes_op(q):
        return _through_op(q, k, v, text_lengths, lengths)
    if backend is not None:
        backends.require(backend, q)
    return PREFIX[backend or "sdpa"](q, k, v, text_lengths, lengths)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    kv_scale: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Attention ``[B, H, hd]`` of one query a row over its slab, scaled by 1 / sqrt(hd) (section 3). No gradient.

    q ``[B, H, hd]``; k_cache, v_cache ``[B, H, S, hd]`` contiguous, or the first S positions of such ones, of which row b
    has ``lengths[b]``, at most S, in use (lengths ``[B]`` integer; 0 gives 0; what lies beyond may be anything). A
    float8_e4m3fn cache stands for its values times ``kv_scale [2, B, H]`` fp32 (keys, values). Scores and sums in fp32.

    backend as in ``prefix_attention``. "triton" cuts a slab into parts of 64 positions, whatever the batch, S or the
    lengths, and adds the parts in one order, whatever S up to 512; there, and with "sdpa" on a CPU, a row's bits do not
    depend on the others.
    Raises ``UserError`` where shapes, dtypes or the slab's layout do not fit, or the backend does not run here.
    """
    if q.ndim != 3 or lengths.shape != q.shape[:1]:
        raise UserError(f"expected q [B, H, hd] and lengths [B], got {list(q.shape)} and {list(lengths.shape)}")
    rows, heads, head_dim = q.shape
    check_floats(q=q)
    check_whole(lengths=lengths)
    check_caches((rows, heads, head_dim), k_cache, v_cache, kv_scale, first=True)
    if kv_scale is None and k_cache.dtype != q.dtype:
        raise UserError(f"expected caches of q's dtype or float8_e4m3fn, got {k_cache.dtype} with a q of {q.dtype}")
    check_device(q, k_cache, v_cache, lengths, kv_scale)
    if backend is None and takes_op(q):
        return _decode_attention(q, k_cache, v_cache, lengths, kv_scale)
    if backend is not None:
        backends.require(backend, q)
    return DECODE[backend or "sdpa"](q, k_cache, v_cache, lengths, kv_scale)
