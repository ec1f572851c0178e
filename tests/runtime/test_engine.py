"""The engine with the default model: shapes, seeds, independence, and that the first three sentences are what they say."""

import numpy as np
import pytest
import torch

import kinetok
from kinetok.errors import UserError
from kinetok.model.bank import BankedEncoder
from kinetok.motion.quality import travelled


@pytest.fixture(scope="module")
def engine() -> kinetok.Engine:
    return kinetok.load(device="cpu")


def test_a_clip_is_as_long_as_asked_and_starts_facing_z(engine) -> None:
    (motion,) = engine.generate("a person walks forward", seconds=2.0)
    assert motion.joints.shape == (60, 22, 3) and motion.rotations.shape == (60, 22, 3, 3)
    assert motion.root.shape == (60, 3) and motion.features.shape == (60, 272) and motion.fps == 30
    assert motion.text == "a person walks forward"
    assert set(engine.timings) == {"text", "decode", "detokenize", "motion"}
    facing = motion.rotations[0, 0] @ [0, 0, 1]
    assert facing[2] > 0.7


def test_the_seed_and_the_place_name_the_clip(engine) -> None:
    text = "a person jumps"
    first, second = engine.generate([text, text], seconds=2, seed=3)
    again = engine.generate(["a person runs", text], seconds=2, seed=3)[1]
    np.testing.assert_array_equal(second.features, again.features)
    assert not np.array_equal(first.features, second.features)
    assert not np.array_equal(first.features, engine.generate(text, seconds=2, seed=4)[0].features)


def test_max_tokens_and_params_with_keywords(engine) -> None:
    params = kinetok.SamplingParams(max_tokens=20, seed=5)
    assert len(engine.generate("a person walks", params)[0]) <= 40
    assert len(engine.generate("a person walks", params, seconds=1, max_tokens=10)[0]) == 20


def test_standing_walking_and_running_differ(engine) -> None:
    texts = ["a person stands still", "a person walks forward", "a person runs"]
    clips = [engine.generate(text, seconds=4, seed=s)[0] for text in texts for s in range(2)]
    for clip in clips:
        joints = clip.joints
        assert joints[:, 15, 1].min() > 1.0 and -0.12 < joints[..., 1].min() < 0.12  # upright, on the floor
    path = [travelled(clip.joints) for clip in clips]
    assert max(path[:2]) < 1.0 < min(path[2:4]) < max(path[2:4]) < min(path[4:])


def test_banked_prompts_need_no_text_encoder(engine, monkeypatch) -> None:
    def absent(spec):
        raise UserError("no encoder here")

    monkeypatch.setattr("kinetok.model.bank.text_encoder", absent)
    fresh = BankedEncoder(engine.text.bank, engine.text.spec, engine.text.dim)
    assert fresh.encode(["a person walks forward", ""])[0].dtype == torch.float32
    with pytest.raises(UserError, match="no encoder"):
        fresh.encode(["a person walks to the moon"])


@pytest.mark.parametrize(
    ("prompt", "keywords", "says"),
    [
        ("", {}, "empty"),
        (" \t\n", {}, "empty"),
        ("x" * 100_000, {}, "10000"),
        ("a \ud800 b", {}, "U\\+D800"),
        ("walk", {"seconds": -1}, "seconds"),
        ("walk", {"seconds": 1e9}, "seconds"),
        ("walk", {"speed": 2}, "speed"),
    ],
)
def test_bad_requests(engine, prompt: str, keywords: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        engine.generate(prompt, **keywords)


def test_unknown_models(tmp_path) -> None:
    with pytest.raises(UserError, match="unknown model"):
        kinetok.load("no-such-model")
    with pytest.raises(UserError, match="kinetok"):
        kinetok.load(tmp_path)
