"""Sentences: what is accepted, and which encoder turns them into features."""

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from kinetok.errors import UserError

MAX_CHARACTERS = 10_000


class TextEncoder(Protocol):
    """Turns sentences into features; deterministic, one sentence independent of the others."""

    dim: int
    name: str

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """fp32 features ``[L_i, dim]`` of each text, 1 <= L_i <= 150."""
        ...


def text_encoder(spec: Mapping[str, Any], device: str = "cpu") -> TextEncoder:
    """The encoder that a model directory names: {"type": "minilm" | "flan-t5", ...}; loads its weights.

    ``device`` is where a Flan-T5 computes and leaves its features; MiniLM is small enough for the CPU.
    """
    kind = spec.get("type")
    if kind == "minilm":
        from kinetok.model.text_minilm import MiniLM

        return MiniLM(pooled_scale=float(spec.get("pooled_scale", 10.0)))
    if kind == "flan-t5":
        from kinetok.model.text_t5 import FlanT5

        return FlanT5(str(spec.get("name")), device=device)
    if kind == "none":
        raise UserError("this model names no text encoder: only prompts of its bank can be generated")
    raise UserError(f"unknown text encoder type {kind!r}: expected 'minilm', 'flan-t5' or 'none'")


def check_prompt(text: str) -> str:
    """The prompt with white space normalised; ``UserError`` when it is empty, too long or not plain text."""
    if not isinstance(text, str):
        raise UserError(f"expected a sentence, got {type(text).__name__}")
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"expected a prompt of at most {MAX_CHARACTERS} characters, got {len(text)}")
    clean = " ".join(text.split())
    if not clean:
        raise UserError("expected a sentence such as 'a person walks forward', got an empty prompt")
    for character in clean:
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise UserError(f"expected plain text, got the character U+{ord(character):04X} in the prompt")
    return clean


def decode_prompt(data: bytes, source: str = "prompt") -> str:
    """Bytes to text; ``UserError`` when they are not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source}: expected UTF-8 text, got the byte 0x{data[error.start]:02X} at {error.start}"
        ) from error


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a UTF-8 file, one a line, blank lines skipped. ``UserError`` names the file and the line."""
    try:
        return parse_prompts(Path(path).read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def parse_prompts(data: bytes, source: str) -> list[str]:
    """``read_prompts`` of the bytes of a file, which errors call ``source``."""
    prompts = []
    for number, line in enumerate(decode_prompt(data, source).removeprefix("\ufeff").splitlines(), start=1):
        if line.strip():
            try:
                prompts.append(check_prompt(line))
            except UserError as error:
                raise UserError(f"{source}, line {number}: {error}") from error
    if not prompts:
        raise UserError(f"{source}: expected one prompt a line, got none")
    return prompts
