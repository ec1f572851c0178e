"""Recipes of the paper's decoders, and what a run of one costs (section 4)."""

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from kinetok.errors import UserError
from kinetok.model.config import DecoderConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.presets import DECODERS, decoder_preset
from kinetok.train.optim import LoopConfig

PREFIX, SMOKE = "motionmillion-", "smoke"
MAX_TEXT = 150  # text features a caption is cut to
PASS_POSITIONS = 16_384  # of a process, where nobody says otherwise
DAY = 86400
GOAL, H100 = 0.46, 989e12  # the share of an H100's bf16 operations a second that a training aims at


class Loops(Protocol):
    """A recipe of a training."""

    @property
    def loop(self) -> LoopConfig: ...


Recipe = TypeVar("Recipe", bound=Loops)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleRecipe:
    """``batch`` clips a step over all processes; captions of at most ``max_text`` features, clips of ``min_tokens`` to
    ``max_tokens`` tokens. With the chance ``shorten``, one token is left off, at the head or the tail alike.

    bf16 is the precision of the products and of the gathered weights; weights, gradients' sums and optimiser are fp32.
    """

    model: DecoderConfig
    loop: LoopConfig
    batch: int = 640
    max_text: int = MAX_TEXT
    min_tokens: int = 30
    max_tokens: int = 150
    shorten: float = 1 / 3
    bf16: bool = True

    def fits(self, lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which clips of so many tokens are drawn."""
        return (lengths >= self.min_tokens) & (lengths <= self.max_tokens)


def scale_recipe(name: str) -> ScaleRecipe:
    """The paper's run for a size, ``motionmillion-7b``: 16 x 40 clips of 2 to 10 s, 240,000 steps, 4e-4 at most.

    One rate for all sizes, as the paper has one for its two. The reference clips no gradients and keeps no average.
    "smoke" is a toy that is over in a minute: whether processes, disk and data work together shows before the real run.
    """
    sizes = {f"{PREFIX}{size.lower()}": size for size in DECODERS}
    if name == SMOKE:
        return ScaleRecipe(
            model=DecoderConfig(n_layer=2, n_head=4, n_embd=64),
            loop=LoopConfig(steps=20, warmup=5, validate_every=10, save_every=10, log_every=1),
            batch=16,
            min_tokens=1,
        )
    if name not in sizes:
        raise UserError(f"unknown decoder recipe {name!r}: expected mini, {SMOKE} or one of {', '.join(sizes)}")
    return ScaleRecipe(
        model=decoder_preset(sizes[name]),
        loop=LoopConfig(
            steps=240_000,
            seed=123,
            lr=4e-4,
            betas=(0.9, 0.999),
            eps=1e-6,
            weight_decay=1e-6,
            decay_all=True,
            warmup=12_000,
            schedule="reference",
            clip_norm=None,
            ema=None,
            validate_every=10_000,
            save_every=1_000,
            log_every=10,
            keep="last",
        ),
    )


def with_loop(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with other numbers of its loop; a number that is None stays the recipe's."""
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(recipe, loop=replace(recipe.loop, **given))  # type: ignore[type-var]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a run takes. Bytes are of each process, as are the clips and tokens a second that its data has to bring: at the
    measured rate, or by arithmetic what an H100 at the goal takes. ``days`` is None where no rate was measured."""

    parameters: int
    processes: int
    state_bytes: int
    working_bytes: int
    activation_bytes: int
    tokens_per_step: int
    flop_per_step: float
    clips_per_second: float
    tokens_per_second: float
    days: float | None

    @property
    def memory_bytes(self) -> int:
        return self.state_bytes + self.working_bytes + self.activation_bytes


def check_rate(tokens_per_second: float | None) -> None:
    if tokens_per_second is not None and not 0 < tokens_per_second < math.inf:  # false for NaN
        raise UserError(f"expected tokens a second above 0, got {tokens_per_second:g}")


def parameters(config: DecoderConfig) -> int:
    """Numbers in a decoder's weights, a tied head counted once."""
    with torch.device("meta"):
        return sum(p.numel() for p in MotionDecoder(config).parameters())


def step_flop(config: DecoderConfig, sequences: int, text: float, motion: float) -> float:
    """Floating-point operations of one step, forward and backward (twice the forward), recomputation not counted.

    A sequence of ``text`` features and ``motion`` tokens (end included) multiplies every matrix with each position, the
    head with the motion's, and its queries with the keys they see.
    """
    width, positions = config.n_embd, text + motion
    block = 4 * width * width + 3 * width * config.mlp_width
    seen = text * text + motion * text + motion * (motion + 1) / 2
    forward = positions * 2 * block * config.n_layer + 4 * width * seen * config.n_layer
    forward += motion * 2 * width * config.head_rows + text * 2 * config.text_dim * width
    return 3 * forward * sequences


def cost(
    recipe: ScaleRecipe,
    *,
    processes: int,
    pass_positions: int,
    checkpointing: bool = False,
    tokens_per_second: float | None = None,
    text: float | None = None,
    motion: float | None = None,
) -> Cost:
    """The cost of a recipe on ``processes`` GPUs; text and motion are mean lengths, the recipe's longest without.

    State: fp32 weights, gradients, two moments (and the average) divided by the processes. Weights at work, in the
    precision of the products: in one process a copy of all and the head's gradient; in many those that are whole at a
    time, outside of the blocks and of two blocks, with their gradients. Activations: what a pass of ``pass_positions``
    keeps for the backward pass, queries, keys and values in rows as long as the longest. Frameworks' own buffers are not
    in it.
    """
    if processes < 1 or pass_positions < 1:
        raise UserError(f"expected processes and positions above 0, got {processes} and {pass_positions}")
    check_rate(tokens_per_second)
    if processes > recipe.batch:
        raise UserError(f"more processes than data: {processes} processes for batches of {recipe.batch}")
    config = recipe.model
    width, total = config.n_embd, parameters(config)
    block = 4 * width * width + 3 * width * config.mlp_width + 2 * width
    outside = total - block * config.n_layer
    item = 2 if recipe.bf16 else 4
    copies = 4 + (recipe.loop.ema is not None)
    text = recipe.max_text if text is None else text
    motion = recipe.max_tokens + 1 if motion is None else motion
    positions = min(pass_positions, -(-recipe.batch // processes) * (text + motion))
    # Of a block: its input and the sum after the attention, in fp32; two normed copies and the mixed values; q, k, v and
    # the mixed values in rows; gate, up and their product.
    padding = (recipe.max_text + recipe.max_tokens + 1) / (text + motion)
    kept = 2 * 4 * width + item * (3 * width + 4 * width * padding + 3 * config.mlp_width)
    activations = positions * (4 * width * config.n_layer + kept if checkpointing else kept * config.n_layer)
    activations += (
        positions * (4 + 2 * item) * width
    )  # after the blocks: a sum, the norm's result, the loss's gradient in it
    head = config.head_rows * width
    if processes == 1:
        working = item * (total + head) if recipe.bf16 else item * head
    else:
        working = 2 * item * (outside + 2 * block)
    chunk = min(positions / 10, 4096) * config.head_rows * item
    tokens = round(recipe.batch * (text + motion))
    flop = step_flop(config, recipe.batch, text, motion)
    steps = tokens_per_second / tokens / processes if tokens_per_second is not None else GOAL * H100 / flop
    return Cost(
        parameters=total,
        processes=processes,
        state_bytes=round(4 * copies * total / processes),
        working_bytes=working,
        activation_bytes=round(activations + chunk),
        tokens_per_step=tokens,
        flop_per_step=flop,
        clips_per_second=recipe.batch * steps,
        tokens_per_second=tokens * steps,
        days=None if tokens_per_second is None else recipe.loop.steps * tokens / tokens_per_second / DAY,
    )


def cost_lines(name: str, recipe: ScaleRecipe, found: Cost, *, longest: bool) -> list[str]:
    """The cost for people."""
    bound = " at most" if longest else ""
    gib = 2**30
    days = "not measured; give --tokens-per-second RATE" if found.days is None else f"{found.days:.1f}"
    rate = "at that rate" if found.days is not None else f"for an H100 at {GOAL:.0%} of {H100 / 1e12:.0f} TFLOP/s"
    return [
        f"{name}: {found.parameters:,} parameters, {recipe.loop.steps:,} steps of {recipe.batch} clips, "
        f"learning rate {recipe.loop.lr:g}",
        f"memory per GPU, {found.processes} of them: {found.memory_bytes / gib:.1f} GiB{bound} "
        f"(weights and optimiser {found.state_bytes / gib:.1f}, weights at work {found.working_bytes / gib:.1f}, "
        f"activations {found.activation_bytes / gib:.1f})",
        f"tokens per step:{bound} {found.tokens_per_step:,} ({found.flop_per_step:.3g} operations)",
        f"data per GPU: {found.clips_per_second:,.1f} clips/s, {found.tokens_per_second:,.0f} tokens/s, {rate}",
        f"days: {days}",
    ]
