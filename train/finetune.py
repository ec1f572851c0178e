"""Fine-tuning: a model directory goes on learning from somebody's own clips."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kinetok.errors import UserError
from kinetok.model.bank import PromptBank
from kinetok.model.config import DecoderConfig
from kinetok.model.pretrained import BANK, ModelBundle, load_pretrained, read_text_encoder, save_pretrained
from kinetok.model.text_minilm import MAX_FEATURES
from kinetok.motion.features import POSITIONS
from kinetok.motion.quality import mpjpe
from kinetok.motion.skeleton import CANONICAL_OFFSETS, JOINTS
from kinetok.runtime.bench.machine import commit
from kinetok.train.checkpoints import load_best
from kinetok.train.data.store import Clip, read_clips
from kinetok.train.decoder import TEXT_ENCODER, DecoderTask
from kinetok.train.loop import fit
from kinetok.train.optim import LoopConfig
from kinetok.train.recipes import DecoderRecipe

DEFAULT = "default"
VALIDATION = 0.1
TELLING = 10  # held-out clips from which on their loss chooses between checkpoints
BANKED = 200  # captions that go into the prompt bank, about 8 kB each


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTuned:
    """The model directory, and the validation loss of the first model and of the one that was kept, made at ``step``.

    ``mpjpe_mm`` is how far the tokenizer, which stays as it is, puts joints from where the clips have them.
    """

    model: Path
    before: float
    after: float
    step: int
    mpjpe_mm: float


def finetuning_recipe(model: DecoderConfig, tokens_per_second: float, held_out: int) -> DecoderRecipe:
    """A fifth of the learning rate that trains from scratch, a few hundred steps, and only the captions as they are.

    With few clips held out, their loss says too little to choose by, and the last weights are kept. fp32, since bf16 is
    slower on processors without instructions for it.
    """
    room = (model.block_size - MAX_FEATURES - 1) / tokens_per_second
    return DecoderRecipe(
        model=model,
        loop=LoopConfig(
            steps=300,
            lr=2e-4,
            betas=(0.9, 0.98),
            weight_decay=0.1,
            warmup=30,
            ema=0.97,
            validate_every=50,
            save_every=50,
            keep="best" if held_out >= TELLING else "last",
        ),
        batch=16,
        turn_words=0.0,
        max_seconds=min(10.0, room),
        bf16=False,
    )


def finetune(
    *,
    init: str | Path = DEFAULT,
    data: str | Path,
    out: str | Path = "runs/finetune",
    resume: bool = False,
    steps: int | None = None,
    seed: int | None = None,
    sample_every: int = 0,
) -> FineTuned:
    """Train the decoder of a model directory further on a motion set; writes ``out/model``, for ``kinetok.load``.

    The tokenizer, mean and std stay as they are. Of a set without validation clips the last tenth is held out. ``steps``
    and ``seed`` replace the recipe's; every ``sample_every`` steps three held-out captions become pictures in
    ``out/samples``. Raises ``UserError`` for models with another text encoder than the default model's, and for data that
    cannot be trained on.
    """
    path = None if str(init) == DEFAULT else init
    encoder = read_text_encoder(path)
    if any(encoder.get(name) != value for name, value in TEXT_ENCODER.items()):
        wanted, got = (str({name: spec.get(name) for name in TEXT_ENCODER}) for spec in (TEXT_ENCODER, encoder))
        raise UserError(f"{init}: fine-tuning takes models with the text encoder {wanted}, got {got[:200]}")
    clips = hold_out(read_clips(data))
    bundle = load_pretrained(path, "cpu", "float32")
    if abs(bundle.offsets - CANONICAL_OFFSETS).max() > 1e-3:
        raise UserError(
            f"{init}: fine-tuning takes models on the canonical skeleton, but this one has other proportions"
        )
    held_out = sum(clip.split == "val" for clip in clips)
    chosen = finetuning_recipe(bundle.decoder.config, bundle.tokenizer.config.tokens_per_second, held_out)
    loop = replace(chosen.loop, steps=chosen.loop.steps if steps is None else steps)
    chosen = replace(chosen, loop=loop if seed is None else replace(loop, seed=seed))
    mean, std = torch.from_numpy(bundle.mean), torch.from_numpy(bundle.std)
    task = DecoderTask(chosen, clips, bundle.tokenizer, mean, std)
    task.module.load_state_dict(bundle.decoder.state_dict())
    before = task.validate(task.module.eval())["loss"]
    identity = {**asdict(chosen), "init": _digest(bundle), "data": _captions_digest(clips)}
    sample = task.samples(bundle.tokenizer, mean, std, Path(out)) if sample_every else None
    best = fit(task, loop, out, resume=resume, identity=identity, sample=sample, sample_every=sample_every)
    state = load_best(best)
    task.module.load_state_dict(state["model"])
    result = FineTuned(
        model=Path(out) / "model",
        before=before,
        after=float(state["figures"]["loss"]),
        step=int(state["step"]),
        mpjpe_mm=_mpjpe_mm(task, clips, bundle),
    )
    _bank(task, clips, bundle).save(Path(out) / BANK)
    provenance: dict[str, Any] = {
        "fine-tuned from": bundle.provenance,
        "commit": commit(),
        "data": Path(data).resolve().name,
        "clips": len(clips),
        "seed": chosen.loop.seed,
        "step": result.step,
        "validation_loss_before": result.before,
        "validation_loss": result.after,
        "tokenizer_mpjpe_mm": result.mpjpe_mm,
    }
    save_pretrained(
        result.model,
        tokenizer=bundle.tokenizer,
        # Half precision on disk only: a CPU runs it in fp32 again.
        decoder=task.module.eval().half(),
        mean=bundle.mean,
        std=bundle.std,
        skeleton_offsets=bundle.offsets,
        text_encoder=bundle.text_encoder,
        sampling=bundle.sampling,
        provenance=provenance,
        licence=f"that of the data it was fine-tuned on; before: {bundle.licence}",
        bank=Path(out) / BANK,
    )
    return result


def hold_out(clips: Sequence[Clip]) -> list[Clip]:
    """The clips that can be trained on; where none is for validation, the last tenth of those for training is."""
    usable = [clip for clip in clips if not clip.heading_flips]
    if any(clip.split == "val" for clip in usable):
        return usable
    rows = [row for row, clip in enumerate(usable) if clip.split == "train"]
    if len(rows) < 2:
        left = len(clips) - len(usable)
        raise UserError(
            f"expected at least 2 clips to train on, of which one is held out, got {len(rows)} "
            f"({left} more turn upside down and are left out)"
        )
    for row in rows[-max(1, round(VALIDATION * len(rows))) :]:
        usable[row] = replace(usable[row], split="val")
    return usable


@torch.no_grad()
def _mpjpe_mm(task: DecoderTask, clips: Sequence[Clip], bundle: ModelBundle) -> float:
    errors = []
    for clip in clips:
        frames = bundle.tokenizer.decode(task.sides[clip.id, False][0].tokens[None])[0].double().numpy()
        decoded = (frames * bundle.std + bundle.mean)[: len(clip.features), POSITIONS]
        errors.append(mpjpe(*(x.reshape(-1, JOINTS, 3) for x in (decoded, clip.features[: len(decoded), POSITIONS]))))
    return 1e3 * float(np.mean(errors))


def _digest(bundle: ModelBundle) -> float:
    return sum(float(value.double().sum()) for value in bundle.decoder.state_dict().values())


def _captions_digest(clips: Sequence[Clip]) -> str:
    about = [(clip.id, clip.split, clip.captions, len(clip.features)) for clip in clips]
    return hashlib.sha256(repr(about).encode("utf-8", "backslashreplace")).hexdigest()


def _bank(task: DecoderTask, clips: Sequence[Clip], bundle: ModelBundle) -> PromptBank:
    """The first model's prompts and the captions of the clips."""
    captions = list(dict.fromkeys(caption for clip in clips for caption in clip.captions))[:BANKED]
    bank = PromptBank.build(captions, task.encoder)
    known = PromptBank.load(bundle.bank).features if bundle.bank is not None else {}
    return PromptBank({**known, **bank.features}, name=bank.name, dim=bank.dim)
