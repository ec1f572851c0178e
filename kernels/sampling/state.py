"""Where the rows of a batch stand in their draws, in tensors that stay on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinetok.errors import UserError

RUNNING, ENDED, FULL, FAILED = range(4)
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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SamplingState:
    """A batch of draws: tensors ``[B]``, of which a step changes ``position``, ``remaining`` and ``status``.

    int64 seed, request, position (tokens written), least, remaining; int32 top_k, share (top-p in 65536ths) and status
    (0 running, 1 ended by the end token, 2 full, 3 failed: the logits were no numbers or all banned); fp32
    inverse_temperature (0: arg-max) and guidance.
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
        if any(draw.most < 1 or draw.least > draw.most for draw in draws):
            raise UserError("expected at least one token a draw, and no more of them at least than at most")

        def row(values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            seed=row([draw.seed - (draw.seed >> 63 << 64) for draw in draws]),
            request=row([draw.request for draw in draws]),
            position=row([0] * len(draws)),
            least=row([draw.least for draw in draws]),
            remaining=row([draw.most for draw in draws]),
            status=row([RUNNING] * len(draws), torch.int32),
            inverse_temperature=row(
                [1.0 / draw.temperature if draw.temperature else 0.0 for draw in draws], torch.float32
            ),
            top_k=row([min(draw.top_k, 2**31 - 1) for draw in draws], torch.int32),
            share=row([share_of(draw.top_p) for draw in draws], torch.int32),
            guidance=row([draw.guidance for draw in draws], torch.float32),
        )
