"""``Engine``: a loaded model that turns sentences into motion."""

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.model.bank import BankedEncoder, PromptBank
from kinetok.model.pretrained import ModelBundle, load_pretrained
from kinetok.model.text import check_prompt
from kinetok.motion import Motion
from kinetok.runtime.generate import sample_tokens
from kinetok.runtime.sampling import SamplingParams, token_budget


def load(path_or_id: str | Path | None = None, device: str = "auto", dtype: str = "auto") -> "Engine":
    """Load a model: a directory, a hub id ``owner/name``, or None for the default model in the package.

    device "auto" is CUDA where there is one; dtype "auto" is the stored one on CUDA and float32 on a CPU. Raises
    ``UserError`` for what is not an intact model.
    """
    return Engine(load_pretrained(path_or_id, device, dtype))


class Engine:
    """Sentences in, motion out.

    ``timings`` holds the seconds that each stage of the last ``generate`` took: text, decode, detokenize, motion.
    """

    def __init__(self, model: ModelBundle) -> None:
        self.model = model
        bank = PromptBank.load(model.bank) if model.bank is not None else None
        self.text = BankedEncoder(bank, model.text_encoder, model.decoder.config.text_dim)
        self.timings: dict[str, float] = {}

    @contextmanager
    def _timed(self, stage: str):  # type: ignore[no-untyped-def]
        began = time.perf_counter()
        yield
        self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - began

    def generate(
        self,
        prompts: str | Sequence[str],
        params: SamplingParams | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        **keywords: Any,
    ) -> list[Motion]:
        """One clip a prompt.

        keywords are ``SamplingParams`` fields and win over ``params``. Clip i of a list is request i, so the same prompt
        several times gives several variants; a clip depends on its prompt, the seed and its place in the list, and
        not on the other prompts. progress is told (tokens, of at most) of each clip as it grows. Raises ``UserError``
        for prompts or parameters that cannot be used.
        """
        names = [field.name for field in fields(SamplingParams)]
        unknown = sorted(set(keywords) - set(names))
        if unknown:
            raise UserError(f"unknown sampling parameters {unknown}: expected some of {names}")
        chosen = replace(params or SamplingParams(), **keywords).resolve(self.model.sampling)
        texts = [check_prompt(text) for text in ([prompts] if isinstance(prompts, str) else prompts)]
        self.timings = {}
        return [self._clip(text, request, chosen, progress) for request, text in enumerate(texts)]

    def _clip(
        self, text: str, request: int, params: SamplingParams, progress: Callable[[int, int], None] | None
    ) -> Motion:
        model = self.model
        with self._timed("text"):
            features = self._features(text)
            empty = self._features("") if params.guidance != 1.0 else None
        with self._timed("decode"):
            longest = max(len(features), len(empty) if empty is not None else 0)
            room = model.decoder.config.block_size - longest
            budget = token_budget(params, model.sampling, model.tokenizer.config.tokens_per_second, room)
            tokens = sample_tokens(
                model.decoder,
                features,
                params,
                budget=budget,
                request=request,
                empty_features=empty,
                progress=progress,
            )
        with self._timed("detokenize"):
            x = self.decode_tokens(tokens)
        with self._timed("motion"):
            return Motion.from_features(x, offsets=model.offsets, text=text)

    def _features(self, text: str) -> Tensor:
        return self.text.encode([text])[0].to(self.model.decoder.embed.weight.device)

    @torch.inference_mode()
    def decode_tokens(self, tokens: Sequence[int]) -> np.ndarray:
        """Tokens to features ``[T, 272]``, not normalised. ``UserError`` when the model decodes to NaN or infinity."""
        model = self.model
        device = model.tokenizer.decoder.last.weight.device
        scale, shift = (torch.from_numpy(x).to(device, torch.float32) for x in (model.std, model.mean))
        x = model.tokenizer.decode(torch.tensor([list(tokens)], device=device), scale, shift)[0].double().cpu().numpy()
        if not np.isfinite(x).all():
            raise UserError("the model decoded to NaN or infinity; are its weights whole?")
        return x

    def describe(self) -> dict[str, Any]:
        """What is loaded, and where it runs."""
        model = self.model
        config = model.tokenizer.config
        weight = model.decoder.embed.weight
        return {
            "model": str(model.directory),
            "parameters": sum(p.numel() for net in (model.tokenizer, model.decoder) for p in net.parameters()),
            "device": str(weight.device),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "tokens_per_second": config.tokens_per_second,
            "codebook": config.codebook,
            "text_encoder": model.text_encoder.get("name"),
            "banked_prompts": len(self.text.bank.prompts) if self.text.bank is not None else 0,
            "attention": "torch scaled_dot_product_attention",
        }
