"""Fine-tuning at toy size: what is kept, what is learned, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import kinetok
from kinetok.errors import UserError
from kinetok.model.bank import PromptBank
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.pretrained import ModelBundle, load_pretrained, save_pretrained
from kinetok.model.text_minilm import PACKAGE
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion.skeleton import CANONICAL_OFFSETS
from kinetok.train.data.store import Clip, read_clips
from kinetok.train.decoder import TEXT_ENCODER
from kinetok.train.finetune import finetune, finetuning_recipe, hold_out

pytest.importorskip("tensorboard", reason="training logs to tensorboard, which is not installed")
pytest.importorskip(PACKAGE, reason="captions need MiniLM, whose weights are not installed")
CAPTIONS = {"a": "the mascot lifts its left hand", "b": "a person bows", "c": "the mascot lifts its left hand"}


@pytest.fixture
def data(motion_set, tmp_path: Path) -> Path:
    """c moves as a does, and is called so."""
    return motion_set(tmp_path / "data", CAPTIONS, {"a": "train", "b": "train", "c": "val"})


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a tiny model with random weights and a bank of one prompt."""

    def build(**changes: object) -> Path:
        torch.manual_seed(0)
        tokenizer = TokenizerConfig(nb_code=256, code_dim=8, width=8, depth=1, patcher="none", causal=True)
        decoder = DecoderConfig(n_layer=1, n_head=2, n_embd=32, codebook=tokenizer.codebook, text_dim=384)
        folder = tmp_path_factory.mktemp("model")
        PromptBank({"": torch.ones(1, 384), "a person hops": torch.zeros(2, 384)}, name="x", dim=384).save(
            folder / "bank"
        )
        return save_pretrained(**{
            "out": folder / "tiny",
            "tokenizer": MotionTokenizer(tokenizer).eval(),
            "decoder": MotionDecoder(decoder).eval(),
            "mean": np.full(272, 0.01),
            "std": np.full(272, 0.1),
            "skeleton_offsets": CANONICAL_OFFSETS,
            "text_encoder": TEXT_ENCODER,
            "sampling": {"temperature": 0.7},
            "provenance": {"recipe": "toy"},
            "licence": "CC0",
            "bank": folder / "bank",
            **changes,
        })  # fmt: skip

    return build


@pytest.fixture(scope="session")
def model(make: Callable[..., Path]) -> Path:
    return make()


def distance(bundle: ModelBundle, clip: Clip) -> float:
    """Mean joint error of a clip sent through the tokenizer, relative to the pelvis, metres."""
    x = torch.from_numpy((clip.features - bundle.mean) / bundle.std).float()
    with torch.no_grad():
        y = bundle.tokenizer.decode(bundle.tokenizer.encode(x[None]))[0].double().numpy() * bundle.std + bundle.mean
    gap = (y - clip.features)[:, 8:74].reshape(-1, 22, 3)
    return float(np.linalg.norm(gap - gap[:, :1], axis=-1).mean())


def test_it_learns_and_keeps_the_rest(model: Path, data: Path, tmp_path: Path) -> None:
    tuned = finetune(init=model, data=data, out=tmp_path / "run", steps=60)
    # The held-out clip moves as a training clip does and is called the same, so its loss falls.
    assert tuned.step == 60 and tuned.after < 0.9 * tuned.before
    old, new = load_pretrained(model), load_pretrained(tuned.model)
    assert tuned.mpjpe_mm == pytest.approx(1e3 * np.mean([distance(new, clip) for clip in read_clips(data)]), rel=1e-6)
    for name, value in old.tokenizer.state_dict().items():
        assert torch.equal(value, new.tokenizer.state_dict()[name])
    np.testing.assert_array_equal(old.mean, new.mean)
    np.testing.assert_array_equal(old.std, new.std)
    assert new.text_encoder == old.text_encoder and new.sampling == old.sampling
    assert new.provenance["fine-tuned from"] == {"recipe": "toy"} and new.provenance["clips"] == 3
    assert "CC0" in new.licence
    engine = kinetok.load(tuned.model, device="cpu")
    assert set(engine.text.bank.prompts) == {"a person hops", *CAPTIONS.values()}
    assert len(engine.generate("the mascot lifts its left hand", seconds=1.0)[0]) == 30


