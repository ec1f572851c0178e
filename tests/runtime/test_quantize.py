"""The report that gates a quantised model: perfect for the model itself, bad for another, and what is refused."""

import pytest
import torch

from kinetok.errors import UserError
from kinetok.model.packed import Quantisation, quantise
from kinetok.model.pretrained import load_pretrained
from kinetok.runtime import quantize as gate
from kinetok.runtime.quantize import BOUNDS, Bounds, failures, measure, quantize


@pytest.fixture(scope="module")
def default():
    return load_pretrained(None, "cpu")


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    monkeypatch.setattr(gate, "PROMPTS", 2)


def test_a_model_agrees_with_itself(default) -> None:
    found = measure(default, default.decoder, 8)
    assert found["agreement"] == 1 and found["logit_error"] == found["mpjpe_mm"] == 0 and found["jerk_ratio"] == 1
    assert found["positions"] == 16 and failures(found) == []


def test_int8_is_accepted_and_noise_is_not(default) -> None:
    made, found = quantize(default, Quantisation(kind="int8"))
    assert failures(found) == [] and 0 < found["logit_error"] < 0.05 and found["agreement"] > 0.9
    assert made.quantisation == Quantisation(kind="int8") and default.quantisation is None
    with pytest.raises(UserError, match="quantised already"):
        quantize(made, Quantisation(kind="int8"))
    noisy = quantise(default.decoder, Quantisation(kind="int8"))
    torch.manual_seed(0)
    for block in noisy.blocks:
        block.down.packed_words.random_()
    bad = measure(default, noisy, 8)
    assert bad["logit_error"] > 0.2 and bad["agreement"] < 0.9 and bad["mpjpe_mm"] > 0
    assert "agreement" in failures(bad)[0] and len(failures(bad)) >= 2


def test_bounds_by_hand() -> None:
    fine = {"agreement": 0.95, "logit_error": 0.1, "mpjpe_mm": 20.0, "jerk_ratio": 1.25}
    assert failures(fine) == []
    assert len(failures(dict.fromkeys(fine, float("nan")))) == 4
    for name, worse in (("agreement", 0.94), ("logit_error", 0.11), ("mpjpe_mm", 21.0), ("jerk_ratio", 0.7)):
        assert len(failures({**fine, name: worse})) == 1
    assert Bounds() == BOUNDS and len(failures(fine, Bounds(agreement=0.99))) == 1
