"""Every kernel benchmark at a tiny size on a CPU: its routes run, and ours passes its check. No time is looked at."""

import importlib
import sys
from pathlib import Path

import harness
import pytest
import torch
from harness import Bench

CPU = torch.device("cpu")
FOLDER = Path(harness.__file__).parent
HALF = (7, 5)
TINY = {
    "attention": {
        "prefix_attention": (2, 3, 7, 2, 8),
        "prefix_attention, gradients": (2, 3, 7, 2, 8),
        "decode_attention": (2, 5, 2, 8, "plain"),
    },
    "cross_entropy": {"linear_cross_entropy": (9, 33, 16)},
    "detokenizer": {
        "fsq_conv": (2, 7, 16, (8, 6, 5), (2, 0)),
        "conv_idwt": (2, 7, 16, 1, (1, 1), 6),
    },
    "fsq": {
        "fsq_encode": (33, 16, HALF),
        "fsq_encode, perplexity": (33, 16, HALF),
        "fsq_decode": (33, 16, HALF),
        "fsq_quantize": (33, 2, HALF),
    },
    "gating": {"swiglu": (3, 16), "swiglu, gradients": (3, 16)},
    "kinematics": {"pose_from_features": (2, 9)},
    "linear": {"linear": ("default", "qkv", 2, "float", 0)},
    "norm": {"rms_norm": (3, 16), "add_rms_norm": (3, 16), "rms_norm, gradients": (3, 16)},
    "rotary": {"apply_rotary": (2, 5, 2, 8), "rotary_kv_write": (2, 1, 2, 8)},
    "sampling": {"sample_step": (3, 50, 5, 0.9), "greedy_step": (2, 50, 16)},
    "wavelet": {"dwt": (2, 8, 3, "haar", 2, True), "idwt": (2, 8, 3, "db2", 1, False)},
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Limits that need no measuring, and a cache of a page."""
    monkeypatch.setattr(sys.modules[harness.Clock.__module__], "CPU_FLUSH", 4096)
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(harness, "matmul_rate", lambda device, dtype: 1e11)


def benches(name: str) -> dict[str, Bench]:
    module = importlib.import_module(f"bench_{name}")
    return {value.op: value for value in vars(module).values() if isinstance(value, Bench)}


def test_every_operator_family_has_its_benchmark() -> None:
    files = {path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")}
    families = {path.parent.name for path in (FOLDER.parents[1] / "kernels").glob("*/reference.py")}
    assert files == families == set(TINY)
    script = (FOLDER.parent / "run_gpu.sh").read_text()
    listed = next(line for line in script.splitlines() if line.startswith("OPS=("))
    assert set(listed.removeprefix("OPS=(").removesuffix(")").split()) == files


@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_runs(name: str) -> None:
    found = benches(name)
    assert set(found) == set(TINY[name])
    for op, bench in found.items():
        assert bench.names(CPU, quick=True) or bench.cpu is not None
        tiny = Bench(op, {"tiny": TINY[name][op]}, bench.build)
        row = harness.measure(tiny, "tiny", CPU, seconds=1e-6, compiled=False)
        assert row["check"]["passed"], harness.text_of(row)
        assert row["faster_than"]["eager"] > 0 and row["share_of_limit"] > 0
        assert f"{op} " in harness.text_of(row)


def test_the_goals_on_a_cpu_name_routes_that_there_are() -> None:
    goals = importlib.import_module("cpu_goals")
    assert [(bench.op, goal) for bench, _, _, goal in goals.GOALS if goal] == [("fsq_encode", 10.0), ("dwt", 3.0)]
    for bench, size, other, goal in goals.GOALS:
        if other == "PyWavelets":
            pytest.importorskip("pywt", reason="PyWavelets is the other route")
        tiny = Bench(bench.op, {size: TINY["wavelet" if "dwt" in bench.op else "fsq"][bench.op]}, bench.build)
        row = goals.measure(tiny, size, other, goal, 2)
        assert row["check"]["passed"] and set(row["faster"]) == {"wall", "cpu"} and row["goal"] == goal
        assert "times as fast as" in goals.text_of(row)
