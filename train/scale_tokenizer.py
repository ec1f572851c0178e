"""Training of the paper's tokenizer on a clip store, in one process or in many (section 4)."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kinetok.errors import UserError
from kinetok.kernels.fsq import fsq_quantize
from kinetok.model.config import TokenizerConfig
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion.features import POSITIONS
from kinetok.motion.skeleton import JOINTS
from kinetok.train.checkpoints import load_best
from kinetok.train.data.loading import Order, Steps
from kinetok.train.data.shards import ClipStore
from kinetok.train.data.stats import streamed_mean_std
from kinetok.train.loop import OneProcess, fit
from kinetok.train.losses import released_loss
from kinetok.train.optim import LoopConfig
from kinetok.train.samples import Reconstructions
from kinetok.train.scale_recipes import DAY, PREFIX, SMOKE, check_rate
from kinetok.train.tokenizer import save_tokenizer

MEASURED = 4096  # training clips that mean and deviation are taken from
HELD_OUT = 256  # clips that a validation takes at most
LONGEST = 600  # frames of a clip that a validation looks at


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreTokenizerRecipe:
    """``batch`` windows of ``frames`` frames a step over all processes, each from a clip drawn at random."""

    model: TokenizerConfig
    loop: LoopConfig
    batch: int = 256
    frames: int = 96


def store_tokenizer_recipe(name: str) -> StoreTokenizerRecipe:
    """ "motionmillion": the paper's run, 4 x 64 windows, 6 million steps in fp32 after 48,000 of warm-up; no average.

    The rate falls to a twentieth after 300,000 steps, as the options say; the reference, which steps its schedule once
    for each of its four processes, gets there after 75,000. "smoke" is a toy for trying out processes, disk and data.
    """
    if name == SMOKE:
        return StoreTokenizerRecipe(
            model=TokenizerConfig(nb_code=256, code_dim=32, width=32, depth=1),
            loop=LoopConfig(steps=20, warmup=5, validate_every=10, save_every=10, log_every=1),
            batch=8,
            frames=32,
        )
    if name != PREFIX.rstrip("-"):
        raise UserError(f"unknown tokenizer recipe {name!r}: expected mini, {SMOKE} or {PREFIX.rstrip('-')}")
    return StoreTokenizerRecipe(
        model=TokenizerConfig(),
        loop=LoopConfig(
            steps=47_999 + 6_000_000,
            seed=123,
            lr=5e-5,
            betas=(0.9, 0.99),
            warmup=48_000,
            schedule="reference-tokenizer",
            clip_norm=None,
            ema=None,
            validate_every=10_000,
            save_every=1_000,
            log_every=100,
            keep="last",
        ),
    )


class StoreTokenizer(nn.Module):
    """The tokenizer as it is trained: encoder, rounded codes with a straight-through gradient, decoder."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.tokenizer = MotionTokenizer(config)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised frames ``[B, T, 272]`` to their reconstruction and the int32 tokens."""
        tokenizer = self.tokenizer
        latents = tokenizer.project_in(tokenizer.latents(frames))
        codes, indices = fsq_quantize(latents, tokenizer.config.levels)
        return tokenizer.frames(tokenizer.project_out(codes)), indices


