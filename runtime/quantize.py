"""What quantising a model costs, measured against the model itself, and the bounds within which that is accepted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.model.bank import BankedEncoder, PromptBank
from kinetok.model.decoder import MotionDecoder
from kinetok.model.packed import Quantisation, quantise, unpacked
from kinetok.model.pretrained import ModelBundle
from kinetok.motion import Motion
from kinetok.motion.quality import jerk, mpjpe
from kinetok.runtime.backends import Backend
from kinetok.runtime.backends.torch import TorchBackend

NEAR_TIE = 1e-3
TOKENS = 60
PROMPTS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What a quantised model must keep.

    agreement: share of positions whose greedy token is the same, near ties apart. logit_error: of the logits' distance
    from their mean, relative, over all positions. mpjpe_mm: between the clips of the two's greedy tokens behind the same
    past, millimetres. jerk: of clips that each model writes by itself, how far their ratio may be from 1.
    """

    agreement: float = 0.95
    logit_error: float = 0.10
    mpjpe_mm: float = 20.0
    jerk: float = 0.25


BOUNDS = Bounds()


def trial(model: ModelBundle, prompts: int | None = None, tokens: int | None = None) -> tuple[list[Tensor], int]:
    """Text features of up to ``prompts`` banked prompts (random ones where the model has no bank), and how many tokens
    behind them are compared. ``UserError`` where there is no room for two."""
    config, prompts = model.decoder.config, prompts or PROMPTS
    if model.bank is None:
        generator = torch.Generator().manual_seed(0)
        texts = [torch.randn(4 + at, config.text_dim, generator=generator) for at in range(prompts)]
    else:
        bank = PromptBank.load(model.bank)
        encoder = BankedEncoder(bank, model.text_encoder, config.text_dim)
        texts = encoder.encode([text for text in bank.prompts if text][:prompts])
    count = min(tokens or TOKENS, config.block_size - max(map(len, texts)))
    if count < 2:
        raise UserError("the model has no room for two tokens behind its longest prompt")
    return texts, count


@torch.inference_mode()
def _write(backend: Backend, codebook: int, text: Tensor, count: int, seed: int | None) -> list[int]:
    """``count`` tokens behind a text, the end banned: greedy, or sampled plainly with a seed."""
    generator = torch.Generator().manual_seed(seed or 0)
    logits, tokens = backend.prefill(0, text), []
    while True:
        scores = logits[:codebook].cpu()
        if seed is not None:
            scores = scores - torch.empty(codebook).exponential_(generator=generator).log()
        tokens.append(int(scores.argmax()))
        if len(tokens) == count:
            return tokens
        logits = backend.decode([0], torch.tensor(tokens[-1:], device=backend.device))[0]


@torch.inference_mode()
def _logits(backend: Backend, codebook: int, text: Tensor, tokens: Sequence[int]) -> Tensor:
    """fp32 ``[len(tokens), codebook]``: what a model thinks of each position behind the given past."""
    device = backend.device
    rows = [backend.prefill(0, text)]
    rows += [backend.decode([0], torch.tensor([token], device=device))[0] for token in tokens[:-1]]
    return torch.stack(rows)[:, :codebook].cpu()


@torch.inference_mode()
def _motion(model: ModelBundle, tokens: Sequence[int]) -> Motion:
    device = model.tokenizer.decoder.last.weight.device
    frames = model.tokenizer.decode(torch.tensor([list(tokens)], device=device))[0].double().cpu().numpy()
    return Motion.from_features(frames * model.std + model.mean, offsets=model.offsets)


def measure(model: ModelBundle, decoder: MotionDecoder, tokens: int | None = None) -> dict[str, Any]:
    """``compare`` of the model with a packed ``decoder``, on its banked prompts."""
    texts, count = trial(model, tokens=tokens)
    capacity = max(map(len, texts)) + count
    # A CPU would unpack the words at every step; their values are the same, unpacked once.
    judged = unpacked(decoder) if decoder.embed.weight.device.type == "cpu" else decoder
    return compare(model, texts, count, *(TorchBackend(each, 1, capacity) for each in (model.decoder, judged)))


def compare(model: ModelBundle, texts: Sequence[Tensor], count: int, exact: Backend, packed: Backend) -> dict[str, Any]:
    """The figures of ``Bounds`` and their sources: ``packed`` against ``exact``, which is the model, ``count`` tokens a text.

    Both see the same past, the model's own sampled clips (seed 0, 1, ...); so one different choice does not count again
    at every later position. Only the jerk is of clips that each writes by itself.
    """
    codebook = model.decoder.config.codebook
    same = ties = positions = 0
    error, norm = 0.0, 0.0
    distances: list[float] = []
    jerks: dict[str, list[float]] = {"exact": [], "packed": []}
    for seed, text in enumerate(texts):
        past = _write(exact, codebook, text, count, seed)
        a, b = _logits(exact, codebook, text, past), _logits(packed, codebook, text, past)
        top = a.topk(2, dim=1).values
        near = top[:, 0] - top[:, 1] < NEAR_TIE
        chosen, other = a.argmax(1), b.argmax(1)
        same += int(((chosen == other) & ~near).sum())
        ties += int(near.sum())
        positions += count
        a, b = (x - x.mean(1, keepdim=True) for x in (a, b))  # what is added to all logits changes no choice
        error += float((a - b).double().square().sum())
        norm += float(a.double().square().sum())
        distances.append(1e3 * mpjpe(*(_motion(model, ids.tolist()).joints for ids in (chosen, other))))
        for name, tokens_of in (("exact", past), ("packed", _write(packed, codebook, text, count, seed))):
            own = _motion(model, tokens_of)
            jerks[name].append(jerk(own.joints, own.fps))
    mean_jerk = {name: sum(values) / len(values) for name, values in jerks.items()}
    return {
        "prompts": len(texts),
        "positions": positions,
        "near_ties": ties,
        "agreement": same / max(1, positions - ties),
        "logit_error": (error / norm) ** 0.5,
        "mpjpe_mm": sum(distances) / len(distances),
        "jerk": mean_jerk,
        "jerk_ratio": mean_jerk["packed"] / mean_jerk["exact"],
    }


def failures(found: Mapping[str, Any], bounds: Bounds | None = None) -> list[str]:
    """What of a report lies outside its bounds, each as a sentence's part; NaN never lies within."""
    bounds = bounds or BOUNDS
    checks = (
        (found["agreement"] >= bounds.agreement, f"agreement {found['agreement']:.4f}, at least {bounds.agreement}"),
        (
            found["logit_error"] <= bounds.logit_error,
            f"logit error {found['logit_error']:.4f}, at most {bounds.logit_error}",
        ),
        (found["mpjpe_mm"] <= bounds.mpjpe_mm, f"MPJPE {found['mpjpe_mm']:.1f} mm, at most {bounds.mpjpe_mm:g}"),
        (
            abs(found["jerk_ratio"] - 1) <= bounds.jerk,
            f"jerk {found['jerk_ratio']:.2f} times the model's, within {bounds.jerk:g} of 1",
        ),
    )
    return [text for fine, text in checks if not fine]


def quantize(model: ModelBundle, quantisation: Quantisation) -> tuple[ModelBundle, dict[str, Any]]:
    """The model with packed products, and the report on it. ``UserError`` for a model that is quantised already."""
    if model.quantisation is not None:
        raise UserError(f"{model.directory} is quantised already ({model.quantisation.kind}): start from the original")
    decoder = quantise(model.decoder, quantisation)
    return replace(model, decoder=decoder, quantisation=quantisation), measure(model, decoder)
