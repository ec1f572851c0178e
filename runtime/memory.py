"""Whether a model fits into memory, before it is tried; and what would fit where it does not."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from kinetok.errors import UserError
from kinetok.model.config import DecoderConfig
from kinetok.model.presets import decoder_preset

GIGA = 1e9
# Bytes a weight of the blocks' and the head's products, scales included; the others are in 16 bits (in 32 for fp32).
PRECISIONS = {"fp32": 4.0, "bf16": 2.0, "int8": 1.01, "fp8": 1.01, "int4": 0.54}
OTHERS = 150e6  # the tokenizer in fp32, its buffers, activations
LADDER = ("7B", "3B", "default")
DEFAULT = DecoderConfig(n_layer=4, n_head=6, n_embd=192, codebook=15360, text_dim=384, tie_weights=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A size in a precision for a number of characters, and the bytes that it needs (computed, not measured)."""

    size: str
    precision: str
    characters: int
    need: int

    def __str__(self) -> str:
        characters = "1 character" if self.characters == 1 else f"{self.characters} characters"
        return f"{self.size} in {self.precision} with {characters} ({self.need / GIGA:.1f} GB)"


def bytes_available(device: torch.device) -> int | None:
    """Free bytes on a device: of a GPU, or of a Linux machine and the control group of this process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        left = int(limit) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such group, or a limit of "max"
        return free
    return left if free is None else min(free, left)


def decoder_bytes(config: DecoderConfig, precision: str) -> int:
    """Bytes of a decoder's weights in a precision."""
    width = config.n_embd
    products = config.n_layer * (4 * width * width + 3 * width * config.mlp_width) + config.head_rows * width
    others = config.vocab_size * width + config.text_dim * width + (2 * config.n_layer + 2) * width
    if config.tie_weights:
        others -= config.vocab_size * width
    return round(products * PRECISIONS[precision] + others * (4 if precision == "fp32" else 2))


def cache_bytes(config: DecoderConfig, slots: int, positions: int, size: int) -> int:
    """Bytes of keys and values; ``size`` is that of one number."""
    return 2 * config.n_layer * slots * config.n_embd * positions * size


def sizes() -> dict[str, DecoderConfig]:
    return {name: DEFAULT if name == "default" else decoder_preset(name) for name in LADDER}


def choice(size: str, precision: str, characters: int) -> Choice:
    """What a size needs for ``characters`` without guidance, each with all its positions."""
    config = sizes()[size]
    # An engine keeps two slots a character, for guidance, and two of its own for whole clips.
    cache = cache_bytes(config, 2 * characters + 2, config.block_size, 4 if precision == "fp32" else 2)
    need = decoder_bytes(config, precision) + cache + (OTHERS if size != "default" else OTHERS / 5)
    return Choice(size=size, precision=precision, characters=characters, need=round(need))


def plan(free: int, characters: int = 1) -> list[Choice]:
    """Of each size, from 7B down to the default, the most exact precision that fits into ``free`` bytes."""
    found = []
    for size in LADDER:
        for precision in PRECISIONS:
            if (one := choice(size, precision, characters)).need <= free:
                found.append(one)
                break
    return found


def advice(free: int | None) -> str:
    """What to do where something did not fit, as the end of a sentence."""
    fits = plan(free) if free is not None else []
    if not fits:
        return "free some memory, or use fewer characters or a smaller model"
    return f"what fits: {'; '.join(map(str, fits))}"


@contextmanager
def within_memory(what: str, need: int, device: torch.device, *, rows: int = 0) -> Iterator[None]:
    """Allocate ``need`` bytes inside. Raises ``UserError`` with a plan where they are not there, before or while trying.

    rows: of a cache, all of the same size; the plan then says how many would fit.
    """
    free = bytes_available(device)
    if free is not None and need > free:
        fewer = f"{free * rows // need} rows fit, two a character; " if rows else ""
        raise UserError(
            f"out of memory: {what} needs {need / GIGA:.2f} GB, but {device} has {free / GIGA:.2f} GB free; "
            f"{fewer}{advice(free)}"
        )
    with memory_plan(what, device):
        yield


@contextmanager
def memory_plan(what: str, device: torch.device) -> Iterator[None]:
    """Allocate inside. Raises ``UserError`` with a plan where memory runs out; every other error comes through."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch reports a full host as a plain RuntimeError of its allocator; every other one is not about memory.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise UserError(f"out of memory: {what} did not fit on {device}; {advice(bytes_available(device))}") from error
