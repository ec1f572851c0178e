"""``kinetok aot``: a real kernel through the command, and what counts as a problem."""

import importlib.metadata
import json

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed, so there is no compiler to test")
from triton import language as tl  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from kinetok.cli import aot  # noqa: E402
from kinetok.kernels import machine_code  # noqa: E402
from kinetok.kernels.aot import AotCase  # noqa: E402


def test_a_kernel_compiles_and_its_table_comes_back(kinetok, tmp_path):
    table = tmp_path / "table.json"
    done = kinetok("aot", "--op", "rms_norm_d192", "--arch", "sm_80", "--arch", "sm_120", "--json", table)
    assert done.code == 0 and "rms_norm_d192" in done.out and "0 problems" in done.out, done
    written = json.loads(table.read_text())
    assert [row["arch"] for row in written["rows"]] == ["sm_80", "sm_120"]
    for row in written["rows"]:
        assert 16 <= row["registers"] <= 255 and row["spills"] == 0 and row["problems"] == []
    assert len(table.read_text().splitlines()) == 4  # a row a line

    written["rows"][0]["registers"] = 3
    table.write_text(json.dumps(written))
    again = kinetok("aot", "--op", "rms_norm_d192", "--arch", "sm_80", "--check", table)
    assert again.code == 0  # a change is shown, not refused
    assert "changed: rms_norm_d192 sm_80: registers 3 -> " in again.out and "gone" not in again.out


def test_bad_input_is_one_line(refused, tmp_path, monkeypatch):
    assert "sm_80, sm_89, sm_90" in refused("aot", "--arch", "sm_70", "--op", "norm")
    assert "norm" in refused("aot", "--op", "nothing")
    assert "cannot read" in refused("aot", "--check", tmp_path / "none.json")
    for text in ("{", "[]", '{"schema": 1, "triton": 3, "rows": []}', '{"schema": 99, "triton": "3", "rows": []}'):
        (tmp_path / "bad.json").write_text(text)
        assert "expected a table" in refused("aot", "--check", tmp_path / "bad.json")

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(aot, "version", missing)
    assert "triton" in refused("aot") and "kinetok[gpu]" in refused("aot")


def test_a_problem_ends_with_1_and_says_which(kinetok, monkeypatch):
    row = {"kernel": "k", "arch": "sm_90", "warps": 4, "registers": 255, "spills": 8, "shared": 0, "tensor_core": {}}
    monkeypatch.setattr(aot, "_compile", lambda *_: [{**row, "problems": ["spills 8 bytes"]}])
    done = kinetok("aot")
    assert done.code == 1 and "FAILED k sm_90: spills 8 bytes" in done.out


def test_rows_that_come_and_go_are_named():
    old, new = [{"kernel": "a", "arch": "sm_80", "x": 1}], [{"kernel": "b", "arch": "sm_80", "x": 1}]
    assert list(aot._changes(old, new, whole=True)) == ["new: b sm_80", "gone: a sm_80"]
    assert list(aot._changes(old, new, whole=False)) == ["new: b sm_80"]
    assert list(aot._changes(old, old, whole=True)) == []


def _copy(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    a = tl.load(x_ptr + at)
    b = tl.load(x_ptr + N + at)
    c = tl.load(x_ptr + 2 * N + at)
    tl.debug_barrier()  # everything is alive at once
    tl.store(y_ptr + at, a * b + c)
    tl.store(y_ptr + N + at, a * c + b)


def _product(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x))


def _wrong(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(y_ptr, tl.arange(0, N + 1))


def problems(monkeypatch, function, n, arch=80, types="*fp32", **changes):
    case = AotCase(
        name="case",
        kernel=JITFunction(function),  # triton.jit makes an interpreted one here
        signature={"x_ptr": types, "y_ptr": "*fp32"},
        constexprs={"N": n},
        **changes,
    )
    monkeypatch.setattr(machine_code, "cases", lambda family: {"case": case})
    return machine_code.row("any", "case", arch)


def test_what_counts_as_a_problem(monkeypatch):
    assert problems(monkeypatch, _copy, 256)["problems"] == []
    spilling = problems(monkeypatch, _copy, 8192, num_warps=1)
    assert spilling["spills"] > 0 and any("spills" in problem for problem in spilling["problems"])
    assert "budget 4" in problems(monkeypatch, _copy, 256, max_registers=4)["problems"][0]
    assert problems(monkeypatch, _copy, 256, is_matmul=True)["problems"] == ["no tensor-core instruction"]
    assert "does not compile" in problems(monkeypatch, _wrong, 256)["problems"][0]


@pytest.mark.parametrize(("arch", "unit"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA"), (120, "HMMA")])
def test_products_use_the_matrix_units(monkeypatch, arch, unit):
    row = problems(monkeypatch, _product, 64, arch, "*bf16", is_matmul=True, warpgroup=True)
    assert row["problems"] == [] and unit in row["tensor_core"]
    if arch == 90:
        assert problems(monkeypatch, _product, 32, arch, "*bf16", is_matmul=True, warpgroup=True)["problems"] == [
            "no wgmma instruction"
        ]
    assert problems(monkeypatch, _product, 64, arch, "*bf16", is_matmul=True, max_shared=8)["problems"]
