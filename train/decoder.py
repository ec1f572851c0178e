"""Training of the decoder on the tokens of a small captioned set."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kinetok.errors import UserError
from kinetok.kernels.cross_entropy import linear_cross_entropy
from kinetok.model.bank import PromptBank
from kinetok.model.config import TokenizerConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.pretrained import BANK, save_pretrained
from kinetok.model.text_minilm import MiniLM
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion.features import FEATURES
from kinetok.motion.skeleton import CANONICAL_OFFSETS, FPS
from kinetok.runtime.bench.machine import commit
from kinetok.train.checkpoints import Damaged, load_best, load_whole
from kinetok.train.data.augment import heading, lengthen, liveliness, turn_caption
from kinetok.train.data.store import Clip, mirror_words, read_clips
from kinetok.train.loop import OneProcess, fit
from kinetok.train.packing import IGNORED
from kinetok.train.recipes import MINI_BANK, DecoderRecipe, decoder_recipe
from kinetok.train.samples import Samples
from kinetok.train.tokenizer import draw_weights

SUBJECTS = ("a person", "someone", "a man", "a woman", "the person", "somebody")
SUBJECT = re.compile(r"^(a|the) (person|man|woman|human|figure)\b|^(someone|somebody)\b", re.IGNORECASE)
POOLED_SCALE = 10.0
TEXT_ENCODER = {"type": "minilm", "name": MiniLM.name, "pooled_scale": POOLED_SCALE}
STANDING = "idle"  # labels of clips in which nothing is livelier than the rest


def other_subjects(caption: str) -> list[str]:
    """The caption with each way of naming its subject; just the caption when it names none."""
    if not SUBJECT.match(caption):
        return [caption]
    return [SUBJECT.sub(subject, caption, count=1) for subject in SUBJECTS]


def load_tokenizer(path: str | Path) -> tuple[MotionTokenizer, Tensor, Tensor]:
    """The result of ``kinetok train tokenizer``: the tokenizer, mean ``[272]`` and std ``[272]`` (fp64).

    ``UserError`` for any other file, a checkpoint of a training among them.
    """
    try:
        saved = load_whole(Path(path))
        tokenizer = MotionTokenizer(TokenizerConfig.from_dict(saved["config"])).eval()
        tokenizer.load_state_dict(saved["model"])
        mean, std = saved["mean"].double(), saved["std"].double()
        if not mean.shape == std.shape == (FEATURES,):
            raise ValueError(f"its statistics have the shapes {list(mean.shape)} and {list(std.shape)}")
    except (Damaged, UserError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{error} is not in it" if isinstance(error, KeyError) else " ".join(str(error).split())[:120]
        raise UserError(
            f"{path}: expected a trained tokenizer, but {problem}; run kinetok train tokenizer first"
        ) from error
    return tokenizer, mean, std


def initialise(decoder: MotionDecoder) -> None:
    """Matrices and embeddings N(0, 0.02): the framework's embeddings, N(0, 1), drown a small model's text."""
    for parameter in decoder.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.02)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Side:
    """A tokenised clip: ``tokens`` int64 [n]; heading and running sum of liveliness at the first frame of each."""

    tokens: Tensor
    heading: np.ndarray
    effort: np.ndarray


def next_token_loss(decoder: MotionDecoder, states: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the head on ``states [B, T, d]``; targets ``[B, T]``, ``IGNORED`` where none counts."""
    return linear_cross_entropy(states, decoder.head.weight, targets, IGNORED)


