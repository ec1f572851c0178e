"""Whether a token could have been drawn on a machine whose logits differ from these by no more than so much."""

import math

import torch
from torch import Tensor


def drawable(token: int, scaled: Tensor, noise: Tensor, slack: float, *, top_k: int = 0, top_p: float = 1.0) -> bool:
    """Whether logits within ``slack`` of ``scaled [V]`` may draw ``token`` (docs/numerics.md).

    scaled: after guidance, bans (-inf) and temperature; noise ``[V]`` is exact, 0 for the arg-max. True for every token that
    some such logits draw; false for nearly all others, each being taken at its best against the rest at their worst.
    """
    values, order = scaled.double().sort(descending=True)
    noise, at = noise.double()[order], int((order == token).nonzero())
    if not torch.isfinite(values[at]):
        return False
    weights, apart = (values - values[0]).exp(), math.exp(min(2 * slack, 600.0))
    sums = torch.cat((weights.new_zeros(1), weights.cumsum(0)))  # of the first so many
    rising = -values
    # What is ahead of the token whatever happens; and how many, itself among them, may be ahead of each.
    ahead = int(torch.searchsorted(rising, -(values[at] + 2 * slack)))
    reach = torch.searchsorted(rising, 2 * slack - values, right=True)
    kept = values > -torch.inf  # whatever happens
    if top_k:
        if ahead >= top_k:
            return False
        kept &= reach <= top_k
    if top_p < 1:
        last = min(top_k, len(values)) if top_k else len(values)
        before, after = float(sums[ahead]), float(sums[last] - sums[ahead]) * apart
        if before and before >= top_p * (before + after):
            return False
        worst = (sums[reach] - weights) * apart
        least = weights + (sums[last] - sums[reach]).clamp(min=0)
        kept &= worst < top_p * (worst + least)
    return not bool((kept & (values + noise > values[at] + noise[at] + 2 * slack)).any())
