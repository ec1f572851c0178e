"""Eager Gumbel-max sampling with temperature, top-k and top-p (docs/numerics.md)."""

import torch
from torch import Tensor

from kinetok.kernels.sampling.arithmetic import LOG2_E, exp2_weight, log_fp32
from kinetok.kernels.sampling.philox import MASK, philox

BLOCK = 4
TOP_P_BITS = 16


def guide(conditioned: Tensor, empty: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance in fp32, each operation rounded: empty + guidance * (conditioned - empty)."""
    return empty.float() + (conditioned.float() - empty.float()) * guidance


def gumbel(count: int, seed: Tensor, position: Tensor, request: Tensor) -> Tensor:
    """Gumbel noise fp32 ``[B, count]`` for tokens 0 to count - 1.

    seed, position, request int64 ``[B]`` or ``[1]``; a seed is taken as 64 unsigned bits. Four neighbouring tokens share
    one Philox call: key = seed, counter = (position, request, token // 4, 0).
    """
    blocks = torch.arange(-(-count // BLOCK), device=seed.device)
    key = seed[:, None] & MASK, seed[:, None] >> 32 & MASK
    counter = position[:, None] & MASK, request[:, None] & MASK, blocks, torch.zeros_like(blocks)
    words = philox(counter, key).flatten(1)[:, :count]
    uniform = ((words >> 9).float() + 0.5) * 2.0**-23
    return -log_fp32(-log_fp32(uniform))


def _keep(scaled: Tensor, top_k: int, top_p: float) -> Tensor:
    """Which tokens of ``scaled [B, V]`` may be drawn; all that tie with the last one are kept."""
    keep = scaled > -torch.inf
    if 0 < top_k < scaled.shape[1]:
        keep &= scaled >= scaled.topk(top_k, dim=1).values[:, -1:]
    if top_p < 1:
        kept = scaled.where(keep, -torch.inf)
        weights = exp2_weight((kept - kept.amax(1, keepdim=True)) * LOG2_E)
        falling = weights.sort(dim=1, descending=True).values
        totals = falling.cumsum(1)
        share = max(1, round(top_p * 2**TOP_P_BITS))
        needed = (totals[:, -1:] * share + (2**TOP_P_BITS - 1)) >> TOP_P_BITS
        last = (totals < needed).sum(1, keepdim=True)
        keep &= weights >= falling.gather(1, last)
    return keep


def sample(
    logits: Tensor,
    *,
    seed: Tensor,
    position: Tensor,
    request: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """One token a row of ``logits [B, V]``: int64 ``[B]``; -inf bans a token, ties go to the lowest id.

    seed, position and request int64 ``[B]`` name the draw, which depends on nothing else. temperature 0 takes the
    arg-max; top_k 0 and top_p 1 keep all tokens. Raises ``ValueError`` for NaN and for a row that bans every token.
    """
    noise = gumbel(logits.shape[1], seed, position, request) if temperature else None
    return draw(logits, noise, temperature=temperature, top_k=top_k, top_p=top_p)


def draw(
    logits: Tensor, noise: Tensor | None, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """``sample`` with ``gumbel``'s ``noise [B, V]`` given, which is drawn faster for many positions at once.

    noise may be None at temperature 0.
    """
    logits = logits.float()
    best = logits.amax(1)
    if not torch.isfinite(best).all():
        raise ValueError(f"expected finite logits, got {best[~best.isfinite()][0].item()} as the largest of a row")
    if temperature == 0:
        return logits.argmax(1)
    scaled = logits * torch.tensor(1.0 / temperature, dtype=torch.float32).item()
    assert noise is not None, "sampling needs noise"
    return (scaled + noise).where(_keep(scaled, top_k, top_p), -torch.inf).argmax(1)
