"""How a ``triton.py`` says in which configurations its kernels are used, so that they compile without a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class AotCase:
    """One kernel in one production configuration; a ``triton.py`` lists its own in ``AOT: list[AotCase]``.

    ``name`` is unique over all families ("fsq_encode_c512"). ``kernel`` is the ``@triton.jit`` function. ``signature``
    gives the Triton type of every argument that is not a constexpr, by name ("*fp32", "*bf16", "i32", "fp32"), and
    ``constexprs`` the values of the others. ``aligned`` names the arguments that are multiples of 16 in use (pointers
    from the allocator, strides of whole rows), which is what makes 16-byte loads. ``num_warps`` and ``num_stages`` are
    those the launcher passes, and ``options`` other compile options of the launcher (``{"enable_fp_fusion": False}``).
    A case with ``is_matmul`` must show tensor-core instructions in its machine code, and one with ``warpgroup`` (a tile of
    64 rows or more) wgmma on sm_90 and tcgen05 on sm_100. ``max_registers`` (a thread) and ``max_shared`` (bytes; None: what
    the architecture has) are the budget that ``kinetok aot`` holds it to. ``architectures`` are those the launcher uses it on
    (90 is sm_90; empty: all).
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    is_matmul: bool = False
    warpgroup: bool = False
    max_registers: int = 255
    max_shared: int | None = None
    architectures: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
