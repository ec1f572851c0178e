"""What every step of a training on a clip store computes on: its clips, this process's share of them, packed."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kinetok.train.data.loading import Order
from kinetok.train.data.sequences import Sequences
from kinetok.train.packing import PackedBatch, pack_rows
from kinetok.train.scale_recipes import ScaleRecipe


@dataclass(frozen=True, slots=True)
class Draw:
    """The clips of one step over all processes, int64 ``[B]`` each: clip, caption, first token and how many."""

    clips: NDArray[np.int64]
    captions: NDArray[np.int64]
    first: NDArray[np.int64]
    count: NDArray[np.int64]


class Feed:
    """The steps of process ``rank`` of ``world``: clips ``train`` in the order of ``seed``, each with a random caption
    (section 6). What a step holds depends on its number, not on what came before it or on who asks."""

    def __init__(
        self,
        recipe: ScaleRecipe,
        data: Sequences,
        train: NDArray[np.int64],
        *,
        pass_positions: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.recipe, self.data, self.rank, self.world = recipe, data, rank, world
        self.pass_positions = pass_positions
        self.order = Order(train, recipe.batch, recipe.loop.seed)

    def draw(self, step: int) -> Draw:
        """The same in every process."""
        recipe, data, rng = self.recipe, self.data, self.order.rng(step)
        clips = self.order.step(step)
        captions = data.caption(clips, rng.random(recipe.batch))
        shorter = (rng.random(recipe.batch) < recipe.shorten) & (data.lengths[clips] > 1)
        head = rng.random(recipe.batch) < 0.5
        return Draw(clips, captions, (shorter & head).astype(np.int64), data.lengths[clips] - shorter)

    def positions(self, draw: Draw) -> NDArray[np.int64]:
        """Text, tokens and end of each clip of a step."""
        return np.minimum(self.data.text_lengths[draw.captions], self.recipe.max_text) + draw.count + 1

    def passes(self, draw: Draw) -> int:
        """How many passes a step takes, the same in every process, as all gather weights together."""
        positions = self.positions(draw)
        most = max(int(positions[rank :: self.world].sum()) for rank in range(self.world))
        return max(1, min(-(-most // self.pass_positions), self.recipe.batch // self.world))

    def batch(self, draw: Draw, rows: NDArray[np.int64]) -> PackedBatch:
        """Some clips of a step, packed; text features are in the 16 bits in which they are stored."""
        clips, captions, counts = draw.clips[rows], draw.captions[rows], draw.count[rows]
        lengths = np.minimum(self.data.text_lengths[captions], self.recipe.max_text)
        text, motion = self.data.rows(captions, lengths, clips, draw.first[rows], counts)
        return pack_rows(text, torch.from_numpy(lengths), motion, torch.from_numpy(counts), self.recipe.model)

    def step(self, number: int) -> tuple[Draw, list[PackedBatch]]:
        """The draw of a step, and this process's passes of it."""
        draw = self.draw(number)
        mine = np.array_split(np.arange(self.recipe.batch)[self.rank :: self.world], self.passes(draw))
        return draw, [self.batch(draw, rows) for rows in mine]
