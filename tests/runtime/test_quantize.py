"""The report that gates a quantised model: perfect for the model itself, bad for another, and what is refused."""

import numpy as np
import pytest
import torch

import kinetok
from kinetok.errors import UserError
from kinetok.model.packed import PackedLinear, Quantisation, quantise
from kinetok.model.pretrained import load_pretrained, save_pretrained
from kinetok.runtime import engine as engines
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


@pytest.mark.parametrize("room", [True, False])
def test_a_directory_generates_streams_and_crowds(default, tmp_path, monkeypatch, room: bool) -> None:
    """Unpacked at load where the memory is there, and otherwise packed; the same motion either way."""
    wanted = Quantisation(kind="int8")
    folder = save_pretrained(
        tmp_path / "int8",
        tokenizer=default.tokenizer,
        decoder=quantise(default.decoder, wanted),
        mean=default.mean,
        std=default.std,
        skeleton_offsets=default.offsets,
        text_encoder=default.text_encoder,
        sampling=default.sampling,
        bank=default.bank,
        quantisation=wanted,
    )
    if not room:
        monkeypatch.setattr(engines, "bytes_available", lambda device: 10**6)
    engine = kinetok.load(folder, "cpu", characters=2)
    about = engine.describe()
    assert isinstance(engine.model.decoder.blocks[0].qkv, torch.nn.Linear if room else PackedLinear)
    assert about["quantisation"] == "int8" and (room or "unpacked at every step" in about["backend_reason"])
    clip = engine.generate("a person runs", seconds=1, seed=1)[0]
    streamed = np.concatenate([block.features for block in engine.stream("a person runs", seconds=1, seed=1)])
    handle = engine.submit("a person runs", seconds=1, seed=1)
    while engine.step():
        pass
    for features in (streamed, engine.poll(handle).motion.features):
        np.testing.assert_allclose(features, clip.features, atol=1e-5)
    exact = kinetok.load(device="cpu").generate("a person runs", seconds=1, seed=1)[0]
    assert 1 < np.linalg.norm(clip.root[-1]) < 6 and 1 < np.linalg.norm(exact.root[-1]) < 6  # both run
