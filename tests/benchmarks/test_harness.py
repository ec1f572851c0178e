"""The kernel benchmarks' harness: no speed without a check, rows that a script can read."""

import json
import sys

import harness
import pytest
import torch
from harness import Bench, Case

from kinetok.runtime.bench import clock

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Limits that need no measuring, and a cache of a page."""
    monkeypatch.setattr(clock, "CPU_FLUSH", 4096)
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(harness, "matmul_rate", lambda device, dtype: 1e11)


def bench(ours, size=16, work=0, **changes) -> Bench:
    def build(size, device):
        x = torch.randn(size, size, device=device)
        case = {"ours": ours, "eager": lambda x: x @ x, "moved": 8 * size**2, "work": work, "tolerance": 1e-5}
        return Case(args=(x,), **{**case, **changes})

    return Bench("square", {"small": size, "large": 2 * size}, build)


def row(*args, **changes):
    return harness.measure(bench(*args, **changes), "small", CPU, seconds=0.001, compiled=False)


def test_a_right_route_gets_rates_and_ratios():
    found = row(lambda x: x @ x, library={"einsum": lambda x: torch.einsum("ij,jk->ik", x, x)})
    assert found["check"]["passed"] and found["check"]["error"] < 1e-5
    assert set(found["ms"]) == {"ours", "eager", "einsum"} and set(found["faster_than"]) == {"eager", "einsum"}
    assert all(cuts["p20"] <= cuts["p50"] <= cuts["p80"] for cuts in found["ms"].values())
    assert found["best_library"] == "einsum" and found["bound"] == "copy"
    seconds = found["ms"]["ours"]["p50"] / 1e3
    assert found["share_of_limit"] == pytest.approx(8 * 16**2 / 1e10 / seconds)
    assert found["gb_per_s"] == pytest.approx(8 * 16**2 / seconds / 1e9)
    assert "of copy" in harness.text_of(found)
    bound = row(lambda x: x @ x, work=10**9)
    assert bound["bound"] == "matmul" and "TFLOP/s = " in harness.text_of(bound)


def test_a_library_that_fails_is_left_out_and_says_why():
    def broken(x):
        raise RuntimeError("no kernel for this card")

    found = row(lambda x: x @ x, library={"broken": broken, "einsum": lambda x: torch.einsum("ij,jk->ik", x, x)})
    assert found["left_out"] == {"broken": "RuntimeError: no kernel for this card"}
    assert set(found["faster_than"]) == {"eager", "einsum"} and found["best_library"] == "einsum"
    assert "broken left out" in harness.text_of(found)
    with pytest.raises(RuntimeError, match="no kernel"):
        row(broken, eager=lambda x: x @ x)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x @ x + 1e-3,
        lambda x: (x @ x)[:-1],
        lambda x: (x @ x, x),
        lambda x: torch.full_like(x, torch.nan),
        lambda x: torch.empty_like(x),  # an output that nobody wrote
    ],
)
def test_a_wrong_route_gets_no_speed(wrong):
    found = row(wrong, work=10)
    assert not found["check"]["passed"]
    assert found["gb_per_s"] is found["tflop_per_s"] is found["share_of_limit"] is None and not found["faster_than"]
    assert "FAILED" in harness.text_of(found)
    json.loads(json.dumps(found), parse_constant=pytest.fail)  # no NaN in the file


def test_whole_numbers_agree_exactly_or_in_a_share():
    sort = {"eager": lambda x: x.argsort(1), "exact": lambda x: x.argsort(1)}

    def one_off(x):
        order = x.argsort(1)
        order[0, 0] += 1
        return order

    assert row(lambda x: x.argsort(1), tolerance=0, **sort)["check"]["passed"]
    assert not row(one_off, tolerance=0, **sort)["check"]["passed"]
    assert row(one_off, tolerance=0.01, **sort)["check"]["passed"]


def test_the_command_line_writes_whole_rows_and_fails_with_a_wrong_one(monkeypatch, tmp_path, capsys):
    def run(*arguments, of):
        monkeypatch.setattr(
            sys, "argv", ["bench", "--json", str(tmp_path / "x.json"), "--seconds", "0.001", *arguments]
        )
        with pytest.raises(SystemExit) as ended:
            harness.main(of)
        return ended.value.code, json.loads((tmp_path / "x.json").read_text())

    code, found = run("--no-compile", "--device", "cpu", of=bench(lambda x: x @ x))
    assert not code and found["schema"] == harness.SCHEMA
    assert [row["size"] for row in found["rows"]] == ["small", "large"]
    assert {"device", "torch", "commit", "python"} <= set(found["machine"])
    code, found = run("--no-compile", "--quick", "--device", "cpu", of=bench(lambda x: x))
    assert code and [row["size"] for row in found["rows"]] == ["small"]
    assert "FAILED" in capsys.readouterr().out


def test_sizes_for_a_cpu_and_in_short():
    sizes = {"a": 1, "b": 2, "c": 3}
    assert Bench("op", sizes, bench).names(CPU) == ["a", "b", "c"]
    assert Bench("op", sizes, bench, cpu=("b", "c")).names(CPU, quick=True) == ["b"]
    assert Bench("op", sizes, bench, cpu=("b", "c"), quick=("a", "c")).names(CPU, quick=True) == ["c"]
    assert Bench("op", sizes, bench, cpu=("b",)).names(torch.device("cuda")) == ["a", "b", "c"]
