"""The two trainings at toy size, end to end, and their parts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kinetok.errors import UserError
from kinetok.kernels.kinematics import heading_scan, matrix_from_6d
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion.features import HEADING_CHANGE, POSITIONS, from_motion, joints_from_positions
from kinetok.motion.skeleton import CANONICAL_OFFSETS
from kinetok.train import decoder as decoder_training
from kinetok.train.checkpoints import save_whole
from kinetok.train.data.store import Clip, matrices
from kinetok.train.decoder import load_tokenizer, other_subjects
from kinetok.train.losses import released_loss, world_steps
from kinetok.train.recipes import decoder_recipe, mini_tokenizer, tokenizer_recipe
from kinetok.train.tokenizer import TokenizerTask, draw_weights, save_tokenizer


def clip(number: int, split: str, label: str = "walk") -> Clip:
    rng = np.random.default_rng(number)
    x = rng.standard_normal((80, 272)).astype(np.float32).cumsum(0) * 0.05
    names = {"id": str(number), "subject": split, "label": label, "split": split, "captions": ("a person walks",)}
    return Clip(**names, heading_flips=0, features=x, mirrored=x[:, ::-1].copy())


def test_released_loss_is_the_golden_one(golden) -> None:
    with np.load(golden("losses.npz")) as z:
        pred = torch.from_numpy(z["pred"]).requires_grad_()
        loss = released_loss(pred, torch.from_numpy(z["target"]))
        loss.backward()
        assert float(loss) == pytest.approx(float(z["released_total"]), abs=1e-5)
        np.testing.assert_allclose(pred.grad, z["released_total_grad"], atol=1e-5)


def test_the_folded_tokenizer_computes_the_same() -> None:
    config = TokenizerConfig(nb_code=256, code_dim=12, width=16, depth=1, patcher="none", causal=True)
    recipe = replace(mini_tokenizer(), model=config, frames=128, windows=((64, 0.5), (32, 0.5)))
    task = TokenizerTask(recipe, [clip(0, "train"), clip(1, "train"), clip(2, "val")])
    optimizer = torch.optim.SGD(task.module.parameters(), lr=0.01)
    rng = np.random.default_rng(0)
    for step in range(3):
        optimizer.zero_grad()
        task.loss(step, rng)["loss"].backward()
        optimizer.step()
    figures = task.validate(task.module.eval())
    assert np.isfinite(list(figures.values())).all()
    frames = task._normal(task.held_out[0].features)[None]
    with torch.no_grad():
        pred, indices, _ = task.module(frames)
        folded = task.module.folded()
        assert torch.equal(folded.encode(frames), indices)
        torch.testing.assert_close(folded.decode(indices), pred, atol=1e-5, rtol=0)


def test_rare_labels_are_drawn_more_often_than_their_share() -> None:
    clips = [clip(i, "train", "idle") for i in range(9)] + [clip(9, "train", "kick")]
    weights = draw_weights(clips, -0.5)
    assert weights.sum() == pytest.approx(1) and 0.1 < weights[9] < 0.5


def test_empty_splits_and_unknown_recipes_are_named() -> None:
    with pytest.raises(UserError, match="train and val"):
        TokenizerTask(mini_tokenizer(), [clip(0, "train")])
    for read in (tokenizer_recipe, decoder_recipe):
        with pytest.raises(UserError, match="mini"):
            read("maxi")
    assert isinstance(decoder_recipe("mini").model, DecoderConfig)


def test_subjects_are_exchanged() -> None:
    assert "someone walks left" in other_subjects("The man walks left")
    assert other_subjects("walking") == ["walking"]


def test_the_shipped_model_is_the_recipe(tmp_path: Path) -> None:
    import kinetok

    model = kinetok.load(device="cpu").model
    assert model.tokenizer.config == tokenizer_recipe("mini").model
    assert model.decoder.config == decoder_recipe("mini").model


def test_steps_over_the_floor_are_those_of_the_joints_themselves() -> None:
    rng = np.random.default_rng(0)
    rotations = matrices(rng.standard_normal((12, 22, 3)).cumsum(0) * 0.1)
    root = rng.standard_normal((12, 3)).cumsum(0) * 0.05 + [0, 1, 0]
    x = from_motion(rotations, root, np.array(CANONICAL_OFFSETS))
    joints = joints_from_positions(x)  # in the world
    heading = heading_scan(matrix_from_6d(torch.from_numpy(x[:, HEADING_CHANGE]))).numpy()
    expected = np.einsum("tij,tkj->tki", heading[:-1], np.diff(joints, axis=0))
    local = torch.from_numpy(x[:, POSITIONS]).unflatten(-1, (22, 3))
    np.testing.assert_allclose(world_steps(local[None], torch.from_numpy(x)[None])[0], expected, atol=1e-9)


def test_the_decoder_loss_is_that_of_all_logits() -> None:
    torch.manual_seed(0)
    model = MotionDecoder(DecoderConfig(n_layer=1, n_head=2, n_embd=16, codebook=40, text_dim=6))
    tokens, targets = torch.randint(40, (3, 9)), torch.randint(41, (3, 9))
    targets[:, :4], targets[1, 6:] = decoder_training.IGNORED, decoder_training.IGNORED
    text = torch.ones(3, 4, 6), torch.ones(3, 4)
    losses = (
        decoder_training.next_token_loss(model, model.states(tokens, *text), targets),
        F.cross_entropy(model(tokens, *text).flatten(0, 1), targets.flatten(), ignore_index=decoder_training.IGNORED),
    )
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(losses[0], losses[1])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("harm", ["missing", "text", "cut", "a checkpoint", "other weights", "statistics", "a list"])
def test_a_file_that_is_no_trained_tokenizer(tmp_path: Path, harm: str) -> None:
    config = TokenizerConfig(nb_code=256, code_dim=8, width=8, depth=1)
    path = tmp_path / "tokenizer.pt"
    mean, std = torch.zeros(272), torch.ones(272)
    save_tokenizer(path, MotionTokenizer(config), mean, std, {})
    assert load_tokenizer(path)[1].dtype == torch.float64
    state = torch.load(path, weights_only=True)
    bad = {
        "a checkpoint": {"model": state["model"], "step": 3, "identity": {}},
        "other weights": {**state, "config": {**state["config"], "width": 16}},
        "statistics": {**state, "mean": torch.zeros(263)},
        "a list": [1, 2],
    }
    if harm in bad:
        save_whole(path, bad[harm])
    elif harm == "missing":
        path.unlink()
    else:
        path.write_bytes(b'{"format": 1}' if harm == "text" else path.read_bytes()[:-9000])
    with pytest.raises(
        UserError, match=r"tokenizer.pt: expected a trained tokenizer, but .*; run kinetok train"
    ) as told:
        load_tokenizer(path)
    assert "\n" not in str(told.value)
