"""Registration of the packed product and its checked public function."""

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels.linear import reference
from kinetok.kernels.linear.packing import PackedWeight
from kinetok.kernels.ops import check_device, kernel_op, takes_op

# The counters are zero again when the kernel ends, so they are not declared as changed.
_packed_linear = kernel_op(reference.packed_linear)


@_packed_linear.register_fake
def _(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    counters: Tensor,
    kind: str,
    group: int,
    rows: int,
    eps: float | None,
    residual: Tensor | None,
    swiglu: bool,
    wide: bool,
) -> Tensor:
    return x.new_empty((x.shape[0], rows // 2 if swiglu else rows), dtype=torch.float32 if wide else x.dtype)


def linear(
    x: Tensor,
    weight: PackedWeight,
    *,
    eps: float | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    wide: bool = False,
) -> Tensor:
    """y = x W^T ``[B, N]`` for ``x [B, K]``, made for the few rows of a decode step; summed in fp32, rounded once.

    eps: x is RMS-normalised first (its learned scale is inside the weight: ``pack(norm_scale=)``); the products are formed
    with the plain x and the row's factor 1 / rms is multiplied in afterwards. swiglu: silu(gate) * up of a paired weight,
    ``[B, N / 2]``. residual ``[B, N]`` in x's dtype is added. wide gives fp32 instead of x's dtype.
    A row's bits do not depend on the other rows. x's dtype must be the weight's where that is a float kind. No gradients.
    Raises ``UserError`` for shapes and dtypes that do not fit together.
    """
    if x.ndim != 2 or x.shape[1] != weight.columns:
        raise UserError(f"expected x [B, {weight.columns}], got {list(x.shape)}")
    weight.check_dtype(x)
    if swiglu and not weight.paired:
        raise UserError("swiglu: expected a weight packed with paired=True")
    columns = weight.rows // 2 if swiglu else weight.rows
    if residual is not None and (residual.shape != (x.shape[0], columns) or residual.dtype != x.dtype):
        raise UserError(
            f"expected a residual {[x.shape[0], columns]} of {x.dtype}, got {list(residual.shape)} of {residual.dtype}"
        )
    check_device(x, weight.data, residual)
    multiply = _packed_linear if takes_op(x) else reference.packed_linear
    return multiply(
        x,
        weight.data,
        weight.scale,
        weight.counters,
        weight.kind,
        weight.group,
        weight.rows,
        eps,
        residual,
        swiglu,
        wide,
    )
