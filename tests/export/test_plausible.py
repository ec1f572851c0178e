"""What may be drawn within a bound on the logits: all that some logits within it draw, and nothing else to speak of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.export.plausible import drawable
from kinetok.kernels.sampling import draw, gumbel

CUTS = [(0, 1.0), (0, 0.9), (0, 0.3), (5, 1.0), (5, 0.8), (1, 1.0), (100, 0.5)]


def rows(seed: int, classes: int, spread: float):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1, classes, generator=generator) * spread
    noise = gumbel(classes, *(torch.tensor([value]) for value in (seed, 3, 1)))
    return generator, values, noise


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1 << 30), st.integers(2, 60), st.sampled_from([0.1, 1.0, 4.0]), st.sampled_from(CUTS),
    st.sampled_from([0.0, 1e-3, 0.1, 0.7]),
)  # fmt: skip
def test_whatever_logits_within_the_bound_draw_is_drawable(seed, classes, spread, cuts, slack) -> None:
    generator, values, noise = rows(seed, classes, spread)
    top_k, top_p = cuts
    for _ in range(8):
        sign = torch.randint(-1, 2, values.shape, generator=generator)
        token = int(draw(values + slack * sign, noise, top_k=top_k, top_p=top_p))
        # The bound and the integer weights of the sampler are rounded in the last places.
        assert drawable(token, values[0], noise[0], slack * (1 + 1e-6) + 1e-5, top_k=top_k, top_p=top_p)


@pytest.mark.parametrize("cuts", CUTS)
def test_without_slack_one_token_is_left(cuts) -> None:
    top_k, top_p = cuts
    for seed in range(20):
        _, values, noise = rows(seed, 50, 2.0)
        token = int(draw(values, noise, top_k=top_k, top_p=top_p))
        found = [t for t in range(50) if drawable(t, values[0], noise[0], 1e-5, top_k=top_k, top_p=top_p)]
        assert found == [token]


def test_a_little_slack_leaves_few() -> None:
    counts = []
    for seed in range(8):
        _, values, noise = rows(seed, 500, 3.0)
        counts.append(sum(drawable(t, values[0], noise[0], 0.05, top_p=0.9) for t in range(500)))
    assert min(counts) == 1 and sum(counts) < 2 * len(counts)


def test_what_is_banned_is_never_drawable() -> None:
    values = torch.tensor([0.0, -torch.inf, 1.0])
    assert not drawable(1, values, torch.tensor([0.0, 99.0, 0.0]), 5.0)
    assert drawable(0, values, torch.zeros(3), 0.5) and not drawable(0, values, torch.zeros(3), 0.4)