class Windows:
    """The steps of process ``rank`` of ``world``: windows of clips ``train``, each from a frame drawn at random."""

    def __init__(
        self,
        recipe: StoreTokenizerRecipe,
        store: ClipStore,
        train: NDArray[np.int64],
        mean: NDArray[np.float64],
        std: NDArray[np.float64],
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.recipe, self.store, self.mean, self.std = recipe, store, mean, std
        self.rank, self.world = rank, world
        self.order = Order(train, recipe.batch, recipe.loop.seed)

    def normal(self, clip: int) -> Tensor:
        return torch.from_numpy(((self.store.read(clip) - self.mean) / self.std).astype(np.float32))

    def step(self, number: int) -> Tensor:
        """This process's windows of a step, normalised ``[b, frames, 272]``."""
        frames = self.recipe.frames
        clips = self.order.step(number)
        starts = self.order.rng(number).integers(self.store.frames[clips] - frames + 1)
        mine = range(self.rank, self.recipe.batch, self.world)
        return torch.stack([self.normal(int(clips[row]))[starts[row] : starts[row] + frames] for row in mine])


class WindowTask:
    """Random windows of training clips in, the released reconstruction loss out; a process takes its share of a step."""

    def __init__(self, recipe: StoreTokenizerRecipe, store: ClipStore, processes: OneProcess) -> None:
        self.recipe, self.store, self.processes = recipe, store, processes
        long = store.frames >= recipe.frames
        what = f"of {recipe.frames} frames or more"
        self.train, self.held_out = processes.divide(store.folder, long, store.splits, what, recipe.batch)
        self.held_out = self.held_out[:HELD_OUT]
        some = np.random.default_rng(0).permutation(self.train)[:MEASURED]
        self.mean, self.std = processes.agree(lambda: streamed_mean_std(store.read(int(clip)) for clip in some))
        share = {"rank": processes.rank, "world": processes.world}
        self.windows = Windows(recipe, store, self.train, self.mean, self.std, **share)
        self.normal = self.windows.normal
        self._steps = Steps(self.windows.step, recipe.loop.steps)
        torch.manual_seed(recipe.loop.seed)
        self.module: nn.Module = StoreTokenizer(recipe.model)
        processes.spread(self.module)

    def loss(self, step: int, rng: np.random.Generator) -> Mapping[str, Tensor]:
        recipe, processes = self.recipe, self.processes
        target = self._steps(step).to(processes.device)
        # A mean over all windows of the step, wherever they are; the mean over the processes is taken of the gradients.
        share = len(target) * processes.world / recipe.batch
        return {"loss": released_loss(self.module(target)[0], target) * share}

    @torch.no_grad()
    def validate(self, module: nn.Module) -> Mapping[str, float]:
        """Held-out clips of at most 600 frames, a mean over clips: the loss and how far joints are off; codes in use."""
        processes, unit = self.processes, self.recipe.model.frames_per_token
        scale = torch.from_numpy(self.std).float().to(processes.device)
        total = torch.zeros(3, dtype=torch.float64, device=processes.device)
        used = torch.zeros(self.recipe.model.codebook, device=processes.device)
        for start in range(0, len(self.held_out), processes.world):
            # Every process takes part in every pass, with a clip that does not count where it has none.
            at = start + processes.rank
            counted = at < len(self.held_out)
            clip = int(self.held_out[at if counted else 0])
            target = self.normal(clip)[None, : min(int(self.store.frames[clip]), LONGEST) // unit * unit].to(
                processes.device
            )
            pred, indices = module(target)
            if counted:
                gap = ((pred - target) * scale)[..., POSITIONS].unflatten(-1, (JOINTS, 3))
                error = (gap - gap[..., :1, :]).norm(dim=-1).mean()
                total += torch.stack((released_loss(pred, target), error, torch.ones_like(error))).double()
                used[indices.flatten().long()] = 1
        loss, error, count = processes.total(total).tolist()
        codes = int((processes.total(used) > 0).sum())
        return {"loss": loss / count, "mpjpe_mm": 1e3 * error / count, "codes": codes}


def train(
    *,
    recipe: StoreTokenizerRecipe,
    data: str | Path,
    out: str | Path = "runs/tokenizer",
    resume: bool = False,
    sample_every: int = 0,
) -> Path:
    """Train a tokenizer on a clip store; returns ``out/tokenizer.pt``, as ``train/tokenizer.py`` writes it.

    In all processes that torchrun started, or in this one. Mean and deviation are those of 4,096 training clips. Every
    ``sample_every`` steps three held-out clips, as the tokenizer gives them back, become pictures in ``out/samples``.
    Raises ``UserError`` for a store without clips of a window's length in both splits.
    """
    from kinetok.train.distributed import start_processes

    processes = start_processes()
    with processes.running():
        store = processes.first(lambda: ClipStore(data))
        task = WindowTask(recipe, store, processes)
        mean, std = torch.from_numpy(task.mean), torch.from_numpy(task.std)
        clips = {store.id(int(clip)): task.normal(int(clip)) for clip in task.held_out[:3]}
        best = fit(
            task,
            recipe.loop,
            out,
            resume=resume,
            identity={**asdict(recipe), "data": _digest(store, task.mean)},
            processes=processes,
            sample=Reconstructions(processes, clips, mean, std, Path(out) / "samples") if sample_every else None,
            sample_every=sample_every,
        )
        result = Path(out) / "tokenizer.pt"
        if processes.rank == 0:
            state = load_best(best)
            tokenizer = MotionTokenizer(recipe.model)
            tokenizer.load_state_dict({key.removeprefix("tokenizer."): value for key, value in state["model"].items()})
            save_tokenizer(result, tokenizer, mean, std, state["figures"])
        return result


def _digest(store: ClipStore, mean: NDArray[np.float64]) -> str:
    about = json.dumps([len(store), int(store.frames.sum()), mean.round(6).tolist()])
    return hashlib.sha256(about.encode()).hexdigest()


def cost_lines(
    name: str, recipe: StoreTokenizerRecipe, *, processes: int, tokens_per_second: float | None = None
) -> list[str]:
    """What a run takes, for people: parameters, memory per GPU, tokens per step, days at a measured rate.

    State as in ``scale_recipes.cost``; activations are what one window keeps for its backward pass, counted.
    """
    check_rate(tokens_per_second)
    if processes > recipe.batch:
        raise UserError(f"more processes than data: {processes} processes for batches of {recipe.batch}")
    module, gib = StoreTokenizer(recipe.model), 2**30
    total = sum(p.numel() for p in module.parameters())
    state = 4 * (4 + (recipe.loop.ema is not None)) * total / processes
    working = 0 if processes == 1 else 2 * 4 * total
    activations = kept_bytes(module, recipe.frames) * -(-recipe.batch // processes)
    tokens = recipe.batch * recipe.frames // recipe.model.frames_per_token
    days = data = "not measured; give --tokens-per-second RATE"
    if tokens_per_second is not None:
        windows = recipe.batch / tokens * tokens_per_second / processes
        data = f"{windows:,.1f} windows/s, {tokens_per_second / processes:,.0f} tokens/s, at that rate"
        days = f"{recipe.loop.steps * tokens / tokens_per_second / DAY:.1f}"
    return [
        f"{name}: {total:,} parameters, {recipe.loop.steps:,} steps of {recipe.batch} windows of {recipe.frames} frames, "
        f"learning rate {recipe.loop.lr:g}",
        f"memory per GPU, {processes} of them: {(state + working + activations) / gib:.2f} GiB (weights and optimiser "
        f"{state / gib:.2f}, weights at work {working / gib:.2f}, activations {activations / gib:.2f})",
        f"tokens per step: {tokens:,}",
        f"data per GPU: {data}",
        f"days: {days}",
    ]


def kept_bytes(module: nn.Module, frames: int) -> int:
    """Bytes that autograd keeps of a window for the backward pass, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    frame = torch.zeros(1, frames, 272)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = released_loss(module(frame)[0], frame)
    del loss
    return sum(kept.values())
