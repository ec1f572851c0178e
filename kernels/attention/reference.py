"""Eager attention by its formula (section 3): softmax(q k / sqrt(hd)) v over the keys that a query sees."""

import math

import torch
from torch import Tensor


def prefix_mask(text_lengths: Tensor, positions: int) -> Tensor:
    """Visibility ``[B, 1, T, T]``: key j is seen by query i if j <= i, or if both are among the row's text positions."""
    at = torch.arange(positions, device=text_lengths.device)
    text = at < text_lengths[:, None]  # [B, T]
    return ((at[None, :] <= at[:, None]) | (text[:, :, None] & text[:, None, :]))[:, None]


def _masked_scores(q: Tensor, k: Tensor, text_lengths: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled scores ``[B, H, T, T]``, -inf where a key is not seen, and which queries are real, ``[B, T]``."""
    positions = q.shape[1]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[3])
    real = torch.arange(positions, device=q.device) < lengths[:, None]
    seen = prefix_mask(torch.minimum(text_lengths, lengths), positions) & real[:, None, None]
    return scores.masked_fill(~seen, -torch.inf), real


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, text_lengths: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Mixed values ``[B, T, H, hd]`` in q's dtype, and log-sum-exps of the scores ``[B, H, T]`` in fp32.

    q, k, v ``[B, T, H, hd]``; text_lengths and lengths ``[B]`` integer: of a row's positions, text and all that count.
    Both results are 0 from ``lengths`` on. In fp32, or float64 for float64 input.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores, real = _masked_scores(q.to(wide), k.to(wide), text_lengths, lengths)
    lse = torch.where(real[:, None], scores.logsumexp(-1), 0.0)
    weights = torch.where(real[:, None, :, None], (scores - lse[..., None]).exp(), 0.0)
    values = torch.where(real[..., None, None], v.to(wide), 0.0)  # padding may be anything, NaN included
    return torch.einsum("bhqk,bkhd->bqhd", weights, values).to(q.dtype).contiguous(), lse


def prefix_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, text_lengths: Tensor, lengths: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients wrt q, k and v of ``prefix_attention``, whose results are o and lse; 0 from ``lengths`` on."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q_wide, k_wide, v_wide, grad_wide = (x.to(wide) for x in (q, k, v, grad))
    scores, real = _masked_scores(q_wide, k_wide, text_lengths, lengths)
    weights = torch.where(real[:, None, :, None], (scores - lse[..., None]).exp(), 0.0)
    grad_v = torch.einsum("bhqk,bqhd->bkhd", weights, grad_wide)
    grad_weights = torch.einsum("bqhd,bkhd->bhqk", grad_wide, v_wide)
    inner = (grad_wide * o.to(wide)).sum(-1).transpose(1, 2)  # [B, H, T]
    grad_scores = weights * (grad_weights - inner[..., None]) / math.sqrt(q.shape[3])
    grad_q = torch.einsum("bhqk,bkhd->bqhd", grad_scores, k_wide)
    grad_k = torch.einsum("bhqk,bqhd->bkhd", grad_scores, q_wide)
    return tuple(x.to(q.dtype).contiguous() for x in (grad_q, grad_k, grad_v))  # type: ignore[return-value]


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, kv_scale: Tensor | None = None
) -> Tensor:
    """Mixed values ``[B, H, hd]`` of one query a row, ``q [B, H, hd]``, over the first ``lengths[b]`` positions of its slab.

    k_cache, v_cache ``[B, H, S, hd]``; a float8_e4m3fn cache stands for its values times ``kv_scale [2, B, H]``. A row of
    length 0 gives 0. In fp32, or float64 for float64 input.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = k_cache.to(wide), v_cache.to(wide)
    if kv_scale is not None:
        k, v = k * kv_scale[0, :, :, None, None], v * kv_scale[1, :, :, None, None]
    seen = (torch.arange(k.shape[2], device=q.device) < lengths[:, None])[:, None]  # [B, 1, S]
    scores = (k * q.to(wide)[:, :, None]).sum(-1) / math.sqrt(q.shape[2])
    weights = torch.where(seen, scores, -torch.inf).softmax(-1)
    # What lies beyond a row's length may be anything, NaN included, and must not count.
    mixed = torch.where(seen[..., None], weights[..., None] * v, 0.0).sum(2)
    return torch.where((lengths > 0)[:, None, None], mixed, 0.0).to(q.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Softmax attention of ``q [B, H, T, hd]`` over ``k, v [B, H, S, hd]``, scaled by 1 / sqrt(hd), by torch.

    visible ``[B, 1, T, S]`` bool says which keys a query sees; None means all of them.
    """
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
