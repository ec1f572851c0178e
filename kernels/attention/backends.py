"""Attention by other libraries, for CPUs and for comparison, and which backends run on a device."""

import importlib.util
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

from kinetok.errors import UserError
from kinetok.kernels.attention import reference

Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, bool], Tensor]


def attention_backends(device: torch.device | str) -> dict[str, str | None]:
    """Every backend by name, with None where it runs on ``device`` and otherwise the reason why it does not."""
    no_gpu = None if torch.device(device).type == "cuda" else "needs a CUDA device"
    return {
        "reference": None,
        "triton": no_gpu or _missing("triton"),
        "sdpa": None,
        "varlen": no_gpu or _varlen_problem(),
        "flash": no_gpu or _missing("flash_attn"),
    }


def _missing(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"the package {package} is not installed"


def _varlen_problem() -> str | None:
    if importlib.util.find_spec("torch.nn.attention.varlen"):
        from torch.nn.attention.varlen import varlen_attn

        if {"window_size", "scale"} <= set(inspect.signature(varlen_attn).parameters):
            return None
    return f"torch {torch.__version__} has no torch.nn.attention.varlen.varlen_attn with window_size and scale"


def require(backend: str, q: Tensor) -> None:
    """Raise ``UserError`` unless ``backend`` runs on q's device and takes its dtype."""
    known = attention_backends(q.device)
    if backend not in known:
        raise UserError(f"attention backend: expected one of {', '.join(known)}, got {backend!r}")
    if known[backend]:
        raise UserError(f"attention backend {backend!r} does not run on {q.device}: {known[backend]}")
    if backend in ("varlen", "flash") and q.dtype not in (torch.float16, torch.bfloat16):
        raise UserError(f"attention backend {backend!r}: expected float16 or bfloat16, got {q.dtype}")


def sdpa(q: Tensor, k: Tensor, v: Tensor, text_lengths: Tensor, lengths: Tensor | None) -> Tensor:
    """torch's scaled_dot_product_attention with a mask.

    On a CPU, rows of given lengths are taken one by one and cut to them: a row's bits then do not depend on the others.
    """
    if lengths is None:
        return _masked(q, k, v, reference.prefix_mask(text_lengths, q.shape[1]))
    if q.is_cpu:
        rows = []
        apart = [x.unbind(0) for x in (q, k, v)]  # whose gradients are put together once, not added up row by row
        for row, (text, length) in enumerate(zip(text_lengths.tolist(), lengths.tolist(), strict=True)):
            own_q, own_k, own_v = (x[row][None, :length] for x in apart)
            mask = None if text >= length else reference.prefix_mask(text_lengths[row : row + 1], length)
            rows.append(F.pad(_masked(own_q, own_k, own_v, mask), (0, 0, 0, 0, 0, q.shape[1] - length)))
        return torch.cat(rows) if rows else torch.zeros_like(q)
    real = torch.arange(q.shape[1], device=q.device) < lengths[:, None]
    # A query beyond its row's length sees everything: seeing nothing would make its gradient NaN. Its result is dropped.
    seen = reference.prefix_mask(text_lengths, q.shape[1]) & real[:, None, None] | ~real[:, None, :, None]
    return torch.where(real[..., None, None], _masked(q, k, v, seen), 0.0)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def sdpa_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, kv_scale: Tensor | None) -> Tensor:
    """As ``sdpa``, for one query a row: on a CPU row by row, elsewhere with a mask."""

    def values(cache: Tensor, part: int, row: slice, end: int | None) -> Tensor:
        held = cache[row, :, :end]
        return held if kv_scale is None else (held.float() * kv_scale[part, row, :, None, None]).to(q.dtype)

    if not q.is_cpu:
        seen = (torch.arange(k_cache.shape[2], device=q.device) < lengths[:, None])[:, None, None]
        k, v = (values(cache, part, slice(None), None) for part, cache in enumerate((k_cache, v_cache)))
        mixed = scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=seen)[:, :, 0]
        return torch.where((lengths > 0)[:, None, None], mixed, 0.0)
    rows = []
    for at, length in enumerate(lengths.tolist()):
        row = slice(at, at + 1)
        k, v = (values(cache, part, row, length) for part, cache in enumerate((k_cache, v_cache)))
        rows.append(
            scaled_dot_product_attention(q[row, :, None], k, v) if length else torch.zeros_like(q[row, :, None])
        )
    if len(rows) == 1:
        return rows[0][:, :, 0]
    return torch.cat(rows)[:, :, 0] if rows else torch.zeros_like(q)


