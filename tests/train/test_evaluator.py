"""The small set's evaluator: its loss against loops, a toy training, its files, and the one that ships."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kinetok.errors import UserError
from kinetok.model.evaluator import Evaluator, EvaluatorConfig
from kinetok.model.text_minilm import PACKAGE, MiniLM
from kinetok.train.data.store import Clip
from kinetok.train.evaluator import EvaluatorTask, SmallEvaluator, contrast, load_evaluator, save_evaluator
from kinetok.train.loop import fit
from kinetok.train.metrics import distances
from kinetok.train.recipes import evaluator_recipe, mini_evaluator

SIZES = EvaluatorConfig(latent_dim=8, num_layers=1, num_heads=2, ff_size=12, text_dim=384)
SAID = {"still": "a person stands still", "wild": "a person jumps to the left"}


def clip(number: int, split: str, label: str) -> Clip:
    rng = np.random.default_rng(number)
    x = (rng.standard_normal((70, 272)) * (2.0 if label == "wild" else 0.1)).astype(np.float32)
    names = {"id": f"{label}{number}", "subject": split, "label": label, "split": split, "captions": (SAID[label],)}
    return Clip(**names, heading_flips=0, features=x, mirrored=-x)


def test_contrast_against_loops() -> None:
    rng = np.random.default_rng(0)
    motions, texts = (torch.from_numpy(rng.standard_normal((5, 3))) for _ in range(2))
    same = torch.zeros(5, 5, dtype=torch.bool)
    same[1, 3] = same[3, 1] = True
    got = contrast(motions, texts, same, 0.2)
    cosines = [[float(m @ t / m.norm() / t.norm()) / 0.2 for t in texts] for m in motions]
    for i in range(5):
        others = [j for j in range(5) if j == i or not same[i, j]]
        rows = np.log(sum(np.exp(cosines[i][j]) for j in others)) - cosines[i][i]
        columns = np.log(sum(np.exp(cosines[j][i]) for j in others)) - cosines[i][i]
        assert float(got[i]) == pytest.approx((rows + columns) / 2, rel=1e-9)
    alone = contrast(motions, texts, torch.ones(5, 5, dtype=torch.bool), 0.2)
    torch.testing.assert_close(alone, torch.zeros_like(alone))


@pytest.fixture(scope="module")
def task() -> EvaluatorTask:
    pytest.importorskip(PACKAGE, reason="captions need MiniLM, whose weights are not installed")
    loop = replace(mini_evaluator().loop, steps=30, lr=3e-3, warmup=5, validate_every=10, save_every=10)
    recipe = replace(mini_evaluator(), model=SIZES, loop=loop, batch=8, max_frames=64)
    clips = [clip(i, "train", label) for label in SAID for i in range(10)]
    return EvaluatorTask(recipe, [*clips, clip(10, "val", "still"), clip(10, "val", "wild")], MiniLM(pooled_scale=10.0))


def test_a_toy_training_tells_two_motions_apart_and_comes_back(task: EvaluatorTask, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="training logs to tensorboard, which is not installed")
    # Of 20 recordings every tenth judges, beside the split val.
    assert len(task.train) == 18 and len(task.held_out) == 4
    before = task.validate(task.module.eval())
    best = torch.load(fit(task, task.recipe.loop, tmp_path / "run", identity=asdict(task.recipe)), weights_only=True)
    task.module.load_state_dict(best["model"])
    after = task.validate(task.module.eval())
    assert after["loss"] < 0.5 * before["loss"] and after["top1"] == after["top3"] == 1

    save_evaluator(tmp_path / "saved", task.module, task.mean, task.std, {"recipe": "toy"})
    back = load_evaluator(tmp_path / "saved")
    assert back.metadata["provenance"] == {"recipe": "toy"} and back.module.config == SIZES
    texts = [back.embed_text(SAID[label]) for label in SAID]
    motions = [back.embed_motion(clip(20, "test", label).features) for label in SAID]
    np.testing.assert_allclose(np.linalg.norm([*texts, *motions], axis=-1), 1, rtol=1e-5)
    d = distances(texts, motions)
    assert d[0, 0] < d[0, 1] and d[1, 1] < d[1, 0]


def test_captions_are_mirrored_with_their_motions(task: EvaluatorTask) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        frames, _, captions = task._draw(rng, 60)
        assert frames.shape == (60, 272)
        if captions == {"a person jumps to the right"}:
            break
    else:
        pytest.fail("no mirrored caption in 40 draws")


def test_splits_and_motions_that_cannot_be_used_are_named(task: EvaluatorTask) -> None:
    text = MiniLM(pooled_scale=10.0)
    with pytest.raises(UserError, match="train and val, got 0 and 1"):
        EvaluatorTask(task.recipe, [clip(0, "val", "still")], text)
    with pytest.raises(UserError, match="mini"):
        evaluator_recipe("maxi")
    evaluator = SmallEvaluator(task.module, task.mean, task.std, {})
    for x, words in (
        (np.zeros((5, 263)), r"\[T, 272\], got \[5, 263\]"),
        (np.zeros((0, 272)), r"got \[0, 272\]"),
        (np.full((5, 272), np.nan), "NaN"),
    ):
        with pytest.raises(UserError, match=words):
            evaluator.embed_motion(x)


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    save_evaluator(tmp_path, Evaluator(SIZES), np.zeros(272), np.ones(272), {})
    file = tmp_path / "evaluator.json"
    good = json.loads(file.read_text())
    for change, words in (
        ({"format": "kinetok-evaluator-2"}, "expected kinetok-evaluator-1, got 'kinetok-evaluator-2'"),
        ({"model": {**good["model"], "latent_dim": 16}}, "wrong shape"),
        ({"model": {**good["model"], "depth": 3}}, "unknown keys"),
        ({"text_encoder": {"name": "other", "pooled_scale": 1.0}}, "all-MiniLM-L6-v2"),
        ({"provenance": None}, "expected the provenance"),
    ):
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(UserError, match=words):
            load_evaluator(tmp_path)
    with pytest.raises(UserError, match="expected an evaluator"):
        load_evaluator(tmp_path / "nothing")


def test_the_shipped_evaluator_is_the_recipe_and_small() -> None:
    shipped, recipe = load_evaluator(), evaluator_recipe("mini")
    about = shipped.metadata["provenance"]
    assert shipped.module.config == recipe.model
    assert about["settings"]["loop"]["steps"] == recipe.loop.steps and about["seed"] == recipe.loop.seed
    assert {"recipe", "seed", "step", "commit"} <= set(about) and about["held_out"]["top1"] > 0.6
    folder = Path(__file__).parents[2] / "train" / "default"
    assert (folder / "evaluator.safetensors").stat().st_size <= 2e6
