"""What every operator folder shares: registration under ``kinetok::`` and the choice of route.

A family is a folder: ``reference.py`` (the definition in plain torch: CPU kernel, test oracle, export decomposition),
``triton.py`` (kernels, and a launcher with the op's name and arguments, whose outputs are new and contiguous) and ``op.py``::

    @kernel_op                                  # kinetok::rms_norm; CUDA tensors go to rms_norm of the triton.py beside it
    def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return reference.rms_norm(x, weight, eps)

    @_rms_norm.register_fake                    # shapes and dtypes alone
    def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    _rms_norm.register_autograd(_backward, setup_context=_save)    # _backward calls an op of its own, made the same way

The public function checks its arguments (``UserError``) and picks the route::

    def rms_norm(x, weight, eps=1e-5):
        check_floats(x=x, weight=weight)
        check_device(x, weight)
        return (_rms_norm if takes_op(x) else reference.rms_norm)(x, weight, eps)

An op's result must not be one of its inputs or a view of one (torch refuses it), so definitions that may return their
input are cloned in the op. ``AOT`` of ``triton.py`` lists the production configurations (``kernels/aot.py``).
Tests run a launcher on CPU tensors with the fixtures ``launcher`` and ``device`` of ``tests/kernels/conftest.py``.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

from kinetok.errors import UserError, missing_package

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}
"""Op overload to definition, for ``ExportedProgram.run_decompositions``: what remains is aten alone.

Operators that write into their arguments stay: torch functionalises them before it looks here.
"""
FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64
WHOLE = torch.int64, torch.int32


def kernel_op(definition: Callable[..., Any], *, mutates_args: tuple[str, ...] = ()) -> CustomOpDef:
    """Register ``definition`` as ``kinetok::<its name less a leading underscore>``.

    Its signature must be annotated, as the schema is read from it.

    The Triton launcher is imported at the first call with CUDA tensors, and runs on the device of the first of them.
    Raises ``UserError`` at that call where triton is not installed: the definition never takes its place in silence.
    """
    name = definition.__name__.removeprefix("_")
    module = definition.__module__.rpartition(".")[0] + ".triton"
    op = custom_op(f"kinetok::{name}", mutates_args=mutates_args)(definition)

    @op.register_kernel("cuda")
    def launch(*args: Any, **kwargs: Any) -> Any:
        try:
            launcher = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise missing_package("triton", "gpu", f"kinetok::{name} on a CUDA device") from error
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.cuda.device_of(first):
            return launcher(*args, **kwargs)

    DECOMPOSITIONS[getattr(torch.ops.kinetok, name).default] = definition
    return op


def takes_op(*tensors: Tensor) -> bool:
    """Whether a public function goes through its op: on a GPU, and wherever torch records a graph.

    Eager CPU code calls the definition itself: a registered op costs about 10 us a call there, and 1.3 s (the import of
    torch's compiler) at the first.
    """
    return any(tensor.is_cuda for tensor in tensors) or torch.compiler.is_compiling()


def check_device(*tensors: Tensor | None) -> None:
    """Raise ``UserError`` unless all tensors lie on one device: a kernel would read another's addresses as its own."""
    devices = [tensor.device for tensor in tensors if tensor is not None]
    if any(device != devices[0] for device in devices):
        raise UserError(f"expected tensors on one device, got {', '.join(map(str, dict.fromkeys(devices)))}")


def check_floats(**tensors: Tensor | None) -> None:
    """Raise ``UserError`` unless the named tensors hold fp16, bf16, fp32 or fp64."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise UserError(f"{name}: expected fp16, bf16, fp32 or fp64, got {tensor.dtype}")


def check_whole(**tensors: Tensor | None) -> None:
    """Raise ``UserError`` unless the named tensors hold int32 or int64."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in WHOLE:
            raise UserError(f"{name}: expected int32 or int64, got {tensor.dtype}")


def cache_positions(cache: Tensor) -> int | None:
    """Positions of the contiguous ``[rows, heads, positions, head_dim]`` whose first S ``cache`` is; None where it is none."""
    if cache.is_contiguous():
        return cache.shape[2]
    _, heads, used, head_dim = cache.shape
    step = cache.stride(1)
    whole = cache.stride() == (heads * step, step, head_dim, 1) and step % head_dim == 0 and step >= used * head_dim
    return step // head_dim if whole else None


def check_caches(
    shape: tuple[int, int, int], k_cache: Tensor, v_cache: Tensor, kv_scale: Tensor | None, *, first: bool = False
) -> None:
    """Raise ``UserError`` unless both caches are contiguous ``[rows, heads, S, head_dim]`` of one S and dtype.

    shape is (rows, heads, head_dim). first: they may also be the first S positions of such caches. A float8_e4m3fn cache,
    and no other, comes with ``kv_scale [2, rows, heads]`` in fp32.
    """
    rows, heads, head_dim = shape
    for cache in (k_cache, v_cache):
        if (
            cache.ndim != 4
            or (*cache.shape[:2], cache.shape[3]) != shape
            or cache.shape != k_cache.shape
            or cache.dtype != k_cache.dtype
            or not (cache.is_contiguous() or first)
            or cache_positions(cache) is None
            or cache_positions(cache) != cache_positions(k_cache)
        ):
            raise UserError(
                f"expected contiguous caches [{rows}, {heads}, S, {head_dim}] of one size and dtype, got "
                f"{list(k_cache.shape)} {k_cache.dtype} and {list(v_cache.shape)} {v_cache.dtype}"
            )
    if (k_cache.dtype == torch.float8_e4m3fn) != (kv_scale is not None):
        raise UserError(f"expected kv_scale with a float8_e4m3fn cache and only there, got a cache of {k_cache.dtype}")
    if kv_scale is None:
        check_floats(k_cache=k_cache)
    elif kv_scale.shape != (2, rows, heads) or kv_scale.dtype != torch.float32:
        raise UserError(f"expected kv_scale [2, {rows}, {heads}] in fp32, got {list(kv_scale.shape)} {kv_scale.dtype}")
