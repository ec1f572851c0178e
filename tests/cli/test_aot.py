"""``kinetok aot``: a real kernel through the command, and what counts as a problem."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed, so there is no compiler to test")

from kinetok.cli import aot


@pytest.fixture(scope="module")
def rows() -> dict:
    """The rows of aot_kernels.py by name."""
    program = Path(__file__).with_name("aot_kernels.py")
    run = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_kernel_compiles_and_its_table_comes_back(kinetok, tmp_path):
    table = tmp_path / "table.json"
    done = kinetok("aot", "--op", "rms_norm_d192", "--arch", "sm_80", "--arch", "sm_120", "--json", table)
    assert done.code == 0 and "rms_norm_d192" in done.out and "0 problems" in done.out, done
    written = json.loads(table.read_text())
    assert [row["arch"] for row in written["rows"]] == ["sm_80", "sm_120"]
    for row in written["rows"]:
        assert 16 <= row["registers"] <= 255 and row["spills"] == 0 and row["problems"] == []
    assert len(table.read_text().splitlines()) == 4  # a row a line

    assert kinetok("aot", "--op", "rms_norm_d192", "--arch", "sm_80", "--check", table).code == 0
    written["rows"][0]["registers"] = 3
    table.write_text(json.dumps(written))
    again = kinetok("aot", "--op", "rms_norm_d192", "--arch", "sm_80", "--check", table, "--json", table)
    assert again.code == 1 and "1 differences" in again.out  # though nothing is wrong with the kernel
    assert "changed: rms_norm_d192 sm_80: registers 3 -> " in again.out and "gone" not in again.out
    mended = json.loads(table.read_text())["rows"]
    assert mended[0]["registers"] > 3 and mended[1] == written["rows"][1]  # what was not compiled stays


def test_quick_takes_each_kernel_once_on_each_architecture(monkeypatch):
    from kinetok.kernels import machine_code

    def case(name, kernel, *architectures):
        return machine_code.AotCase(name=name, kernel=kernel, signature={}, constexprs={}, architectures=architectures)

    one, other = object(), object()
    cases = [case("a", one, 80), case("b", one), case("c", other)]
    monkeypatch.setattr(machine_code, "cases", lambda family: {some.name: some for some in cases})
    firsts = [(name, arch) for _, name, arch, first in machine_code.names(["any"]) if first]
    assert firsts == [
        ("a", 80),
        *(("b", arch) for arch in (89, 90, 100, 120)),
        *(("c", n) for n in machine_code.SHARED_LIMIT),
    ]


def test_bad_input_is_one_line(refused, tmp_path, monkeypatch):
    assert "sm_80, sm_89, sm_90" in refused("aot", "--arch", "sm_70", "--op", "norm")
    assert "norm" in refused("aot", "--op", "nothing")
    assert "cannot read the table" in refused("aot", "--check", tmp_path / "none.json")
    for text in ("{", "[]", '{"schema": 1, "triton": 3, "rows": []}', '{"schema": 99, "triton": "3", "rows": []}'):
        (tmp_path / "bad.json").write_text(text)
        assert "expected a table" in refused("aot", "--check", tmp_path / "bad.json")
    (tmp_path / "old.json").write_text('{"schema": 1, "triton": "1.0", "rows": []}')
    assert "got one of triton 1.0" in refused("aot", "--check", tmp_path / "old.json")

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(aot, "version", missing)
    assert "triton" in refused("aot") and "kinetok[gpu]" in refused("aot")


def test_a_problem_ends_with_1_and_says_which(kinetok, monkeypatch):
    row = {"kernel": "k", "arch": "sm_90", "warps": 4, "registers": 255, "spills": 8, "shared": 0, "tensor_core": {}}
    monkeypatch.setattr(aot, "_compile", lambda *_: (set(), set(), [{**row, "problems": ["spills 8 bytes"]}]))
    done = kinetok("aot")
    assert done.code == 1 and "FAILED k sm_90: spills 8 bytes" in done.out


def test_rows_that_come_and_go_are_named():
    old, new = [{"kernel": "a", "arch": "sm_80", "x": 1}], [{"kernel": "b", "arch": "sm_80", "x": 1}]
    key = {("b", "sm_80")}
    assert list(aot._changes(old, new, key)) == ["new: b sm_80"]
    assert list(aot._changes(old, [], key)) == ["new: b sm_80"]  # though --quick did not compile it
    assert list(aot._gone(old, key)) == ["gone: a sm_80"]
    assert list(aot._changes(old, old, {("a", "sm_80")})) == list(aot._gone(new, key)) == []


def test_what_counts_as_a_problem(rows):
    assert rows["fine"]["problems"] == []
    assert rows["spilling"]["spills"] > 0 and rows["spilling"]["problems"][0].startswith("spills")
    assert "budget 4" in rows["registers"]["problems"][0]
    assert rows["no_unit"]["problems"] == ["no tensor-core instruction"]
    assert "does not compile" in rows["wrong"]["problems"][0]
    assert rows["narrow"]["problems"] == ["no wgmma instruction"]
    assert "bytes of shared memory, budget 8" in rows["shared"]["problems"][0]


@pytest.mark.parametrize(("arch", "unit"), [(80, "HMMA"), (89, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA"), (120, "HMMA")])
def test_products_use_the_matrix_units(rows, arch, unit):
    row = rows[f"product_{arch}"]
    assert row["problems"] == [] and unit in row["tensor_core"]