def prefix_from_varlen(
    call: Varlen, q: Tensor, k: Tensor, v: Tensor, text_lengths: Tensor, lengths: Tensor | None
) -> Tensor:
    """The prefix mask as two calls for packed rows: text among itself, then motion, causal, over the whole row.

    ``call(q, k, v, cu_q, cu_k, max_q, max_k, causal)`` takes packed ``[N, H, hd]`` and cumulated lengths ``[B + 1]`` int32;
    causal lets the last query of a row see all of its keys (aligned at the bottom right).
    """
    positions, head_dim = q.shape[1], q.shape[3]
    lengths = torch.full_like(text_lengths, positions) if lengths is None else lengths
    text_lengths = torch.minimum(text_lengths, lengths)
    at = torch.arange(positions, device=q.device)
    is_text, is_real = at < text_lengths[:, None], at < lengths[:, None]
    # The kernels take head sizes that are multiples of 8; zeros change no score, as the scale is given.
    q, k, v = (F.pad(x, (0, -head_dim % 8)) for x in (q, k, v))
    o = torch.zeros_like(q)
    for queries, keys, q_lengths, k_lengths, causal in (
        (is_text, is_text, text_lengths, text_lengths, False),
        (is_real & ~is_text, is_real, lengths - text_lengths, lengths, True),
    ):
        if not queries.any():
            continue
        cu_q, cu_k = (F.pad(x.cumsum(0), (1, 0)).to(torch.int32) for x in (q_lengths, k_lengths))
        mixed = call(q[queries], k[keys], v[keys], cu_q, cu_k, int(q_lengths.max()), int(k_lengths.max()), causal)
        o = o.index_put((queries,), mixed)
    return o[..., :head_dim]


def varlen(q: Tensor, k: Tensor, v: Tensor, text_lengths: Tensor, lengths: Tensor | None) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn."""
    from torch.nn.attention.varlen import varlen_attn

    scale = 1 / math.sqrt(q.shape[3])

    def call(*args: Any) -> Any:
        return varlen_attn(*args[:7], window_size=(-1, 0 if args[7] else -1), scale=scale)

    return prefix_from_varlen(call, q, k, v, text_lengths, lengths)


def varlen_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, kv_scale: Tensor | None) -> Tensor:
    raise UserError(
        "attention backend 'varlen' reads packed keys, and decoding keeps them in slabs: use another backend"
    )


def flash(q: Tensor, k: Tensor, v: Tensor, text_lengths: Tensor, lengths: Tensor | None) -> Tensor:
    """flash_attn_varlen_func of the package flash_attn."""
    from flash_attn import flash_attn_varlen_func

    scale = 1 / math.sqrt(q.shape[3])

    def call(*args: Tensor | int) -> Tensor:
        return flash_attn_varlen_func(*args[:7], softmax_scale=scale, causal=bool(args[7]))

    return prefix_from_varlen(call, q, k, v, text_lengths, lengths)


def flash_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, kv_scale: Tensor | None) -> Tensor:
    """flash_attn_with_kvcache; it splits by the batch, so a row's bits may depend on the others."""
    from flash_attn import flash_attn_with_kvcache

    if kv_scale is not None:
        raise UserError("attention backend 'flash' has no float8 cache: use another backend")
    caches = (cache.transpose(1, 2) for cache in (k_cache, v_cache))
    return flash_attn_with_kvcache(q[:, None], *caches, cache_seqlens=lengths.to(torch.int32))[:, 0]
