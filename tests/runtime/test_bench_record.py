"""Result files of ``kinetok bench``: the schema holds, damaged files are refused, a regression is found and noise is none."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.runtime.bench import record, schema

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MACHINE = {"device": "a", "torch": "2", "python": "3", "platform": "p", "commit": None}
LIMITS = {"copy_gb_per_s": 1.0, "read_gb_per_s": 1.0, "matmul_tflop_per_s": 1.0}
NAMED = {"kind": "tokenizer", "model": "default", "dtype": "fp32", "kv": "none", "batch": 1, "tokens": 50}
FIGURES = {
    **{"route": "decode", "threads": 1, "load_s": 0.1, "peak_memory_bytes": None, "steady_memory_bytes": 3},
    **{"frames_per_s": 1.0, "real_time_factor": 1.0, "mfu": 0.5, "check": {"passed": True}},
    **{f"{share}_e2el_ms": 1.0 for share in schema.SHARES},
}
ROW = {**NAMED, **FIGURES}


def report(*seconds: float, **changes) -> dict:
    return {
        **{"format": "kinetok-bench", "schema": 2, "note": "", "machine": MACHINE, "measured": LIMITS},
        **{"parameters": 1, "rows": [{**ROW, "seconds": list(seconds), **changes}], "cannot_run": []},
    }


@pytest.mark.parametrize(
    ("before", "after", "regression"),
    [
        ((1, 1, 1, 1, 1), (1.02, 1.02, 1.02, 1.02, 1.02), False),  # within the least noise
        ((1, 1, 1, 1, 1), (1.1, 1.1, 1.1, 1.1, 1.1), True),
        ((1, 1, 1, 1, 1), (0.5, 0.5, 0.5, 0.5, 0.5), False),
        ((0.9, 0.95, 1, 1.05, 1.2), (1.0, 1.0, 1.1, 1.1, 1.2), False),  # within what the repeats vary
        ((1, 1, 1, 1, 9), (1.2, 1.2, 1.2, 1.2, 9), True),  # one slow repeat is not noise enough
        ((0.5, 0.5, 1, 1.6, 1.6), (20, 20, 40, 64, 64), True),  # noise of more than the whole hides no forty-fold
    ],
)
def test_compare(before: tuple, after: tuple, regression: bool) -> None:
    (found,) = record.compare(report(*before), report(*after))
    assert found["regression"] is regression and found["ratio"] == pytest.approx(sorted(before)[2] / sorted(after)[2])


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=9), st.floats(0.01, 100))
def test_a_file_is_no_regression_of_itself_and_ratios_turn_round(seconds: list[float], factor: float) -> None:
    (same,) = record.compare(report(*seconds), report(*seconds))
    assert same["ratio"] == 1 and not same["regression"]
    scaled = [factor * value for value in seconds]
    (there,), (back,) = (record.compare(report(*a), report(*b)) for a, b in ((seconds, scaled), (scaled, seconds)))
    assert there["ratio"] * back["ratio"] == pytest.approx(1) and there["noise"] == pytest.approx(back["noise"])
    assert not (there["regression"] and back["regression"])


@pytest.mark.parametrize("change", [{"tokens": 150}, {"kv": "fp8"}, {"context": 30}, {"text": 9}])
def test_compare_needs_a_row_in_common(change) -> None:
    with pytest.raises(UserError, match="no row in common"):
        record.compare(report(1, 1), report(1, 1, **change))


def broken(**changes):
    return lambda found: json.dumps({**found, **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: "{", "no JSON"),
        (lambda found: "[" * 100_000, "no JSON"),
        (lambda found: json.dumps([found]), "expected a result file"),
        (broken(format="other"), "expected a result file"),
        (broken(schema=1), "schema 2, got 1; measure anew"),
        (broken(machine=[]), "machine: expected object, got"),
        (broken(machine={}), "machine lacks device"),
        (broken(rows={}), "rows: expected array"),
        (broken(rows=[{}]), "rows, number 1 lacks kind"),
        (broken(rows=[ROW]), "lacks seconds"),
        (broken(rows=[{**ROW, "seconds": [1.0]}]), "seconds: expected at least 2 values"),
        (broken(rows=[{**ROW, "seconds": [0, 1]}]), "number 1: expected more than 0, got 0"),
        (broken(rows=[{**ROW, "seconds": [1, float("nan")]}]), "number 2: expected more than 0, got nan"),
        (broken(rows=[{**ROW, "seconds": [1, 2], "batch": True}]), "batch: expected integer, got True"),
        (broken(rows=[{**ROW, "seconds": [1, 2], "kind": "race"}]), "kind: expected one of"),
        (broken(rows=[{**ROW, "seconds": [1, 2], "kind": "crowd"}]), "number 1 lacks output_throughput"),
        (broken(rows=[{**ROW, "seconds": [1, 2], "check": {"passed": False}}]), "passed: expected True"),
        (broken(cannot_run=[{"route": "hf"}]), "cannot_run, number 1 lacks batch"),
    ],
)
def test_bad_files(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(change(report(1, 1)))
    with pytest.raises(UserError) as refused:
        record.read(path)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_write_and_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    record.write(path, report(1, 2))
    assert record.read(path) == report(1, 2)
    with pytest.raises(AssertionError, match="lacks seconds"):
        record.write(path, {**report(1, 2), "rows": [ROW]})
    assert record.read(path) == report(1, 2)
    with pytest.raises(UserError, match="cannot read"):
        record.read(tmp_path / "none.json")


def test_every_required_figure_is_described() -> None:
    described = set(schema.ROW["properties"])
    for kind in schema.ROW["allOf"]:
        assert set(kind["then"]["required"]) <= described
    assert set(schema.KEY) <= described


def test_committed_results_keep_to_the_schema() -> None:
    found = [path for path in RESULTS.glob("*.json") if schema.FORMAT in path.read_text()[:200]]
    assert found
    for path in found:
        rows = record.read(path)["rows"]
        assert rows and all(len(row["seconds"]) >= 5 for row in rows), path
        keys = [record.key_of(row) for row in rows]
        assert len(set(keys)) == len(keys), path


def test_the_schema_leaves_its_input_alone() -> None:
    one = report(1, 2)
    before = copy.deepcopy(one)
    assert schema.violation(one, schema.REPORT) is None and one == before
