"""The sizes of the paper's family of decoders (MotionMillion, section 1.2)."""

from typing import Any

from kinetok.errors import UserError
from kinetok.model.config import DecoderConfig

DECODERS: dict[str, dict[str, int]] = {
    name: {"n_layer": layers, "n_head": heads, "n_embd": width}
    for name, layers, heads, width in (
        ("44M", 8, 8, 512),
        ("111M", 12, 12, 768),
        ("343M", 24, 16, 1024),
        ("775M", 36, 20, 1280),
        ("1B", 48, 24, 1536),
        ("3B", 24, 32, 3200),
        ("5B", 24, 32, 4096),
        ("6B", 28, 32, 4096),
        ("7B", 36, 32, 4096),
        ("13B", 40, 40, 5120),
        ("30B", 60, 52, 6656),
        ("65B", 80, 64, 8192),
    )
}


def decoder_preset(name: str, **changes: Any) -> DecoderConfig:
    """The configuration of a size by name, for 64,000 codes and Flan-T5-XL features unless ``changes`` say otherwise."""
    if name not in DECODERS:
        raise UserError(f"unknown decoder size {name!r}: expected one of {', '.join(DECODERS)}")
    return DecoderConfig.from_dict({**DECODERS[name], **changes})
