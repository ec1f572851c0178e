"""Machine code of the Triton kernels for GPUs that are not there: what each takes, and what is wrong with it."""

import contextlib
import importlib
import io
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from kinetok.kernels.aot import AotCase

SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Compute capabilities (80 is 8.0) and the bytes of shared memory that a block may have there."""

# Instructions of the matrix units. A warpgroup's (wgmma) and those of tcgen05 are HGMMA... and UTCHMMA... in machine code.
TENSOR_CORE = re.compile(r"\b(UTC[A-Z]*MMA|[HIQBDO]G?MMA)\b")
WARPGROUP = {90: re.compile("GMMA$"), 100: re.compile("^UTC")}
REGISTERS = re.compile(r"Used (\d+) registers")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def families() -> list[str]:
    """The operator families that have Triton kernels."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/triton.py"))


@cache
def cases(family: str) -> dict[str, AotCase]:
    """The production configurations of a family by name. Imports triton, and turns its interpreter off for this process."""
    os.environ.pop("TRITON_INTERPRET", None)
    listed: Sequence[AotCase] = importlib.import_module(f"kinetok.kernels.{family}.triton").AOT
    by_name = {case.name: case for case in listed}
    assert len(by_name) == len(listed), f"two cases of {family} have one name"
    return by_name


def names(chosen: Sequence[str]) -> list[tuple[str, str, int, bool]]:
    """(family, case, architecture, whether it is its kernel's first there) of all that ``row`` can compile for ``chosen``."""
    found, seen = [], set()
    for family in chosen:
        for name, case in cases(family).items():
            for arch in case.architectures or SHARED_LIMIT:
                kernel = id(case.kernel), arch
                found.append((family, name, arch, kernel not in seen))
                seen.add(kernel)
    return found


def _instructions(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        found = TENSOR_CORE.findall(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {name: found.count(name) for name in sorted(set(found))}


def row(family: str, name: str, arch: int) -> dict[str, Any]:
    """Compile one case: registers a thread, bytes spilled and of shared memory, tensor-core instructions, ``problems``.

    A kernel that does not compile is a problem like the others, and has no figures.
    """
    case = cases(family)[name]
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, CompilationError

    kernel = case.kernel
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn  # under an autotuner or heuristics
    place = {argument: (at,) for at, argument in enumerate(kernel.arg_names)}
    odd = sorted({*case.signature, *case.constexprs, *case.aligned} ^ set(place))
    assert not odd, f"{name}: the case and the kernel differ in the arguments {odd}"
    source = ASTSource(
        fn=kernel,
        signature={a: "constexpr" if a in case.constexprs else case.signature[a] for a in kernel.arg_names},
        constexprs={place[argument]: value for argument, value in case.constexprs.items()},
        attrs={place[argument]: [["tt.divisibility", 16]] for argument in case.aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    found: dict[str, Any] = {"kernel": name, "arch": f"sm_{arch}", "warps": case.num_warps}
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.cache.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
    ):
        knobs.cache.dir = folder  # nothing left behind, and nothing found that another version compiled
        knobs.nvidia.dump_ptxas_log = True
        try:
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        except (CompilationError, RuntimeError) as error:
            reason = next(line for line in f"{error}".splitlines()[::-1] if line.strip())
            return {**found, "problems": [f"does not compile: {reason.strip()}"]}
    registers, spilled = REGISTERS.search(log.getvalue()), SPILLS.search(log.getvalue())
    assert registers and spilled, f"no resource usage in the assembler's log:\n{log.getvalue()}"
    found |= {
        "registers": int(registers[1]),
        "spills": int(spilled[1]) + int(spilled[2]),
        "shared": compiled.metadata.shared,
        "tensor_core": _instructions(compiled.asm["cubin"]) if case.is_matmul else {},
    }
    return {**found, "problems": _problems(case, arch, found)}


def _problems(case: AotCase, arch: int, found: dict[str, Any]) -> list[str]:
    problems = []
    if found["spills"]:
        problems.append(f"spills {found['spills']} bytes")
    if found["registers"] > case.max_registers:
        problems.append(f"{found['registers']} registers, budget {case.max_registers}")
    shared = min(SHARED_LIMIT[arch], case.max_shared or SHARED_LIMIT[arch])
    if found["shared"] > shared:
        problems.append(f"{found['shared']} bytes of shared memory, budget {shared}")
    if case.is_matmul and not found["tensor_core"]:
        problems.append("no tensor-core instruction")
    wanted = WARPGROUP.get(arch)
    if case.warpgroup and wanted and not any(wanted.search(name) for name in found["tensor_core"]):
        problems.append(f"no {'wgmma' if arch == 90 else 'tcgen05'} instruction")
    return problems
