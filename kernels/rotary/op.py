"""Registration of the rotary operators and their checked public functions."""

from typing import Any

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels.ops import check_caches, check_device, check_floats, check_whole, kernel_op, takes_op
from kinetok.kernels.rotary import cpu, reference

_apply_rotary = kernel_op(reference.apply_rotary)
_apply_rotary_backward = kernel_op(reference.apply_rotary_backward)
_rotary_kv_write = kernel_op(reference.rotary_kv_write, mutates_args=("k_cache", "v_cache"))


@_apply_rotary.register_fake
@_apply_rotary_backward.register_fake
def _(x: Tensor, table: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_rotary_kv_write.register_fake
def _(
    qkv: Tensor, table: Tensor, starts: Tensor, k_cache: Tensor, v_cache: Tensor, kv_scale: Tensor | None = None
) -> Tensor:
    rows, positions, _, heads, head_dim = qkv.shape
    return qkv.new_empty((rows, positions, heads, head_dim))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _apply_rotary_backward(grad, *ctx.saved_tensors), None


_apply_rotary.register_autograd(_backward, setup_context=_save)


def _check_table(shape: tuple[int, ...], table: Tensor) -> None:
    rows, positions, _, head_dim = shape
    if head_dim % 2 or table.shape not in ((rows, positions, head_dim // 2, 2), (1, positions, head_dim // 2, 2)):
        raise UserError(
            f"expected an even head size and a table [{rows} or 1, {positions}, {head_dim} / 2, 2], got {list(table.shape)}"
        )


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs (2m, 2m + 1) of ``x [B, T, H, head_dim]`` by ``table [B or 1, T, head_dim / 2, 2]`` (section 3).

    table holds cosines and sines (``rotary_table``). Computed in fp32 and rounded to x's dtype; with a gradient wrt x.
    Raises ``UserError`` where shapes, dtypes or devices do not fit.
    """
    if x.ndim != 4:
        raise UserError(f"expected x [B, T, H, head_dim], got {list(x.shape)}")
    _check_table(x.shape, table)
    check_floats(x=x, table=table)
    check_device(x, table)
    return (_apply_rotary if takes_op(x) else cpu.apply_rotary)(x, table)


def rotary_kv_write(
    qkv: Tensor, table: Tensor, starts: Tensor, k_cache: Tensor, v_cache: Tensor, kv_scale: Tensor | None = None
) -> Tensor:
    """Rotated q ``[B, T, H, hd]``; rotated k, and v, are written to ``k_cache, v_cache [B, H, S, hd]`` in the same pass.

    qkv ``[B, T, 3, H, hd]`` is the attention's input projection. Token t of row b takes position ``starts[b] + t``
    (starts ``[B]`` integer) and is rotated by ``table [B or 1, T, hd / 2, 2]``. Rotation in fp32, rounded to qkv's dtype.
    A float8_e4m3fn cache needs ``kv_scale [2, B, H]`` fp32: it holds k / kv_scale[0] and v / kv_scale[1], clamped to +-448
    (fill kv_scale with one number for a scale per tensor). Positions outside the cache are the caller's error, which only
    the CPU notices; the GPU leaves them out. No gradient.
    Raises ``UserError`` where shapes, dtypes, devices or the cache's layout do not fit.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3 or starts.shape != qkv.shape[:1]:
        raise UserError(f"expected qkv [B, T, 3, H, hd] and starts [B], got {list(qkv.shape)} and {list(starts.shape)}")
    rows, positions, _, heads, head_dim = qkv.shape
    _check_table((rows, positions, heads, head_dim), table)
    check_floats(qkv=qkv, table=table)
    check_whole(starts=starts)
    check_caches((rows, heads, head_dim), k_cache, v_cache, kv_scale)
    check_device(qkv, table, starts, k_cache, v_cache, kv_scale)
    return (_rotary_kv_write if takes_op(qkv) else reference.rotary_kv_write)(
        qkv, table, starts, k_cache, v_cache, kv_scale
    )
