"""The evaluator for the small set: the released architecture on MiniLM states, trained by contrast."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from kinetok.errors import UserError
from kinetok.files import whole_file
from kinetok.model.evaluator import Evaluator, EvaluatorConfig
from kinetok.model.pretrained import read_stats
from kinetok.model.released import check_keys
from kinetok.model.tensor_files import Pieces, parse_json, read_safetensors, write_safetensors
from kinetok.model.text_minilm import MiniLM
from kinetok.motion.features import FEATURES
from kinetok.runtime.bench.machine import commit
from kinetok.train.checkpoints import load_best
from kinetok.train.data.stats import mean_std
from kinetok.train.data.store import Clip, mirror_words, read_clips
from kinetok.train.decoder import other_subjects
from kinetok.train.loop import fit
from kinetok.train.recipes import EvaluatorRecipe, evaluator_recipe
from kinetok.train.tokenizer import draw_weights

DEFAULT_EVALUATOR = Path(__file__).parent / "default"
WEIGHTS, METADATA = "evaluator.safetensors", "evaluator.json"
FORMAT = "kinetok-evaluator-1"
POOLED_SCALE = 10.0


def contrast(motions: Tensor, texts: Tensor, same: Tensor, temperature: float) -> Tensor:
    """Symmetrical InfoNCE of each pair ``[B]`` from embeddings ``[B, d]`` (Petrovich et al., TMR, ICCV 2023).

    same ``[B, B]`` marks pairs that say the same: apart from the diagonal they are no negatives.
    """
    scores = F.normalize(motions, dim=-1) @ F.normalize(texts, dim=-1).T / temperature
    scores = scores.masked_fill(same & ~torch.eye(len(same), dtype=torch.bool, device=same.device), -torch.inf)
    truth = torch.arange(len(scores), device=scores.device)
    ways = [F.cross_entropy(way, truth, reduction="none") for way in (scores, scores.T)]
    return (ways[0] + ways[1]) / 2


def _recording(clip: Clip) -> str:
    """The recording that a clip is a window of."""
    return clip.id.split("_w")[0]


def _shared(captions: Sequence[frozenset[str]]) -> Tensor:
    return torch.tensor([[bool(a & b) for b in captions] for a in captions])


class EvaluatorTask:
    """Crops of clips with their captions in, the contrast of the two embeddings out.

    The split val is nearly all standing and walking, so every ``1 / held_out``-th training recording judges too.
    """

    def __init__(self, recipe: EvaluatorRecipe, clips: Sequence[Clip], text: MiniLM) -> None:
        self.recipe = recipe
        train = [clip for clip in clips if clip.split == "train"]
        every = round(1 / recipe.held_out)
        aside = set(sorted({_recording(clip) for clip in train})[every // 2 :: every])
        self.train = [clip for clip in train if _recording(clip) not in aside]
        self.held_out = [clip for clip in clips if clip.split == "val" or _recording(clip) in aside]
        if not self.train or not self.held_out:
            raise UserError(
                f"expected clips in the splits train and val, got {len(self.train)} and {len(self.held_out)}"
            )
        self.mean, self.std = mean_std(self.train)
        captions = {caption for clip in (*self.train, *self.held_out) for caption in clip.captions}
        captions |= {mirror_words(caption) for caption in captions}
        wanted = sorted(captions | {variant for caption in captions for variant in other_subjects(caption)})
        self.text = dict(zip(wanted, text.encode(wanted), strict=True))
        self.weights = draw_weights(self.train, recipe.balance)
        torch.manual_seed(recipe.loop.seed)
        self.module = Evaluator(recipe.model)

    def _frames(self, features: NDArray) -> Tensor:
        return torch.from_numpy(((features - self.mean) / self.std).astype(np.float32))

    def _draw(self, rng: np.random.Generator, frames: int) -> tuple[Tensor, Tensor, frozenset[str]]:
        clip = self.train[rng.choice(len(self.train), p=self.weights)]
        mirror = bool(rng.integers(2))
        captions = tuple(map(mirror_words, clip.captions)) if mirror else clip.captions
        variants = other_subjects(captions[rng.integers(len(captions))])
        states = self.text[variants[rng.integers(len(variants))]]
        motion = clip.side(mirror)
        start = int(rng.integers(max(0, len(motion) - frames) + 1))
        noise = self.recipe.text_noise * torch.randn_like(states)
        return self._frames(motion[start : start + frames]), states + noise, frozenset(captions)

    def loss(self, step: int, rng: np.random.Generator) -> Mapping[str, Tensor]:
        """One crop length a batch, so that a motion's length tells nothing about its caption."""
        recipe = self.recipe
        frames = int(rng.integers(recipe.min_frames, recipe.max_frames + 1))
        motions, texts, captions = zip(*(self._draw(rng, frames) for _ in range(recipe.batch)), strict=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            embedded = self.module.embed_motion(motions), self.module.embed_text(texts)
        same = _shared(captions)
        return {"loss": contrast(embedded[0].float(), embedded[1].float(), same, recipe.temperature).mean()}

    @torch.no_grad()
    def validate(self, module: nn.Module) -> Mapping[str, float]:
        """Contrast averaged over labels, and how often the nearest (or one of three) held-out motions fits a caption."""
        assert isinstance(module, Evaluator)
        clips, labels = self.held_out, Counter(clip.label for clip in self.held_out)
        motions = torch.cat([module.embed_motion([self._frames(clip.features)]) for clip in clips])
        texts = module.embed_text([self.text[clip.captions[0]] for clip in clips])
        same = _shared([frozenset(clip.captions) for clip in clips])
        weights = torch.tensor([1 / labels[clip.label] / len(labels) for clip in clips])
        nearest = (F.normalize(texts, dim=-1) @ F.normalize(motions, dim=-1).T).topk(3, dim=-1).indices
        fits = same.gather(1, nearest)
        return {
            "loss": float(weights @ contrast(motions, texts, same, self.recipe.temperature)),
            "top1": float(weights @ fits[:, 0].float()),
            "top3": float(weights @ fits.any(-1).float()),
        }


def train(
    *, recipe: str = "mini", data: str | Path = "data/cmu", out: str | Path = "runs/evaluator", resume: bool = False
) -> Path:
    """Train an evaluator; returns ``out``, which then holds ``evaluator.safetensors`` and ``evaluator.json``.

    About 11 minutes for the mini recipe on one free thread.
    """
    chosen = evaluator_recipe(recipe)
    task = EvaluatorTask(chosen, read_clips(data), MiniLM(pooled_scale=POOLED_SCALE))
    best = load_best(fit(task, chosen.loop, out, resume=resume, identity=asdict(chosen)))
    task.module.load_state_dict(best["model"])
    provenance = {
        "recipe": recipe,
        "settings": asdict(chosen),
        "seed": chosen.loop.seed,
        "step": best["step"],
        "held_out": best["figures"],
        "commit": commit(),
        "data": "the motion-capture set in data/cmu; parts of it were obtained from the CMU Graphics Lab Motion "
        "Capture Database, created with funding from NSF EIA-0196217",
        "licence": "Apache-2.0",
    }
    save_evaluator(out, task.module, task.mean, task.std, provenance)
    return Path(out)


def save_evaluator(
    folder: str | Path, module: Evaluator, mean: ArrayLike, std: ArrayLike, provenance: Mapping[str, Any]
) -> None:
    """Write ``evaluator.safetensors`` (fp16 weights, fp64 mean and std) and ``evaluator.json`` into a folder."""
    stats = [Pieces(name, (torch.as_tensor(read_stats(v, name)),)) for name, v in (("mean", mean), ("std", std))]
    weights = [Pieces(name, (value.half(),)) for name, value in module.state_dict().items()]
    write_safetensors(Path(folder) / WEIGHTS, [*stats, *weights])
    text = {"name": MiniLM.name, "pooled_scale": POOLED_SCALE}
    content = {"format": FORMAT, "model": asdict(module.config), "text_encoder": text, "provenance": dict(provenance)}
    with whole_file(Path(folder) / METADATA) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class SmallEvaluator:
    """A trained evaluator: features and sentences to points on the unit sphere, fp32 arrays ``[N, d]``."""

    def __init__(self, module: Evaluator, mean: NDArray, std: NDArray, metadata: Mapping[str, Any]) -> None:
        self.module, self.mean, self.std, self.metadata = module.eval(), mean, std, dict(metadata)
        self._text: MiniLM | None = None

    @torch.inference_mode()
    def embed_motion(self, features: ArrayLike) -> NDArray[np.float32]:
        """The embedding ``[d]`` of features ``[T, 272]`` (not normalised), of which the first 300 frames are read."""
        x = np.asarray(features, dtype=np.float64)
        if x.ndim != 2 or x.shape[1:] != (FEATURES,) or not len(x):
            raise UserError(f"motion: expected features of the shape [T, {FEATURES}], got {list(x.shape)}")
        if not np.isfinite(x).all():
            raise UserError("motion: expected finite features, got NaN or infinity")
        frames = torch.from_numpy((x - self.mean) / self.std).float()
        return F.normalize(self.module.embed_motion([frames]), dim=-1)[0].numpy()

    @torch.inference_mode()
    def embed_text(self, text: str) -> NDArray[np.float32]:
        """The embedding ``[d]`` of a sentence."""
        if self._text is None:
            self._text = MiniLM(pooled_scale=float(self.metadata["text_encoder"]["pooled_scale"]))
        return F.normalize(self.module.embed_text(self._text.encode([text])), dim=-1)[0].numpy()


def load_evaluator(folder: str | Path | None = None) -> SmallEvaluator:
    """Read an evaluator's folder; None is the one in the package. ``UserError`` for anything that is not intact."""
    folder = DEFAULT_EVALUATOR if folder is None else Path(folder)
    try:
        metadata = parse_json((folder / METADATA).read_bytes(), folder / METADATA)
    except OSError as error:
        raise UserError(f"{folder}: expected an evaluator, cannot read {METADATA} ({error.strerror})") from error
    sizes, text = metadata.get("model"), metadata.get("text_encoder")
    if metadata.get("format") != FORMAT or not isinstance(sizes, dict) or not isinstance(text, dict):
        raise UserError(f"{folder / METADATA}: expected {FORMAT}, got {str(metadata.get('format'))[:40]!r}")
    if text.get("name") != MiniLM.name or not isinstance(text.get("pooled_scale"), int | float):
        raise UserError(f"{folder / METADATA}: expected text states of {MiniLM.name}, got {str(text)[:80]}")
    if not isinstance(metadata.get("provenance"), dict):
        raise UserError(f"{folder / METADATA}: expected the provenance of the evaluator, which results name, got none")
    tensors = read_safetensors(folder / WEIGHTS)
    config = EvaluatorConfig.from_dict(sizes)
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in Evaluator(config).state_dict().items()}
    check_keys(tensors, {**wanted, "mean": (FEATURES,), "std": (FEATURES,)}, frozenset(), str(folder / WEIGHTS))
    module = Evaluator(config)
    module.load_state_dict({name: tensors[name] for name in wanted})
    mean, std = (read_stats(tensors[name].double().numpy(), name).copy() for name in ("mean", "std"))
    return SmallEvaluator(module.requires_grad_(False), mean, std, metadata)
