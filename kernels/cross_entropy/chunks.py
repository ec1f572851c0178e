"""Cross-entropy of a linear head in chunks of rows, so that few of the logits are ever alive.

A chunk's logits are one product; they are turned into their own gradient where they lie, and two more products take that to
the gradients of hidden and weight. Forward and backward execute 6 N V d operations in all, as the unfused route does:
nothing is computed twice (Hsu et al., Liger Kernel, 2024, do the same).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kinetok.errors import UserError

SHARE = 10  # one chunk holds at most one part in so many of the logits
TILE, MOST = 128, 4096  # rows: whole tiles of the products; no more than what keeps them busy
ALIGNED = 64  # a row of logits starts on a multiple of 128 bytes, also for 64,001 classes

# (logits [n, V], overwritten with softmax - onehot if asked to; targets [n]; with gradients) -> losses [n]
Softmax = Callable[[Tensor, Tensor, bool], Tensor]


def chunk_rows(rows: int) -> int:
    """Rows of a chunk: a tenth of all, in whole tiles where there are that many; one where there are fewer than ten."""
    share = min(rows // SHARE, MOST)
    return max(share // TILE * TILE or share, 1)


def torch_softmax(logits: Tensor, targets: Tensor, with_gradients: bool) -> Tensor:
    """The softmax part in plain torch; few rows at a time, for the fp32 copies of half-precision logits."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = []
    for rows, wanted in zip(logits.split(16), targets.split(16), strict=True):
        x = rows.to(wide, copy=True)
        x -= x.amax(1, keepdim=True)
        chosen = x.gather(1, wanted[:, None])
        total = x.exp_().sum(1, keepdim=True)
        losses.append((total.log() - chosen)[:, 0])
        if with_gradients:
            rows.copy_(x.div_(total).scatter_add_(1, wanted[:, None], -torch.ones_like(chosen)))
    return torch.cat(losses)


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum of the losses, number of targets that count, gradient of the sum in hidden, in weight).

    ``hidden [N, d]``, ``weight [V, d]``, ``targets [N]`` int64. Sum and number are scalars in fp32 (fp64 for fp64 input);
    the gradients have their input's shape and dtype, or no elements where they were not asked for.
    """
    return in_chunks(hidden, weight, targets, ignored, with_gradients, torch_softmax)


def in_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int, with_gradients: bool, softmax: Softmax
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``linear_cross_entropy_sum`` with a given softmax part. Raises ``UserError`` for a target that is no class."""
    classes = len(weight)
    counts = targets != ignored
    kept = counts.nonzero()[:, 0]  # rows that do not count cost nothing: neither products nor memory
    rows, wanted = hidden.detach()[kept], targets[kept]
    if len(kept) and not bool(((wanted >= 0) & (wanted < classes)).all()):
        odd = wanted[(wanted < 0) | (wanted >= classes)][0]
        raise UserError(f"expected targets in 0 to {classes - 1} or {ignored}, got {int(odd)}")
    chunk = chunk_rows(len(kept))
    padded = -(-classes // ALIGNED) * ALIGNED
    room = torch.empty((chunk, padded), dtype=hidden.dtype, device=hidden.device)
    losses = []
    grad_rows = torch.empty_like(rows) if with_gradients else rows.new_empty(0)
    grad_weight = torch.zeros_like(weight) if with_gradients else weight.new_empty(0)
    for start in range(0, len(kept), chunk):
        h, t = rows[start : start + chunk], wanted[start : start + chunk]
        logits = torch.mm(h, weight.T, out=room[: len(h), :classes])
        losses.append(softmax(logits, t, with_gradients))
        if with_gradients:
            torch.mm(logits, weight, out=grad_rows[start : start + chunk])
            grad_weight.addmm_(logits.T, h)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    total = torch.cat(losses).sum() if losses else hidden.new_zeros((), dtype=wide)
    grad_hidden = grad_rows
    if with_gradients and len(kept) < len(hidden):
        grad_hidden = torch.zeros_like(hidden).index_copy_(0, kept, grad_rows)
    return total, torch.tensor(float(len(kept)), dtype=wide, device=hidden.device), grad_hidden, grad_weight
