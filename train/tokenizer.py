"""Training of the motion tokenizer on a small captioned set."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kinetok.errors import UserError
from kinetok.kernels.fsq import fsq_bound, fsq_quantize
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion.features import POSITIONS
from kinetok.motion.skeleton import JOINTS
from kinetok.train.checkpoints import load_best, save_whole
from kinetok.train.data.stats import mean_std
from kinetok.train.data.store import Clip, read_clips
from kinetok.train.loop import OneProcess, fit
from kinetok.train.losses import mini_losses
from kinetok.train.recipes import TokenizerRecipe, tokenizer_recipe
from kinetok.train.samples import Reconstructions


def draw_weights(clips: Sequence[Clip], power: float) -> NDArray[np.float64]:
    """Probability of drawing each clip: (clips with its label) ** power, so that common labels do not swamp rare ones."""
    counts = Counter(clip.label for clip in clips)
    weights = np.array([counts[clip.label] ** power for clip in clips])
    return weights / weights.sum()


class _Trained(nn.Module):
    """The tokenizer with a batch norm before the quantiser, which keeps the codes in use and folds away at the end."""

    def __init__(self, recipe: TokenizerRecipe) -> None:
        super().__init__()
        self.tokenizer = MotionTokenizer(recipe.model)
        self.norm = nn.BatchNorm1d(len(recipe.model.levels), affine=False)
        self.bf16 = recipe.bf16

    def forward(self, frames: Tensor, unrounded: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised frames ``[B, T, 272]`` to their reconstruction, the int32 tokens, and the size of the latents.

        The norm leaves the scale of the latents free; without a small price on their mean square they grow without
        limit, and unseen bodies decode badly.
        """
        tokenizer = self.tokenizer
        levels = tokenizer.config.levels
        fast = torch.autocast(frames.device.type, torch.bfloat16, enabled=self.bf16 and self.training)
        with fast:
            latents = tokenizer.latents(frames)
        z = tokenizer.project_in(latents.float())
        size = z.square().mean()
        z = self.norm(z.flatten(0, 1)).view_as(z)
        codes, indices = fsq_quantize(z, levels)
        if unrounded:
            free = fsq_bound(z, levels) / z.new_tensor([level // 2 for level in levels])
            codes = torch.where(torch.rand(len(z), 1, 1, device=z.device) < unrounded, free, codes)
        embedded = tokenizer.project_out(codes)
        with fast:
            decoded = tokenizer.frames(embedded)
        return decoded.float(), indices, size

    @torch.no_grad()
    def folded(self) -> MotionTokenizer:
        """The plain tokenizer that computes the same, the norm folded into ``project_in``."""
        tokenizer = MotionTokenizer(self.tokenizer.config)
        tokenizer.load_state_dict(self.tokenizer.state_dict())
        project = tokenizer.project_in
        assert isinstance(project, nn.Linear) and self.norm.running_var is not None
        assert self.norm.running_mean is not None
        scale = (self.norm.running_var + self.norm.eps).rsqrt()
        project.weight.mul_(scale[:, None])
        project.bias.sub_(self.norm.running_mean).mul_(scale)
        return tokenizer.eval()


class TokenizerTask:
    """Windows of training clips in, reconstruction losses out."""

    def __init__(self, recipe: TokenizerRecipe, clips: Sequence[Clip]) -> None:
        self.recipe = recipe
        train = [clip for clip in clips if clip.split == "train" and not clip.heading_flips]
        held_out = [clip for clip in clips if clip.split == "val" and not clip.heading_flips]
        if not train or not held_out:
            raise UserError(f"expected clips in the splits train and val, got {len(train)} and {len(held_out)}")
        self.mean, self.std = mean_std(train)
        self.sides = [(self._normal(c.features), self._normal(c.mirrored)) for c in train]
        self.held_out = held_out
        self.weights = draw_weights(train, recipe.balance)
        self.scale = torch.tensor(self.mean, dtype=torch.float32), torch.tensor(self.std, dtype=torch.float32)
        torch.manual_seed(recipe.loop.seed)
        self.module = _Trained(recipe)

    def _normal(self, features: NDArray) -> Tensor:
        return torch.from_numpy(((features - self.mean) / self.std).astype(np.float32))

    def loss(self, step: int, rng: np.random.Generator) -> Mapping[str, Tensor]:
        recipe = self.recipe
        lengths, shares = zip(*recipe.windows, strict=True)
        frames = int(rng.choice(lengths, p=shares))
        batch = recipe.frames // frames
        windows: list[Tensor] = []
        while len(windows) < batch:
            side = self.sides[rng.choice(len(self.sides), p=self.weights)][rng.integers(2)]
            if len(side) >= frames:
                start = rng.integers(len(side) - frames + 1)
                windows.append(side[start : start + frames])
        target = torch.stack(windows)
        share = recipe.unrounded * max(0.0, 1 - step / (0.3 * recipe.loop.steps))
        pred, _, size = self.module(target, share)
        losses = mini_losses(pred, target, *self.scale, bands=recipe.bands)
        return {**losses, "loss": losses["loss"] + recipe.latent_price * size, "latent": size}

    @torch.no_grad()
    def validate(self, module: nn.Module) -> Mapping[str, float]:
        """Averages over labels, since the held-out clips are mostly standing ones; codes in use over all of them."""
        labels = Counter(clip.label for clip in self.held_out)
        loss, error, used = 0.0, 0.0, set()
        unit = self.recipe.model.frames_per_token
        for clip in self.held_out:
            target = self._normal(clip.features)[None, : len(clip.features) // unit * unit]
            pred, indices, _ = module(target)
            share = 1 / labels[clip.label] / len(labels)
            loss += share * float(mini_losses(pred, target, *self.scale)["loss"])
            gap = ((pred - target) * self.scale[1])[..., POSITIONS].unflatten(-1, (JOINTS, 3))
            error += share * float((gap - gap[..., :1, :]).norm(dim=-1).mean())
            used.update(indices.flatten().tolist())
        return {"loss": loss, "mpjpe_mm": 1e3 * error, "codes": len(used)}


def train(
    *,
    recipe: str = "mini",
    data: str | Path = "data/cmu",
    out: str | Path = "runs/tokenizer",
    resume: bool = False,
    seed: int | None = None,
    sample_every: int = 0,
) -> Path:
    """Train a tokenizer; returns ``out/tokenizer.pt`` ({"config", "model", "mean", "std", "figures"}).

    About 25 minutes for the mini recipe on an idle core. ``seed`` replaces the recipe's own. Every ``sample_every`` steps
    three held-out clips, as the tokenizer gives them back, become pictures in ``out/samples``.
    """
    chosen = tokenizer_recipe(recipe)
    if seed is not None:
        chosen = replace(chosen, loop=replace(chosen.loop, seed=seed))
    task = TokenizerTask(chosen, read_clips(data))
    mean, std = torch.from_numpy(task.mean), torch.from_numpy(task.std)
    clips = {clip.id: task._normal(clip.features) for clip in task.held_out[:3]}
    best = fit(
        task,
        chosen.loop,
        out,
        resume=resume,
        identity=asdict(chosen),
        sample=Reconstructions(OneProcess(), clips, mean, std, Path(out) / "samples") if sample_every else None,
        sample_every=sample_every,
    )
    state = load_best(best)
    task.module.load_state_dict(state["model"])
    return save_tokenizer(Path(out) / "tokenizer.pt", task.module.folded(), mean, std, state["figures"])


def save_tokenizer(
    path: Path, tokenizer: MotionTokenizer, mean: Tensor, std: Tensor, figures: Mapping[str, float]
) -> Path:
    """Write what ``train/decoder.py: load_tokenizer`` reads: weights, mean ``[272]``, std ``[272]``, held-out figures."""
    weights = tokenizer.state_dict()
    save_whole(
        path,
        {"config": asdict(tokenizer.config), "model": weights, "mean": mean, "std": std, "figures": dict(figures)},
    )
    return path
