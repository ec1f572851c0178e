"""What a training step computes on: draws as the reference's, shares of processes, passes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinetok.model.config import DecoderConfig
from kinetok.train.data.loading import load
from kinetok.train.feed import Draw, Feed
from kinetok.train.optim import LoopConfig
from kinetok.train.packing import PackedBatch, pack
from kinetok.train.scale_recipes import ScaleRecipe

RECIPE = ScaleRecipe(
    model=DecoderConfig(n_layer=1, n_head=2, n_embd=16, codebook=90, text_dim=6, block_size=60),
    loop=LoopConfig(steps=6),
    batch=9,
    max_text=12,
)


class Tables:
    """Stands for ``Sequences``: 33 clips of 1 to 30 tokens, two captions each."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.lengths: NDArray[np.int64] = rng.integers(1, 31, 33)
        self.text_lengths: NDArray[np.int64] = rng.integers(1, 20, 66)
        self._tokens = [torch.from_numpy(rng.integers(90, size=n)) for n in self.lengths]
        self._text = [torch.from_numpy(rng.standard_normal((n, 6))).half() for n in self.text_lengths]

    def caption(self, clips: NDArray[np.int64], chance: NDArray[np.float64]) -> NDArray[np.int64]:
        return 2 * clips + (chance >= 0.5)

    def rows(self, captions, text_lengths, clips, first, counts) -> tuple[Tensor, Tensor]:
        text = [self._text[caption][:n] for caption, n in zip(captions, text_lengths, strict=True)]
        tokens = [self._tokens[clip][at : at + n] for clip, at, n in zip(clips, first, counts, strict=True)]
        return torch.cat(text), torch.cat(tokens)


def feed(recipe: ScaleRecipe = RECIPE, **given) -> Feed:
    options = {"pass_positions": 10_000, **given}
    return Feed(recipe, Tables(), np.arange(33), **options)  # type: ignore[arg-type]


def test_draws_follow_the_reference() -> None:
    one = feed(replace(RECIPE, batch=3300))
    draw = one.draw(0)
    dropped = one.data.lengths[draw.clips] - draw.count
    long = one.data.lengths[draw.clips] > 1
    assert set(dropped) == {0, 1} and abs(dropped[long].mean() - 1 / 3) < 0.03 and not dropped[~long].any()
    assert abs(draw.first[dropped == 1].mean() - 0.5) < 0.06 and not draw.first[dropped == 0].any()
    assert (np.bincount(draw.clips) == 100).all() and abs((draw.captions % 2).mean() - 0.5) < 0.06


def same(one: PackedBatch, other: PackedBatch) -> None:
    for name in PackedBatch.__slots__:
        a, b = getattr(one, name), getattr(other, name)
        assert a == b if isinstance(a, int) else torch.equal(a, b), name


def items(one: Feed, draw: Draw, rows: list[int]) -> list[tuple[Tensor, Tensor]]:
    data = one.data
    found = []
    for row in rows:
        clip, caption, first, count = (int(a[row]) for a in (draw.clips, draw.captions, draw.first, draw.count))
        found.append((data._text[caption][:12], data._tokens[clip][first : first + count]))  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("pass_positions", [30, 10_000])
def test_the_shares_of_the_processes_are_the_step(world: int, pass_positions: int) -> None:
    for step in range(4):
        seen, sizes = [], set()
        for rank in range(world):
            one = feed(rank=rank, world=world, pass_positions=pass_positions)
            draw, batches = one.step(step)
            mine = list(range(9))[rank::world]
            for batch in batches:
                count = len(batch.lengths)
                same(batch, pack(items(one, draw, mine[:count]), RECIPE.model))
                seen += mine[:count]
                mine = mine[count:]
            assert not mine
            sizes.add(len(batches))
        assert sorted(seen) == list(range(9))
        assert len(sizes) == 1 and (sizes == {1}) == (pass_positions == 10_000)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_step_is_the_same_again(workers: int) -> None:
    whole = [feed(pass_positions=30).step(step) for step in range(9)]
    for start in (0, 4):
        again = load(feed(pass_positions=30).step, start, 9, workers)
        for (draw, batches), (other, their) in zip(whole[start:], again, strict=True):
            np.testing.assert_array_equal(draw.captions, other.captions)
            assert len(batches) == len(their)
            for one, two in zip(batches, their, strict=True):
                same(one, two)
