"""Where the rows of a batch stand in their draws, in tensors that stay on the device."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kinetok.errors import UserError

RUNNING, ENDED, FULL, FAILED, HELD = range(5)
TOP_P_BITS = 16


def share_of(top_p: float) -> int:
    """top_p in 65536ths, at least one (docs/numerics.md)."""
    return max(1, round(top_p * 2**TOP_P_BITS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """How one row is sampled: its name (seed of 64 unsigned bits, request), fewest and most tokens, and the choice.

    temperature 0 takes the arg-max; top_k 0, top_p 1 and guidance 1 are off.
    """

    seed: int = 0
    request: int = 0
    least: int = 0
    most: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0


def _numbers(draw: Draw, written: int) -> dict[str, int | float]:
    """The numbers of a row that has written so many tokens."""
    if draw.most <= written or draw.least > draw.most:
        raise UserError("expected at least one token a draw, and no more of them at least than at most")
    return {
        "seed": draw.seed - (draw.seed >> 63 << 64),
        "request": draw.request,
        "position": written,
        "least": draw.least,
        "remaining": draw.most - written,
        "status": RUNNING,
        "inverse_temperature": 1.0 / draw.temperature if draw.temperature else 0.0,
        "top_k": min(draw.top_k, 2**31 - 1),
        "share": share_of(draw.top_p),
        "guidance": draw.guidance,
    }


INT32, FLOAT32 = ("status", "top_k", "share"), ("inverse_temperature", "guidance")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SamplingState:
    """A batch of draws: tensors ``[B]``, of which a step changes ``position``, ``remaining`` and ``status``.

    int64 seed, request, position (tokens written), least, remaining; int32 top_k, share (top-p in 65536ths) and status
    (0 running, 1 ended by the end token, 2 full, 3 failed: the logits were no numbers or all banned, 4 held: stands still
    until somebody sets it to running again); fp32 inverse_temperature (0: arg-max) and guidance.
    """

    seed: Tensor
    request: Tensor
    position: Tensor
    least: Tensor
    remaining: Tensor
    status: Tensor
    inverse_temperature: Tensor
    top_k: Tensor
    share: Tensor
    guidance: Tensor

    @classmethod
    def start(cls, draws: Sequence[Draw], device: torch.device | str = "cpu") -> "SamplingState":
        """The state before the first token. Raises ``UserError`` where a draw has no room for one."""
        rows = [_numbers(draw, 0) for draw in draws]

        def column(name: str) -> Tensor:
            dtype = torch.int32 if name in INT32 else torch.float32 if name in FLOAT32 else torch.int64
            return torch.tensor([row[name] for row in rows], dtype=dtype, device=device)

        return cls(**{field.name: column(field.name) for field in fields(cls)})

    def put(self, row: int, draw: Draw, written: int) -> None:
        """Let a row draw anew, as one that has ``written`` tokens; the host does not wait for the device.

        Raises ``UserError`` as ``start`` does.
        """
        for name, value in _numbers(draw, written).items():
            getattr(self, name)[row].fill_(value)

    def rows(self, some: slice) -> "SamplingState":
        """Some rows, as views."""
        return replace(self, **{field.name: getattr(self, field.name)[some] for field in fields(self)})
