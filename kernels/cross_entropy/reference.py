"""Eager cross-entropy of a linear head."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int = -100) -> Tensor:
    """Mean of -log softmax(weight h)[target] over the rows of ``hidden [N, d]`` whose target ``[N]`` is not ``ignored``.

    weight ``[V, d]``. The products are in hidden's dtype, the softmax in fp32 (fp64 for fp64 input); the result is a
    scalar of that dtype, NaN where no target counts. All ``N x V`` logits are alive at once.
    """
    logits = hidden @ weight.T
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return cross_entropy(logits.to(wide), targets, ignore_index=ignored)


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the op returns (``chunks.linear_cross_entropy_sum``) in aten operators alone, for exported programs."""
    logits = hidden @ weight.T
    wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    counts = targets != ignored
    chosen = targets.where(counts, 0)[:, None]
    losses = (wide.logsumexp(1) - wide.gather(1, chosen)[:, 0]).where(counts, 0)
    total, count = losses.sum(), counts.sum(dtype=wide.dtype)
    if not with_gradients:
        return total, count, hidden.new_empty(0), weight.new_empty(0)
    change = wide.softmax(1).scatter_add(1, chosen, -torch.ones_like(wide[:, :1]))
    change = change.where(counts[:, None], 0).to(hidden.dtype)
    return total, count, change @ weight, change.T @ hidden
