"""Registration of the steps on the device and their checked public functions."""

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels.linear import PackedWeight
from kinetok.kernels.ops import check_device, check_floats, kernel_op, takes_op
from kinetok.kernels.sampling import reference
from kinetok.kernels.sampling.state import SamplingState

CHANGED = "position", "remaining", "status"
_sample_step = kernel_op(reference.sample_step, mutates_args=CHANGED)
_greedy_step = kernel_op(reference.greedy_step, mutates_args=CHANGED)


@_sample_step.register_fake
def _(
    logits: Tensor,
    empty: Tensor | None,
    seed: Tensor,
    request: Tensor,
    position: Tensor,
    least: Tensor,
    remaining: Tensor,
    status: Tensor,
    inverse_temperature: Tensor,
    top_k: Tensor,
    share: Tensor,
    guidance: Tensor,
    end_id: int,
    pad_id: int,
) -> Tensor:
    return torch.empty_like(seed)


@_greedy_step.register_fake
def _(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    counters: Tensor,
    kind: str,
    group: int,
    rows: int,
    eps: float | None,
    position: Tensor,
    least: Tensor,
    remaining: Tensor,
    status: Tensor,
    end_id: int,
    pad_id: int,
) -> Tensor:
    return torch.empty_like(position)


def sample_step(
    logits: Tensor, state: SamplingState, *, end_id: int, pad_id: int = -1, empty: Tensor | None = None
) -> Tensor:
    """The next token of each row of ``logits [B, V]``: int64 ``[B]``, by docs/numerics.md to the bit; no host sync.

    Moves ``state`` on. Rows that no longer run get the end token, and their state stays. The end token is banned before
    ``least`` tokens, ``pad_id`` always (-1: no such row). empty ``[B, V]``, the logits of the empty text, are used
    where a row's guidance is not 1. Logits in any float dtype, read as fp32.
    Raises ``UserError`` for shapes that do not fit together.
    """
    if logits.ndim != 2 or logits.shape[0] != state.seed.shape[0]:
        raise UserError(f"expected logits [{state.seed.shape[0]}, V], got {list(logits.shape)}")
    if empty is not None and empty.shape != logits.shape:
        raise UserError(f"expected empty logits {list(logits.shape)}, got {list(empty.shape)}")
    check_floats(logits=logits, empty=empty)
    check_device(logits, empty, state.seed)
    step = _sample_step if takes_op(logits) else reference.sample_step
    return step(
        logits,
        empty,
        state.seed,
        state.request,
        state.position,
        state.least,
        state.remaining,
        state.status,
        state.inverse_temperature,
        state.top_k,
        state.share,
        state.guidance,
        end_id,
        pad_id,
    )


def greedy_step(
    x: Tensor,
    head: PackedWeight,
    state: SamplingState,
    *,
    end_id: int,
    pad_id: int = -1,
    eps: float | None = None,
) -> Tensor:
    """The arg-max token ``[B]`` of ``linear(x, head, eps=eps, wide=True)`` for ``x [B, d]``; its logits are never written.

    The lowest id among equals; state, end, bans and pads as in ``sample_step``, whatever the temperatures of ``state``.
    Raises ``UserError`` for shapes and dtypes that do not fit together.
    """
    if x.shape != (state.seed.shape[0], head.columns) or head.paired:
        raise UserError(f"expected x [{state.seed.shape[0]}, {head.columns}] and an unpaired head, got {list(x.shape)}")
    head.check_dtype(x)
    check_device(x, head.data, state.seed)
    step = _greedy_step if takes_op(x) else reference.greedy_step
    return step(
        x,
        head.data,
        head.scale,
        head.counters,
        head.kind,
        head.group,
        head.rows,
        eps,
        state.position,
        state.least,
        state.remaining,
        state.status,
        end_id,
        pad_id,
    )
