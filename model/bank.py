"""Prompt banks: features computed ahead of time, so that generating needs no text encoder."""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kinetok.errors import UserError
from kinetok.files import whole_file
from kinetok.model.text import TextEncoder, check_prompt, text_encoder

FORMAT = "kinetok-bank-1"
MAX_FEATURES = 150


class PromptBank:
    """Features of known prompts, stored in fp16; the empty text, which guidance needs, is always among them."""

    def __init__(self, features: Mapping[str, Tensor], *, name: str, dim: int) -> None:
        self.features, self.name, self.dim = dict(features), name, dim

    @property
    def prompts(self) -> list[str]:
        return [prompt for prompt in self.features if prompt]

    @classmethod
    def build(
        cls, texts: Sequence[str], encoder: TextEncoder, progress: Callable[[int, int], None] | None = None
    ) -> "PromptBank":
        """Encode ``texts`` (checked, each once) and the empty text; ``progress`` is told (done, of)."""
        prompts = list(dict.fromkeys(["", *map(check_prompt, texts)]))
        features = {}
        for done, prompt in enumerate(prompts, start=1):
            # fp16 from the start: a bank gives the same motion before and after it is saved.
            features[prompt] = encoder.encode([prompt])[0].half().float()
            if progress is not None:
                progress(done, len(prompts))
        return cls(features, name=encoder.name, dim=encoder.dim)

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """fp32 features ``[L_i, dim]``; ``UserError`` with the nearest banked prompts for one that is not here."""
        for text in texts:
            if text not in self.features:
                near = difflib.get_close_matches(text, self.prompts, n=3, cutoff=0.0)
                raise UserError(
                    f"the prompt {text[:80]!r} is not in the bank; nearest: {', '.join(map(repr, near)) or 'none'}; "
                    "add it with kinetok embed"
                )
        return [self.features[text] for text in texts]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: ``features`` fp16 [sum L, dim], ``offsets`` int64 [prompts + 1]."""
        rows = list(self.features.values())
        offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
        metadata = {"format": FORMAT, "encoder": self.name, "prompts": json.dumps(list(self.features))}
        with whole_file(path) as temporary:
            save_file({"features": torch.cat(rows).half(), "offsets": offsets}, temporary, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "PromptBank":
        """Read and check a bank. ``UserError`` for anything else."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise UserError(f"{path}: expected a prompt bank ({FORMAT}), got {metadata.get('format')!r}")
                features, offsets = file.get_tensor("features"), file.get_tensor("offsets")
                prompts = json.loads(metadata["prompts"])
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError, RecursionError) as error:
            detail = " ".join(str(error).split())[:120]
            raise UserError(f"{path}: expected a prompt bank, but it cannot be read ({detail})") from error
        whole = (
            features.ndim == 2
            and features.dtype == torch.float16
            and bool(features.isfinite().all())
            and offsets.dtype == torch.int64
            and isinstance(prompts, list)
            and all(isinstance(prompt, str) for prompt in prompts)
            and len(set(prompts)) == len(prompts)
            and "" in prompts
            and offsets.shape == (len(prompts) + 1,)
        )
        lengths = offsets.diff().tolist() if whole else []
        if (
            not whole
            or int(offsets[0])
            or int(offsets[-1]) != len(features)
            or not all(1 <= length <= MAX_FEATURES for length in lengths)
        ):
            raise UserError(f"{path}: damaged prompt bank: its features, offsets and prompts do not fit together")
        parts = dict(zip(prompts, features.float().split(lengths), strict=True))
        return cls(parts, name=metadata.get("encoder", ""), dim=features.shape[1])


class BankedEncoder:
    """A model's encoder that looks into its bank first; the real encoder is loaded when a prompt is not there."""

    def __init__(self, bank: PromptBank | None, spec: Mapping[str, Any], dim: int) -> None:
        self.bank, self.spec, self.dim = bank, dict(spec), dim
        self.name = str(spec.get("name", spec.get("type")))
        self._encoder: TextEncoder | None = None

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """fp32 features ``[L_i, dim]`` of each text."""
        return [self._one(text) for text in texts]

    def _one(self, text: str) -> Tensor:
        if self.bank is not None and text in self.bank.features:
            return self.bank.features[text]
        if self.spec.get("type") == "none" and self.bank is not None:
            return self.bank.encode([text])[0]
        if self._encoder is None:
            self._encoder = text_encoder(self.spec)
            if self._encoder.dim != self.dim:
                raise UserError(
                    f"text encoder {self.name}: expected {self.dim} numbers a token, got {self._encoder.dim}"
                )
        return self._encoder.encode([text])[0]
