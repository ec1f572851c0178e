"""Kernels with known faults, compiled by themselves: triton's interpreter, once it ran, leaves its process unfit for that.

Prints {name: row} as JSON.
"""

import json
import os

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton import language as tl

from kinetok.kernels import machine_code
from kinetok.kernels.aot import AotCase


@triton.jit
def copies(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    a = tl.load(x_ptr + at)
    b = tl.load(x_ptr + N + at)
    c = tl.load(x_ptr + 2 * N + at)
    tl.debug_barrier()  # everything is alive at once
    tl.store(y_ptr + at, a * b + c)
    tl.store(y_ptr + N + at, a * c + b)


@triton.jit
def product(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x))


@triton.jit
def wrong(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(y_ptr, tl.arange(0, N + 1))


def case(name, kernel, n, types="*fp32", **changes):
    signature = {"x_ptr": types, "y_ptr": "*fp32"}
    return AotCase(name=name, kernel=kernel, signature=signature, constexprs={"N": n}, **changes)


def main() -> None:
    tiles = {"types": "*bf16", "is_matmul": True, "warpgroup": True}
    cases = [
        (80, case("fine", copies, 256)),
        (80, case("spilling", copies, 8192, num_warps=1)),
        (80, case("registers", copies, 256, max_registers=4)),
        (80, case("no_unit", copies, 256, is_matmul=True)),
        (80, case("wrong", wrong, 256)),
        *((arch, case(f"product_{arch}", product, 64, **tiles)) for arch in machine_code.SHARED_LIMIT),
        (90, case("narrow", product, 32, **tiles)),
        (100, case("shared", product, 64, max_shared=8, **tiles)),
    ]
    machine_code.cases = lambda family: {one.name: one for _, one in cases}
    print(json.dumps({one.name: machine_code.row("any", one.name, arch) for arch, one in cases}))


if __name__ == "__main__":
    main()
