"""The benchmarks of training at a tiny size on a CPU: what they check, and what they say. No time is looked at."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kinetok.model.config import DecoderConfig
from kinetok.train.scale import Engine

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = DecoderConfig(n_layer=1, n_head=2, n_embd=16, codebook=100, text_dim=8)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "train"))

    def module(name: str) -> ModuleType:
        found = importlib.import_module(name)
        if name == "bench_train":
            monkeypatch.setattr(found, "matmul_rate", lambda device, dtype: 1e11)
            monkeypatch.setattr(found, "reset_peak", lambda device: None)
        return found

    return module


def test_a_step_and_its_parts(load) -> None:
    bench = load("bench_train")
    row = bench.step_row("tiny", TINY, 3, Engine(checkpointing=True), 2, CPU, True)
    assert row["passed"] and len(row["losses"]) == 6 and "goal" not in row and row["mfu_of_peak"] is None
    assert sum(row["share_of_step"].values()) == pytest.approx(1) and set(row["share_of_step"]) == set(bench.PARTS)
    assert row["mfu"] == pytest.approx(row["flop_per_second"] / 1e11) and row["useful_tokens_per_second"] > 0
    assert {name for name, *_ in bench.GPU_ROWS} >= {"1B", "7B, 8 of 36 layers"}


@pytest.mark.parametrize(
    ("name", "rate"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("T4", None)]
)
def test_a_card_is_known_by_its_name(load, monkeypatch, name: str, rate: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert load("bench_train").peak_rate(torch.device("cuda")) == rate


def test_the_fused_loss_beside_the_plain_one(load, monkeypatch) -> None:
    bench = load("bench_train")
    used = {"plain": {"peak": 0, "logits": 100}, "fused": {"peak": 0, "logits": 5}}
    monkeypatch.setattr(bench, "memory_of_routes", lambda *sizes: used)
    row = bench.loss_row("tiny", 33, 100, 16, 1, CPU)
    assert row["passed"] and row["freed"] == 0.95 and row["goal"] == {"freed": 0.9, "time": 1.15}
    assert row["met"] == (row["time"] <= 1.15)


def test_packed_and_padded_are_the_same_before_they_are_timed(load, monkeypatch) -> None:
    bench = load("bench_packing")
    monkeypatch.setattr(bench, "BATCH", 2)
    row = bench.measure("tiny", TINY, 1, CPU)
    assert row["passed"] and row["padded"] == 602 and row["useful"] < 400 and row["faster"] > 0
    right = bench.next_token_loss
    monkeypatch.setattr(bench, "next_token_loss", lambda *args: 1.01 * right(*args))
    wrong = bench.measure("tiny", TINY, 1, CPU)
    assert not wrong["passed"] and wrong["faster"] is None