class DecoderTask:
    """Crops of tokenised clips with their captions in, next-token cross-entropy out (section 3, training sequence)."""

    def __init__(
        self, recipe: DecoderRecipe, clips: Sequence[Clip], tokenizer: MotionTokenizer, mean: Tensor, std: Tensor
    ) -> None:
        self.recipe = recipe
        self.rate = tokenizer.config.tokens_per_second
        clips = [clip for clip in clips if not clip.heading_flips]
        self.train = [clip for clip in clips if clip.split == "train"]
        self.held_out = [clip for clip in clips if clip.split == "val"]
        if not self.train or not self.held_out:
            raise UserError(
                f"expected clips in the splits train and val, got {len(self.train)} and {len(self.held_out)}"
            )
        self.sides = {
            (clip.id, mirror): [self._side(tokenizer, clip.side(mirror), mean, std)]
            for clip in clips
            for mirror in (False, True)
        }
        for clip in self.train:
            for mirror in (False, True):
                longer = lengthen(clip.side(mirror), round(recipe.lengthened * FPS))
                if longer is not None:
                    self.sides[clip.id, mirror].append(self._side(tokenizer, longer, mean, std))
        self.encoder = MiniLM(pooled_scale=POOLED_SCALE)
        self.text: dict[str, Tensor] = {}
        self.weights = draw_weights(self.train, recipe.balance)
        torch.manual_seed(recipe.loop.seed)
        self.module = MotionDecoder(recipe.model)
        initialise(self.module)

    @staticmethod
    @torch.no_grad()
    def _side(tokenizer: MotionTokenizer, features: np.ndarray, mean: Tensor, std: Tensor) -> _Side:
        normal = (torch.from_numpy(features).double() - mean) / std
        tokens = tokenizer.encode(normal.float()[None])[0].long()
        at = np.arange(len(tokens)) * tokenizer.config.frames_per_token
        return _Side(tokens=tokens, heading=heading(features)[at], effort=np.cumsum(liveliness(features))[at])

    def _batch(self, items: Sequence[tuple[Tensor, Tensor, bool]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(features [L, D], tokens [m], ended) items to tokens, features, mask and targets of the training layout."""
        config = self.recipe.model
        rows, targets = [], []
        for features, motion, ended in items:
            tail = motion.new_tensor([config.end_id] if ended else [])
            row = torch.cat((motion.new_full((len(features),), config.pad_id), motion, tail))
            target = torch.full_like(row, IGNORED)
            target[len(features) - 1 : len(row) - 1] = row[len(features) :]
            rows.append(row)
            targets.append(target)
        pad = nn.utils.rnn.pad_sequence
        features = pad([item[0] for item in items], batch_first=True)
        mask = pad([torch.ones(len(item[0])) for item in items], batch_first=True)
        tokens = pad(rows, batch_first=True, padding_value=config.pad_id)
        return tokens, features, mask, pad(targets, batch_first=True, padding_value=IGNORED)

    def _draw(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, bool]:
        recipe = self.recipe
        clip = self.train[rng.choice(len(self.train), p=self.weights)]
        mirror = bool(rng.integers(2))
        sides = self.sides[clip.id, mirror]
        side = sides[rng.integers(len(sides))]
        total = len(side.tokens)
        count = int(
            rng.integers(min(total, self._count(recipe.min_seconds)), min(total, self._count(recipe.max_seconds)) + 1)
        )
        starts = rng.integers(total - count + 1, size=1 if clip.label.startswith(STANDING) else recipe.crops)
        start = int(max(starts, key=lambda at: side.effort[at + count - 1] - side.effort[at]))
        end = start + count
        caption = clip.captions[rng.integers(len(clip.captions))]
        caption = mirror_words(caption) if mirror else caption
        if rng.random() < recipe.turn_words:
            caption = turn_caption(caption, side.heading[end - 1] - side.heading[start], rng) or caption
        variants = other_subjects(caption)
        text = "" if rng.random() < recipe.empty else variants[rng.integers(len(variants))]
        features = self._text(text)
        features = features + recipe.text_noise * torch.randn_like(features)
        return features, side.tokens[start:end], end == total

    def _count(self, seconds: float) -> int:
        return round(seconds * self.rate)

    def _text(self, text: str) -> Tensor:
        if text not in self.text:
            self.text[text] = self.encoder.encode([text])[0]
        return self.text[text]

    def samples(self, tokenizer: MotionTokenizer, mean: Tensor, std: Tensor, run: Path) -> Samples:
        """What draws three of the held-out captions."""
        captions = list(dict.fromkeys(clip.captions[0] for clip in self.held_out))[:3]
        texts = {caption: self._text(caption) for caption in captions}
        return Samples(OneProcess(), tokenizer, mean, std, texts, run / "samples")

    def loss(self, step: int, rng: np.random.Generator) -> Mapping[str, Tensor]:
        recipe = self.recipe
        tokens, features, mask, targets = self._batch([self._draw(rng) for _ in range(recipe.batch)])
        wrong = torch.rand(tokens.shape) < recipe.corrupt
        wrong &= tokens < recipe.model.codebook
        tokens = torch.where(wrong, torch.randint(recipe.model.codebook, tokens.shape), tokens)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=recipe.bf16):
            states = self.module.states(tokens, features, mask, dropout=recipe.dropout)
            return {"loss": next_token_loss(self.module, states, targets)}

    @torch.no_grad()
    def validate(self, module: nn.Module) -> Mapping[str, float]:
        """The loss averaged over labels, since the held-out clips are mostly standing ones."""
        labels = Counter(clip.label for clip in self.held_out)
        most = self._count(self.recipe.max_seconds)
        total = 0.0
        for clip in self.held_out:
            item = self._text(clip.captions[0]), self.sides[clip.id, False][0].tokens[:most], False
            tokens, features, mask, targets = self._batch([item])
            assert isinstance(module, MotionDecoder)
            value = next_token_loss(module, module.states(tokens, features, mask), targets)
            total += float(value) / labels[clip.label]
        return {"loss": total / len(labels)}


def train(
    *,
    recipe: str = "mini",
    data: str | Path = "data/cmu",
    tokenizer: str | Path = "runs/tokenizer/tokenizer.pt",
    out: str | Path = "runs/decoder",
    resume: bool = False,
    seed: int | None = None,
    sample_every: int = 0,
) -> Path:
    """Train a decoder on a trained tokenizer's tokens; returns ``out/model``, a directory for ``kinetok.load``.

    ``seed`` replaces the recipe's own. Every ``sample_every`` steps three held-out captions become pictures in
    ``out/samples``.
    """
    chosen = decoder_recipe(recipe)
    if seed is not None:
        chosen = replace(chosen, loop=replace(chosen.loop, seed=seed))
    motion, mean, std = load_tokenizer(tokenizer)
    if motion.config.codebook != chosen.model.codebook:
        raise UserError(
            f"the recipe {recipe} is for {chosen.model.codebook} codes, but {tokenizer} has {motion.config.codebook}"
        )
    task = DecoderTask(chosen, read_clips(data), motion, mean, std)
    weight = float(motion.decoder.last.weight.detach().double().sum())
    best = fit(
        task,
        chosen.loop,
        out,
        resume=resume,
        identity={**asdict(chosen), "tokenizer": weight},
        sample=task.samples(motion, mean, std, Path(out)) if sample_every else None,
        sample_every=sample_every,
    )
    state = load_best(best)
    task.module.load_state_dict(state["model"])
    bank = Path(out) / BANK
    PromptBank.build(MINI_BANK, MiniLM(pooled_scale=POOLED_SCALE)).save(bank)
    return save_pretrained(
        Path(out) / "model",
        # Half precision on disk only: a CPU runs both in fp32 again, and the tokenizer always does.
        tokenizer=motion.half(),
        decoder=task.module.eval().half(),
        mean=mean.numpy(),
        std=std.numpy(),
        skeleton_offsets=CANONICAL_OFFSETS,
        text_encoder=TEXT_ENCODER,
        sampling={"temperature": 1.0, "top_p": 0.95, "guidance": 1.5, "min_seconds": 2.0},
        provenance={
            "recipe": recipe,
            "seed": chosen.loop.seed,
            "commit": commit(),
            "step": state["step"],
            "validation_loss": state["figures"]["loss"],
            "data": "the motion-capture set in data/cmu; parts of it were obtained from the CMU Graphics Lab Motion "
            "Capture Database, created with funding from NSF EIA-0196217",
        },
        licence="Apache-2.0",
        bank=bank,
    )
