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

from kinetok.errors import missing_package

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}
"""Op overload to definition, for ``ExportedProgram.run_decompositions``: what remains is aten alone."""


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
