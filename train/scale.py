"""Training of the paper's decoders on a clip store: packed batches, in one process or in many."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kinetok.errors import UserError
from kinetok.model.decoder import MotionDecoder
from kinetok.model.pretrained import save_pretrained
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion.skeleton import CANONICAL_OFFSETS
from kinetok.train.checkpoints import load_best
from kinetok.train.data.loading import Steps
from kinetok.train.data.sequences import Sequences
from kinetok.train.decoder import load_tokenizer
from kinetok.train.feed import Draw, Feed
from kinetok.train.loop import OneProcess, fit
from kinetok.train.packing import PackedBatch, PackedDecoder, fill
from kinetok.train.samples import Samples
from kinetok.train.scale_recipes import PASS_POSITIONS, ScaleRecipe

HELD_OUT = 512  # clips that a validation takes at most
VALIDATED = 16  # clips of one validation pass of a process


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """How a step is computed, which changes nothing but its speed: positions of one pass forward and backward (a step takes
    as many as it needs), activation checkpointing, torch.compile of the blocks."""

    pass_positions: int = PASS_POSITIONS
    checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.pass_positions < 1:
            raise UserError(f"expected positions of a pass above 0, got {self.pass_positions}")


class PackedTask:
    """Random captioned clips in, next-token cross-entropy out (section 4); every process takes its share of a step."""

    def __init__(
        self, recipe: ScaleRecipe, data: Sequences, processes: OneProcess, engine: Engine | None = None
    ) -> None:
        self.recipe, self.data, self.processes = recipe, data, processes
        self.engine = engine or Engine()
        fits = recipe.fits(data.lengths)
        most = f"of {recipe.min_tokens} to {recipe.max_tokens} tokens"
        self.train, self.held_out = processes.divide(data.folder, fits, data.splits, most, recipe.batch)
        self.held_out = self.held_out[:HELD_OUT]
        self.feed = Feed(
            recipe,
            data,
            self.train,
            pass_positions=self.engine.pass_positions,
            rank=processes.rank,
            world=processes.world,
        )
        self._steps = Steps(self.feed.step, recipe.loop.steps)
        torch.manual_seed(recipe.loop.seed)
        with torch.device("meta"):
            self.packed = PackedDecoder(MotionDecoder(recipe.model), checkpointing=self.engine.checkpointing)
        if self.engine.compile:
            for block in self.packed.decoder.blocks:
                block.compile(dynamic=True)
        processes.place(self.packed, fill, bf16=recipe.bf16)

    @property
    def module(self) -> nn.Module:
        return self.packed

    def samples(self, tokenizer: MotionTokenizer, mean: Tensor, std: Tensor, run: Path) -> Samples:
        """What draws the first three different captions of the held-out clips."""
        data = self.data
        captions = list(dict.fromkeys(data.caption(self.held_out, np.zeros(len(self.held_out))).tolist()))[:3]
        texts = {data.caption_text(row): data.text(row) for row in captions}
        return Samples(self.processes, tokenizer, mean, std, texts, run / "samples")

    def loss(self, step: int, rng: np.random.Generator) -> Mapping[str, Tensor]:
        draw, batches = self._steps(step)
        losses = self.passes(draw, batches)
        tokens = float(self.feed.positions(draw).sum())
        return {**losses, "tokens": torch.tensor(tokens, device=self.processes.device)}

    def passes(
        self, draw: Draw, batches: Sequence[PackedBatch], told: Callable[[str], None] = lambda part: None
    ) -> Mapping[str, Tensor]:
        """The loss of a step; all passes but the last have gone backward. told hears when a part of the work is done."""
        processes = self.processes
        # A mean over all targets of the step, wherever they are; FSDP takes the mean over the processes.
        share = processes.world / int((draw.count + 1).sum())
        done = torch.zeros((), device=processes.device)
        for number, packed in enumerate(batches):
            targets = packed.targets_counted
            batch = packed.to(processes.device)
            told("data")
            with processes.computing(self.recipe.bf16):
                loss = self.packed(batch) * (targets * share)
            told("forward")
            last = number == len(batches) - 1
            with processes.gathering_gradients(self.packed, last):
                if last:
                    return {"loss": loss + done}
                loss.backward()
            told("backward")
            done += loss.detach()
        raise AssertionError("a step has at least one pass")

    @torch.no_grad()
    def validate(self, module: nn.Module) -> Mapping[str, float]:
        """The loss over the targets of the held-out clips, each with its first caption."""
        processes, data = self.processes, self.data
        each = VALIDATED * processes.world
        total = torch.zeros(2, dtype=torch.float64, device=processes.device)
        for start in range(0, len(self.held_out), each):
            clips = self.held_out[start : start + each][processes.rank :: processes.world]
            # Every process takes part in every pass, with a clip that does not count where it has none.
            counted = bool(len(clips))
            clips = clips if counted else self.held_out[:1]
            captions = data.caption(clips, np.zeros(len(clips)))
            draw = Draw(clips, captions, np.zeros_like(clips), data.lengths[clips])
            packed = self.feed.batch(draw, np.arange(len(clips)))
            targets = packed.targets_counted
            batch = packed.to(processes.device)
            with processes.computing(self.recipe.bf16):
                loss = module(batch).double()
            if counted:
                total += torch.stack((loss * targets, torch.full_like(loss, targets)))
        total = processes.total(total)
        return {"loss": float(total[0] / total[1])}


def train(
    *,
    recipe: ScaleRecipe,
    name: str = "own",
    data: str | Path,
    tokenizer: str | Path,
    out: str | Path = "runs/decoder",
    resume: bool = False,
    engine: Engine | None = None,
    sample_every: int = 0,
) -> Path:
    """Train a decoder on a clip store with its tokens and text features; returns ``out/model``, for ``kinetok.load``.

    In all processes that torchrun started, or in this one. The model takes the tokenizer's codebook and the text
    features' width, whatever the recipe's size says; ``name`` is what it calls its recipe. Every ``sample_every`` steps
    three held-out captions become pictures in ``out/samples``.
    Raises ``UserError`` for a store without tokens or text features, or with those of another tokenizer.
    """
    from kinetok.train.distributed import start_processes

    processes = start_processes()
    with processes.running():
        motion, mean, std = processes.first(lambda: load_tokenizer(tokenizer))
        sequences = processes.first(lambda: Sequences(data, tokenizer=tokenizer))
        model = replace(recipe.model, codebook=motion.config.codebook, text_dim=sequences.text_dim)
        chosen = replace(recipe, model=model)
        loop = chosen.loop
        task = PackedTask(chosen, sequences, processes, engine)
        identity = {**asdict(chosen), "data": _digest(sequences)}
        best = fit(
            task,
            loop,
            out,
            resume=resume,
            identity=identity,
            processes=processes,
            sample=task.samples(motion, mean, std, Path(out)) if sample_every else None,
            sample_every=sample_every,
        )
        result = Path(out) / "model"
        if processes.rank == 0:
            state = load_best(best, mmap=True)
            with torch.device("meta"):
                decoder = MotionDecoder(model)
            decoder.load_state_dict(
                {key.removeprefix("decoder."): value for key, value in state["model"].items()}, assign=True
            )
            provenance: dict[str, Any] = {
                "recipe": name,
                "seed": loop.seed,
                "step": state["step"],
                "validation_loss": state["figures"]["loss"],
                "data": Path(data).resolve().name,
                "clips": len(task.train),
            }
            save_pretrained(
                result,
                tokenizer=motion,
                decoder=decoder.eval().half(),
                mean=mean.numpy(),
                std=std.numpy(),
                skeleton_offsets=CANONICAL_OFFSETS,
                text_encoder=sequences.text_encoder,
                sampling={"temperature": 1.0, "top_p": 0.9, "min_seconds": 2.0},
                provenance=provenance,
                licence="that of the data it was trained on",
                bank=None,
            )
        return result


def _digest(data: Sequences) -> str:
    about = json.dumps([data.identity, data.text_encoder, len(data.lengths), int(data.lengths.sum())])
    return hashlib.sha256(about.encode()).hexdigest()