def test_it_starts_from_the_given_weights(model: Path, data: Path, tmp_path: Path) -> None:
    tuned = finetune(init=model, data=data, out=tmp_path / "run", steps=1)
    old, new = (load_pretrained(path).decoder.state_dict() for path in (model, tuned.model))
    moved = max(float((new[name] - old[name]).abs().max()) for name in old)
    assert 0 < moved < 5e-3  # a step of AdamW at a thirtieth of the rate, and half precision on disk


def test_a_run_is_continued_or_refused(model: Path, make, data: Path, motion_set, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = finetune(init=model, data=data, out=run, steps=3)
    again = finetune(init=model, data=data, out=run, steps=3, resume=True)
    assert first == again
    with pytest.raises(UserError, match="--resume"):
        finetune(init=model, data=data, out=run, steps=3)
    other = motion_set(tmp_path / "other", CAPTIONS, {"a": "train", "b": "val", "c": "train"})
    with pytest.raises(UserError, match="other data"):
        finetune(init=model, data=other, out=run, steps=3, resume=True)
    with pytest.raises(UserError, match="another recipe"):
        finetune(init=model, data=data, out=run, steps=3, seed=5, resume=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"text_encoder": {"type": "flan-t5", "name": "google/flan-t5-xl"}},
            "takes models with the text encoder .*flan-t5",
        ),
        ({"text_encoder": {**TEXT_ENCODER, "pooled_scale": 0.0}}, "'pooled_scale': 0.0"),
        ({"skeleton_offsets": np.array(CANONICAL_OFFSETS) * 1.1}, "canonical skeleton"),
    ],
)
def test_other_models_are_refused(make: Callable[..., Path], data: Path, tmp_path: Path, changes, says: str) -> None:
    with pytest.raises(UserError, match=says):
        finetune(init=make(**changes), data=data, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("splits", [{"a": "val", "b": "val"}, {"a": "train"}, {"a": "test", "b": "test"}])
def test_splits_without_training_are_refused(model: Path, motion_set, tmp_path: Path, splits: dict[str, str]) -> None:
    with pytest.raises(UserError, match="expected"):
        finetune(init=model, data=motion_set(tmp_path / "few", CAPTIONS, splits), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def clip(number: int, split: str, flips: int = 0) -> Clip:
    x = np.zeros((30, 272), np.float32)
    return Clip(
        id=str(number), subject="", label="", split=split, captions=("a person walks",), heading_flips=flips, features=x,
        mirrored=x,
    )  # fmt: skip


@pytest.mark.parametrize(("count", "held"), [(2, 1), (14, 1), (15, 2), (40, 4)])
def test_the_last_tenth_is_held_out(count: int, held: int) -> None:
    split = hold_out([clip(i, "train") for i in range(count)] + [clip(99, "train", flips=2), clip(100, "test")])
    assert [c.id for c in split if c.split == "val"] == [str(i) for i in range(count - held, count)]
    assert [c.split for c in split].count("train") == count - held and "99" not in {c.id for c in split}


def test_given_validation_clips_are_kept() -> None:
    given = [clip(0, "val"), clip(1, "train"), clip(2, "train")]
    assert hold_out(given) == given
    with pytest.raises(UserError, match=r"got 1 \(1 more"):
        hold_out([clip(0, "train"), clip(1, "train", flips=1)])


def test_few_held_out_clips_do_not_choose() -> None:
    config = DecoderConfig(n_layer=1, n_head=2, n_embd=32, codebook=240, text_dim=384)
    assert [finetuning_recipe(config, 15.0, count).loop.keep for count in (1, 9, 10)] == ["last", "last", "best"]
    assert finetuning_recipe(config, 15.0, 1).max_seconds == 10.0
    assert finetuning_recipe(replace(config, block_size=211), 15.0, 1).max_seconds == 4.0
