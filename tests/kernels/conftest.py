"""Runs Triton launchers where there is no GPU: under Triton's interpreter, on CPU tensors, into poisoned outputs.

TRITON_INTERPRET is set by tests/conftest.py, because Triton reads it when it is imported. With a GPU the same tests run the
compiled kernels.
"""

import importlib
import os
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where a launcher's tensors live: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, interpreted_loops: None) -> Callable[[str], ModuleType]:
    """``launcher("fsq")`` is ``kinetok.kernels.fsq.triton``; whatever it allocates by torch.empty* starts as NaN."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        _mend_interpreter(monkeypatch)
    # torch lists its constructors when a device is first entered, and keeps the list. With ours on it in place of torch.empty,
    # "meta" would hold nowhere after this test: a 5B decoder was built on the CPU that way.
    with torch.device("meta"):
        torch.empty(0)
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    return lambda family: importlib.import_module(f"kinetok.kernels.{family}.triton")


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_and_fill(*args: object, **kwargs: object) -> torch.Tensor:
        result = allocate(*args, **kwargs)
        if result.dtype.is_floating_point:
            return result.fill_(float("nan"))
        return result.fill_(True if result.dtype == torch.bool else torch.iinfo(result.dtype).min)

    return allocate_and_fill


def _mend_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round bfloat16 casts to nearest even and refuse other bfloat16 arithmetic; sum floating-point products in float64.

    The interpreter keeps bfloat16 as its 16 bits: it truncates when it casts and adds, multiplies and reduces the bits
    as whole numbers. Kernels therefore go to float32 first, and one that does not fails here instead of passing on luck.
    It multiplies matrices by NumPy's BLAS, whose sums depend on a row's place in its tile and on the processor: a GPU's
    do not, and rounded from float64 these do not either.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot, binary = builder.cast_impl, builder.create_dot, builder.binary_op
    check = interpreter.ReduceScanOpInterface.check_tensor

    def widened(x):
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_impl(self, source, target):
        if source.dtype.scalar == tl.bfloat16:
            wide = widened(source)
            return wide if target.scalar == tl.float32 else cast_impl(self, wide, target)
        if target.scalar == tl.bfloat16:
            single = torch.from_numpy(np.ascontiguousarray(cast(self, source, tl.float32).data))
            return handle(single.bfloat16().view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, source, target)

    def create_dot(self, a, b, d, *rest):
        a, b = (widened(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        if not all(np.issubdtype(x.data.dtype, np.floating) for x in (a, b)):  # codes of fp8, integers
            return dot(self, a, b, d, *rest)
        total = a.data.astype(np.float64) @ b.data.astype(np.float64) + d.data
        return handle(total.astype(d.data.dtype), d.dtype.scalar)

    def binary_op(self, left, right, op):
        assert left.dtype.scalar != tl.bfloat16, "bfloat16 arithmetic in a kernel: go to float32 first"
        return binary(self, left, right, op)

    def check_tensor(self, values):
        assert all(value.dtype.scalar != tl.bfloat16 for value in values), "bfloat16 reduction: go to float32 first"
        return check(self, values)

    monkeypatch.setattr(builder, "cast_impl", cast_impl)
    monkeypatch.setattr(builder, "create_dot", create_dot)
    monkeypatch.setattr(builder, "binary_op", binary_op)
    monkeypatch.setattr(interpreter.ReduceScanOpInterface, "check_tensor", check_tensor)
