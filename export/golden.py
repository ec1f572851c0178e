"""Golden fixtures of a bundle: what PyTorch computes from the very weights that the bundle stores."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinetok.kernels.sampling import draw, guide, gumbel
from kinetok.model.bank import PromptBank
from kinetok.model.config import DecoderConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.graphs.precision import Precision, dequantize, quantize
from kinetok.model.pretrained import ModelBundle
from kinetok.model.text import TextEncoder
from kinetok.runtime.generate import ENDED_AT_ONCE, generate_tokens
from kinetok.runtime.sampling import SamplingParams

CASES, MOST, LEAST, SEED = 3, 40, 8, 7
SENTENCES = ("a person walks forward", "a man jumps twice, then sits down", "someone dances")  # CASES of them
FLOOR = {"logits": 1e-4, "weights": 1e-4, "frames": 1e-3, "features": 1e-3}
ROUNDED = {"logits": 2e-3, "weights": 1e-4, "frames": 1e-3, "features": 1e-3}
LIMIT = {"logits": 5e-2, "weights": 2e-3, "frames": 1e-3, "features": 3e-1}
MARGIN = 3.0
"""Errors as parts of the largest expected value, at least 1. fp32 with an fp32 cache is held to ``FLOOR`` (banked features
are fp16). How far another precision may be off is measured where the bundle is made: ``MARGIN`` times that is allowed
elsewhere, at least ``ROUNDED`` (four roundings to fp16); where the maker itself is off by more than ``LIMIT``, the graphs are
wrong. "weights": logits of integer weights with activations that are not rounded, which an edited weight cannot hide in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """How ``sampled`` was drawn; guidance is 1 where the model has no features for the empty text."""

    seed: int
    request: int
    guidance: float
    temperature: float
    top_k: int
    top_p: float
    least: int
    most: int


def stored_decoder(decoder: MotionDecoder, precision: Precision) -> MotionDecoder:
    """The decoder in fp32 with its weights as a bundle of this precision stores them."""
    if precision.name == "fp32":
        return decoder.float()  # in place: one that is loaded for exporting is nobody else's
    result = copy.deepcopy(decoder).float()

    def rounded(weight: Tensor, bits: int) -> Tensor:
        return dequantize(*quantize(weight.detach(), bits, precision.block(bits)), weight.shape[1])

    with torch.no_grad():
        if not precision.bits:
            for value in result.parameters():
                value.copy_(value.half().float())
            return result
        # A tied head is quantised apart from the embedding.
        result.head.weight = torch.nn.Parameter(rounded(result.head.weight, 8))
        result.embed.weight = torch.nn.Parameter(result.embed.weight.half().float())
        for block in result.blocks:
            for module in (block.qkv, block.attn_out, block.gate_up, block.down):
                module.weight.copy_(rounded(module.weight, precision.bits))
    return result


def tolerance(exact: bool, found: Mapping[str, float]) -> dict[str, float]:
    """A manifest's ``golden_tolerance``. exact: weights and cache are fp32; found: errors of the machine that made it."""
    if exact:
        return dict(FLOOR)
    return {kind: max(least, min(MARGIN * found.get(kind, 0.0), LIMIT[kind])) for kind, least in ROUNDED.items()}


def banned_ids(config: DecoderConfig) -> list[int]:
    """Rows of the head that are never drawn: the pad row of a tied one."""
    return [config.pad_id] if config.tie_weights else []


