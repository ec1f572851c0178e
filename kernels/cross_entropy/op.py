"""Registration of the fused cross-entropy and its checked public function."""

from typing import Any

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels.cross_entropy import reference
from kinetok.kernels.cross_entropy.chunks import linear_cross_entropy_sum
from kinetok.kernels.ops import DECOMPOSITIONS, check_device, check_floats, kernel_op

_sum = kernel_op(linear_cross_entropy_sum)
# The chunks depend on the targets, which a recorded program cannot know.
DECOMPOSITIONS[torch.ops.kinetok.linear_cross_entropy_sum.default] = reference.linear_cross_entropy_sum


@_sum.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scalar = hidden.new_empty((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    if with_gradients:
        return scalar, scalar.clone(), torch.empty_like(hidden), torch.empty_like(weight)
    return scalar, scalar.clone(), hidden.new_empty(0), weight.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # zeros for the gradients' gradients would be as large as the head
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:2]
    gradients = (
        grad * saved if grad is not None and wants else None
        for wants, saved in zip(wanted, ctx.saved_tensors, strict=True)
    )
    return *gradients, None, None, None


_sum.register_autograd(_backward, setup_context=_save)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int = -100) -> Tensor:
    """Mean cross-entropy of the head ``weight [V, d]`` on ``hidden [..., d]``, with gradients (once) in both.

    targets ``[...]`` int64; rows whose target is ``ignored`` cost nothing. The result is a scalar in fp32 (fp64 for fp64
    input, on a CPU only), NaN where no target counts. Products and logits are in hidden's dtype (autocast's, where that is
    on), softmax and loss in fp32. Rows are taken in chunks of a tenth at most (from ten rows on), of whose logits only one
    chunk is ever alive; weight's gradient is added up over the chunks in weight's dtype. The gradients are computed in the
    same pass as the loss. Raises ``UserError`` for shapes and dtypes that do not fit and for targets that are no class.
    """
    check_device(hidden, weight, targets)
    check_floats(hidden=hidden, weight=weight)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if (
        weight.ndim != 2
        or hidden.ndim == 0
        or hidden.shape[-1] != weight.shape[1]
        or hidden.shape[:-1] != targets.shape
    ):
        raise UserError(
            "expected hidden [..., d], weight [V, d] and targets [...], "
            f"got {list(hidden.shape)}, {list(weight.shape)} and {list(targets.shape)}"
        )
    if hidden.dtype != weight.dtype or targets.dtype != torch.int64:
        raise UserError(
            "expected hidden and weight of one floating dtype and int64 targets, "
            f"got {hidden.dtype}, {weight.dtype} and {targets.dtype}"
        )
    with_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total, count, *_ = _sum(hidden.flatten(0, -2), weight, targets.flatten(), ignored, with_gradients)
    return total / count
