"""``kinetok::dwt`` and ``kinetok::idwt``; each is the other's gradient, up to the scale and the extension."""

from typing import Any, Literal

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels.ops import FLOATS, kernel_op, takes_op
from kinetok.kernels.wavelet import cpu, reference

Wavelet = Literal["haar", "db2", "db3", "db4"]
Mode = Literal["reflect", "periodic"]
Scale = Literal["patcher", "orthonormal"]
Tree = Literal["packet", "pyramid"]
MODES = {"haar": ("reflect", "periodic"), "db2": ("periodic",), "db3": ("periodic",), "db4": ("periodic",)}
GAINS = {"patcher": 0.5, "orthonormal": 1.0}  # the patcher halves the orthonormal analysis and doubles the synthesis


def _check(x: Tensor, levels: int, wavelet: str, scale: str, tree: str, channels_last: bool) -> None:
    if x.ndim != 3 or x.dtype not in FLOATS:
        layout = "[B, T, C]" if channels_last else "[B, C, T]"
        raise UserError(f"expected floating-point numbers of shape {layout}, got {x.dtype} {list(x.shape)}")
    if not 0 <= levels <= 6:
        raise UserError(f"levels: expected 0 to 6, got {levels}")
    for name, value, allowed in (
        ("wavelet", wavelet, MODES),
        ("scale", scale, GAINS),
        ("tree", tree, ("packet", "pyramid")),
    ):
        if value not in allowed:
            raise UserError(f"{name}: expected one of {sorted(allowed)}, got {value!r}")


@kernel_op
def _dwt(x: Tensor, levels: int, wavelet: str, mode: str, gain: float, tree: str, channels_last: bool) -> Tensor:
    return reference.dwt(x, levels, wavelet, mode, gain, tree, channels_last)


@kernel_op
def _idwt(y: Tensor, levels: int, wavelet: str, gain: float, tree: str, channels_last: bool) -> Tensor:
    return reference.idwt(y, levels, wavelet, gain, tree, channels_last)


@_dwt.register_fake
def _(x: Tensor, levels: int, wavelet: str, mode: str, gain: float, tree: str, channels_last: bool) -> Tensor:
    batch, time, channels = x.shape if channels_last else (x.shape[0], x.shape[2], x.shape[1])
    blocks, size = (time + 2**levels - 1) // 2**levels, 2**levels
    time, channels = (blocks, channels * size) if tree == "packet" else (blocks * size, channels)
    return x.new_empty((batch, time, channels) if channels_last else (batch, channels, time))


@_idwt.register_fake
def _(y: Tensor, levels: int, wavelet: str, gain: float, tree: str, channels_last: bool) -> Tensor:
    batch, time, channels = y.shape if channels_last else (y.shape[0], y.shape[2], y.shape[1])
    if tree == "packet":
        time, channels = time * 2**levels, channels // 2**levels
    return y.new_empty((batch, time, channels) if channels_last else (batch, channels, time))


def _save_dwt(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.options = inputs
    ctx.length = x.shape[1 if ctx.options[-1] else 2]


def _dwt_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The adjoint: the transposed filters, then the extension's share goes back to the frames it was copied from."""
    levels, wavelet, mode, gain, tree, channels_last = ctx.options
    full = _idwt(grad.contiguous(), levels, wavelet, gain, tree, channels_last)
    axis = 1 if channels_last else 2
    kept, extra = full.split([ctx.length, full.shape[axis] - ctx.length], dim=axis)
    tail = reference.extension(ctx.length, levels, mode)
    if tail:
        kept = kept.index_add(axis, torch.tensor(tail, device=grad.device), extra)
    return kept, None, None, None, None, None, None


def _save_idwt(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = inputs[1:]


def _idwt_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    levels, wavelet, gain, tree, channels_last = ctx.options
    return _dwt(grad.contiguous(), levels, wavelet, "periodic", gain, tree, channels_last), None, None, None, None, None


_dwt.register_autograd(_dwt_backward, setup_context=_save_dwt)
_idwt.register_autograd(_idwt_backward, setup_context=_save_idwt)


def dwt(
    x: Tensor,
    levels: int,
    wavelet: Wavelet = "haar",
    mode: Mode = "reflect",
    scale: Scale = "patcher",
    tree: Tree = "packet",
    channels_last: bool = False,
) -> Tensor:
    """Wavelet transform of ``x [B, C, T]`` (``[B, T, C]`` with channels_last) along its time; fp32 inside (fp64 for fp64).

    tree "packet" gives ``[B, C * 2^levels, n]`` with n = ceil(T / 2^levels) (time second with channels_last): each level
    halves the time and doubles the channels, all lows before all highs, and the next level treats the whole result as
    its input. "pyramid" treats the lows alone and gives ``[B, C, n * 2^levels]``: the last lows, then the highs from
    the last level's to the first's, side by side in time.

    scale "patcher" halves every level of the orthonormal transform (section 2). A time that is no multiple of 2^levels is
    extended. mode "reflect" (Haar alone) mirrors, level by level: x_T := x_{T-2}. mode "periodic" (every wavelet)
    repeats the last frame; the filters of db2, db3 and db4 then wrap around the ends of the clip, so that a coefficient
    near one end also depends on the other. Raises ``UserError`` for other combinations.
    """
    _check(x, levels, wavelet, scale, tree, channels_last)
    if mode not in MODES[wavelet]:
        raise UserError(
            f"mode: expected {' or '.join(map(repr, MODES[wavelet]))} for wavelet {wavelet!r}, got {mode!r}"
        )
    if levels == 0:
        return x
    route = _dwt if takes_op(x) else cpu.dwt
    return route(x, levels, wavelet, mode, GAINS[scale], tree, channels_last)


def idwt(
    y: Tensor,
    levels: int,
    wavelet: Wavelet = "haar",
    scale: Scale = "patcher",
    tree: Tree = "packet",
    channels_last: bool = False,
) -> Tensor:
    """Inverse of ``dwt``: ``[B, C * 2^levels, n]`` (or a pyramid ``[B, C, n * 2^levels]``) to ``[B, C, n * 2^levels]``.

    The extension of ``dwt`` comes back as frames after the clip's own. Raises ``UserError`` for sizes that no ``dwt``
    of as many levels has.
    """
    _check(y, levels, wavelet, scale, tree, channels_last)
    if levels == 0:
        return y
    axis = 2 if (tree == "packet") == channels_last else 1
    if y.shape[axis] % 2**levels:
        kind = "channels" if tree == "packet" else "coefficients"
        raise UserError(f"idwt: expected a multiple of {2**levels} {kind} for {levels} levels, got {y.shape[axis]}")
    route = _idwt if takes_op(y) else cpu.idwt
    return route(y, levels, wavelet, 1 / GAINS[scale], tree, channels_last)
