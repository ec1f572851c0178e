"""The small recipes from clips to a model, with pictures on the way; and that these change nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import kinetok
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.text_minilm import PACKAGE
from kinetok.motion import Motion
from kinetok.train import decoder, recipes, tokenizer
from kinetok.train.data.store import read_clips
from kinetok.train.finetune import finetune

pytest.importorskip("tensorboard", reason="training logs to tensorboard, which is not installed")
pytest.importorskip("PIL", reason="samples are drawn with pillow, which is not installed")
pytest.importorskip(PACKAGE, reason="captions need MiniLM, whose weights are not installed")
CAPTIONS = {"a": "a person sways", "b": "a person bows", "c": "somebody sways"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes called mini, at toy size."""
    config = TokenizerConfig(nb_code=256, code_dim=8, width=8, depth=1, patcher="none", causal=True)
    mini = recipes.mini_tokenizer()
    loop = replace(mini.loop, steps=4, validate_every=4, save_every=4)
    small = replace(mini, model=config, loop=loop, frames=64, windows=((32, 1.0),))
    monkeypatch.setitem(recipes.TOKENIZER_RECIPES, "mini", lambda: small)
    plain = recipes.mini_decoder()
    model = DecoderConfig(n_layer=1, n_head=2, n_embd=32, codebook=config.codebook, text_dim=384, tie_weights=True)
    loop = replace(plain.loop, steps=4, warmup=2, validate_every=4, save_every=4)
    monkeypatch.setitem(
        recipes.DECODER_RECIPES, "mini", lambda: replace(plain, model=model, loop=loop, batch=4, min_seconds=0.5)
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "samples").iterdir()}


def test_from_clips_to_a_model(motion_set, small: None, tmp_path: Path) -> None:
    data = motion_set(tmp_path / "data", CAPTIONS, {"a": "train", "b": "train", "c": "val"})
    tokens = tokenizer.train(data=data, out=tmp_path / "tokenizer", sample_every=2)
    assert names(tmp_path / "tokenizer") == {
        f"{name}-0.{suffix}" for name in ("clip", "step-00000002", "step-00000004") for suffix in ("png", "npz")
    }
    shown = Motion.load(tmp_path / "tokenizer" / "samples" / "clip-0.npz")
    held_out = next(clip for clip in read_clips(data) if clip.split == "val")
    assert shown.text == "c" and len(shown) == len(held_out.features)
    wanted = Motion.from_features(held_out.features, offsets=shown.offsets)
    np.testing.assert_allclose(shown.rotations, wanted.rotations, atol=1e-4)

    words = {"data": data, "tokenizer": tokens}
    model = decoder.train(out=tmp_path / "decoder", sample_every=2, **words)
    assert names(tmp_path / "decoder") == {
        f"step-{step:08d}-0.{suffix}" for step in (2, 4) for suffix in ("png", "npz")
    }
    assert Motion.load(tmp_path / "decoder" / "samples" / "step-00000004-0.npz").text == "somebody sways"
    assert len(kinetok.load(model, device="cpu").generate("a person sways", seconds=1.0)[0]) == 30
    decoder.train(out=tmp_path / "without", **words)
    one, other = (
        torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("decoder", "without")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)

    finetune(init=model, data=data, out=tmp_path / "tuned", steps=1, sample_every=1)
    assert "step-00000001-0.png" in names(tmp_path / "tuned")