def golden_cases(
    model: ModelBundle, precision: Precision, bank: PromptBank | None, encoder: TextEncoder | None
) -> list[dict[str, Any]]:
    """The fixtures, arrays in place of tensor references. A model without bank and encoder gets made-up features."""
    decoder, config = stored_decoder(model.decoder, precision), model.decoder.config
    if encoder is not None and (bank is None or not bank.prompts):
        bank = PromptBank.build(SENTENCES, encoder)
    if bank is not None and bank.prompts:
        texts = bank.prompts[:CASES]
        rows, empty = bank.encode(texts), bank.features[""]
    else:
        draw = torch.Generator().manual_seed(0)
        texts = [""] * CASES
        rows = [torch.randn(5 + 3 * i, config.text_dim, generator=draw) for i in range(CASES)]
        empty = None
    defaults = SamplingParams().resolve(model.sampling)
    cases = []
    for number, (text, features) in enumerate(zip(texts, rows, strict=True)):
        most = min(MOST, config.block_size - max(len(features), len(empty) if empty is not None else 0))
        draw_as = Draw(
            seed=SEED,
            request=number,
            guidance=float(defaults.guidance or 1.0) if empty is not None else 1.0,
            temperature=1.0,
            top_k=number * 50,
            top_p=0.9,
            least=min(LEAST, most),
            most=most,
        )
        cases.append(_case(model, decoder, text, features, empty, draw_as))
    return cases


def scores_of(logits: Tensor, banned: Sequence[int]) -> Tensor:
    """Logits ``[n, V]`` in fp32 on the CPU with the banned ids at -inf."""
    scores = logits.float().cpu().clone()
    scores[:, list(banned)] = -torch.inf
    return scores


def draw_token(
    logits: Tensor, at: int, about: Mapping[str, Any], end_id: int, banned: Sequence[int]
) -> tuple[int, Tensor, Tensor]:
    """The token at position ``at`` (docs/numerics.md), and the scores ``[V]`` and the noise ``[V]`` whose sum it leads.

    logits ``[1 or 2, V]``: the second row, of the empty text, is for guidance. about: a ``Draw`` as a mapping.
    """
    guidance, temperature = float(about["guidance"]), float(about["temperature"])
    mixed = guide(logits[:1], logits[1:], guidance) if guidance != 1.0 else logits[:1]
    scores = scores_of(mixed, [*banned, *([end_id] if at < int(about["least"]) else [])])
    seed, position, request = (torch.tensor([int(value)]) for value in (about["seed"], at, about["request"]))
    noise = gumbel(scores.shape[1], seed, position, request)
    token = draw(scores, noise, temperature=temperature, top_k=int(about["top_k"]), top_p=float(about["top_p"]))
    return int(token), scores[0] / temperature, noise[0]


@torch.inference_mode()
def _sampled(decoder: MotionDecoder, rows: list[Tensor], about: Mapping[str, Any]) -> list[int]:
    config = decoder.config
    cache = decoder.new_cache(len(rows), max(map(len, rows)) + int(about["most"]))
    logits = decoder.prefill(rows, cache)
    tokens: list[int] = []
    while len(tokens) < int(about["most"]):
        token, _, _ = draw_token(logits, len(tokens), about, config.end_id, banned_ids(config))
        if token == config.end_id:
            break
        tokens.append(token)
        if len(tokens) < int(about["most"]):
            logits = decoder.decode_step(torch.full((len(rows),), token), cache)
    return tokens or [ENDED_AT_ONCE]


def _case(
    model: ModelBundle, decoder: MotionDecoder, text: str, features: Tensor, empty: Tensor | None, about: Draw
) -> dict[str, Any]:
    greedy = generate_tokens(decoder, features, about.most)
    guided = empty is not None and about.guidance != 1.0
    rows = [features, empty] if guided and empty is not None else [features]
    with torch.inference_mode():
        cache = decoder.new_cache(1, len(features) + len(greedy))
        first = last = decoder.prefill([features], cache)
        for token in greedy:
            last = decoder.decode_step(torch.tensor([token]), cache)
        frames = model.tokenizer.decode(torch.tensor([greedy]))[0].double().numpy() * model.std + model.mean
    return {
        "text": text,
        "features": features.float().numpy(),
        "first_logits": first[0].float().numpy(),
        "last_logits": last[0].float().numpy(),
        "greedy": np.asarray(greedy, np.int32),
        "most": about.most,
        "sampled": {**asdict(about), "tokens": np.asarray(_sampled(decoder, rows, asdict(about)), np.int32)},
        "empty": rows[1].float().numpy() if guided else None,
        "frames": frames.astype(np.float32),
    }
