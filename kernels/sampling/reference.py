"""Eager Gumbel-max sampling with temperature, top-k and top-p (docs/numerics.md)."""

import torch
from torch import Tensor

from kinetok.kernels.linear.reference import packed_linear
from kinetok.kernels.sampling.arithmetic import LOG2_E, exp2_weight, log_fp32
from kinetok.kernels.sampling.philox import MASK, philox
from kinetok.kernels.sampling.state import ENDED, FAILED, FULL, RUNNING, TOP_P_BITS, share_of

BLOCK = 4
LIKELY = 512  # tokens among which those of top-p nearly always are


def guide(conditioned: Tensor, empty: Tensor, guidance: float | Tensor) -> Tensor:
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


def _keep(scaled: Tensor, top_k: Tensor | None, share: Tensor, *, likely: int = 0) -> Tensor:
    """Which tokens of ``scaled [B, V]`` may be drawn; all that tie with the last one are kept.

    top_k, share ``[B]`` or ``[1]``: share is top-p in 65536ths. top_k None spares its sort where no row has a limit;
    so does likely the other one, where that many of the largest weights hold each row's share. The result is the same.
    """
    classes = scaled.shape[1]
    keep = scaled > -torch.inf
    if top_k is not None:
        cut = ((top_k > 0) & (top_k < classes))[:, None]
        falling = scaled.sort(dim=1, descending=True).values
        place = (top_k - 1).clamp(0, classes - 1).long()[:, None].expand(len(scaled), -1)
        keep &= ~cut | (scaled >= falling.gather(1, place))
    kept = scaled.where(keep, -torch.inf)
    weights = exp2_weight((kept - kept.amax(1, keepdim=True)) * LOG2_E)
    needed = (weights.sum(1, keepdim=True) * share[:, None] + (2**TOP_P_BITS - 1)) >> TOP_P_BITS
    if 0 < likely < classes:
        falling = weights.topk(likely, dim=1).values
    if not 0 < likely < classes or (falling.sum(1, keepdim=True) < needed).any():
        falling = weights.sort(dim=1, descending=True).values
    last = (falling.cumsum(1) < needed).sum(1, keepdim=True).clamp(max=falling.shape[1] - 1)
    return keep & ((share[:, None] == 2**TOP_P_BITS) | (weights >= falling.gather(1, last)))


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
    scores = scaled + noise
    if top_k or top_p < 1:
        share = torch.tensor([share_of(top_p)], device=logits.device)
        most = torch.tensor([top_k], device=logits.device) if top_k else None
        scores = scores.where(_keep(scaled, most, share, likely=LIKELY), -torch.inf)
    return scores.argmax(1)


def sample_step(
    logits: Tensor,
    empty: Tensor | None,
    seed: Tensor,
    request: Tensor,
    position: Tensor,
    least: Tensor,
    remaining: Tensor,
    status: Tensor,
    inverse_temperature: Tensor,
    top_k: Tensor,
    share: Tensor,
    guidance: Tensor,
    end_id: int,
    pad_id: int,
) -> Tensor:
    """The next token ``[B]`` of each row of ``logits [B, V]``; see the public ``sample_step``."""
    scores = logits.float()
    if empty is not None:
        scores = torch.where(guidance[:, None] == 1, scores, guide(scores, empty, guidance[:, None]))
    ids = torch.arange(scores.shape[1], device=scores.device)
    banned = ((ids == end_id) & (position < least)[:, None]) | (ids == pad_id)
    scores = scores.masked_fill(banned, -torch.inf)
    good = scores.amax(1).isfinite()
    sampled = inverse_temperature[:, None] > 0
    scaled = torch.where(sampled, scores * inverse_temperature[:, None], scores)
    noisy = (scaled + gumbel(scores.shape[1], seed, position, request)).where(_keep(scaled, top_k, share), -torch.inf)
    token = torch.where(sampled, noisy, scaled).argmax(1)
    return _advance(token, good, position, remaining, status, end_id)


def _advance(token: Tensor, good: Tensor, position: Tensor, remaining: Tensor, status: Tensor, end_id: int) -> Tensor:
    """``token [B]``, the end token for rows that are not running or not good; moves the state on."""
    running = status == RUNNING
    token = torch.where(running & good, token, end_id)
    moved = (token != end_id).long()
    position += moved
    remaining -= moved
    after = torch.where(moved == 0, ENDED, torch.where(remaining == 0, FULL, RUNNING))
    status.copy_(torch.where(running, torch.where(good, after, FAILED), status))
    return token


def greedy_step(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    counters: Tensor,
    kind: str,
    group: int,
    rows: int,
    eps: float | None,
    position: Tensor,
    least: Tensor,
    remaining: Tensor,
    status: Tensor,
    end_id: int,
    pad_id: int,
) -> Tensor:
    """The arg-max token ``[B]`` of the head's logits for ``x [B, d]``; see the public ``greedy_step``."""
    scores = packed_linear(x, data, scale, counters, kind, group, rows, eps, None, False, True)
    ids = torch.arange(rows, device=x.device)
    banned = ((ids == end_id) & (position < least)[:, None]) | (ids == pad_id)
    scores = scores.masked_fill(banned, -torch.inf)
    return _advance(scores.argmax(1), scores.amax(1).isfinite(), position, remaining, status, end_id)
