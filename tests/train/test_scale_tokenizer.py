"""The paper's tokenizer on a clip store: its numbers, one process and two, and what it costs."""

import contextlib
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kinetok.errors import UserError
from kinetok.model.config import TokenizerConfig
from kinetok.train.data.shards import ClipStore
from kinetok.train.data.stats import mean_std, streamed_mean_std
from kinetok.train.data.store import Clip
from kinetok.train.decoder import load_tokenizer
from kinetok.train.loop import OneProcess
from kinetok.train.losses import released_loss
from kinetok.train.scale_tokenizer import StoreTokenizer, WindowTask, cost_lines, store_tokenizer_recipe, train

pytest.importorskip("pyarrow", reason="a clip store has a Parquet index, and pyarrow is not installed")
pytest.importorskip("tensorboard", reason="training logs to tensorboard, which is not installed")

PROGRAM = """
import os, pickle, torch
torch.set_num_threads(1)
from kinetok.train.scale_tokenizer import train
train(**pickle.loads(bytes.fromhex(os.environ["SAID"])))
"""


@pytest.fixture
def recipe():
    smoke = store_tokenizer_recipe("smoke")
    loop = replace(smoke.loop, steps=4, validate_every=2, save_every=2)
    model = TokenizerConfig(nb_code=256, code_dim=8, width=8, depth=1, patcher="haar", patch_size=2)
    return replace(smoke, model=model, loop=loop, frames=32)


def test_the_papers_run() -> None:
    recipe = store_tokenizer_recipe("motionmillion")
    assert recipe.model == TokenizerConfig() and (recipe.batch, recipe.frames) == (256, 96)
    loop = recipe.loop
    assert (loop.steps, loop.warmup, loop.milestone, loop.lr) == (6_047_999, 48_000, 300_000, 5e-5)
    assert (loop.betas, loop.weight_decay, loop.eps, loop.ema, loop.clip_norm) == ((0.9, 0.99), 0.0, 1e-8, None, None)
    with pytest.raises(UserError, match="mini, smoke or motionmillion"):
        store_tokenizer_recipe("maxi")


def test_windows_are_drawn_from_long_enough_clips(trained_store, recipe) -> None:
    store = ClipStore(trained_store.store)
    task = WindowTask(replace(recipe, frames=60, batch=400), store, OneProcess())
    assert {int(frames) for frames in store.frames[task.train]} == {60, 62, 64, 66, 68}
    seen: list[torch.Tensor] = []
    task.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    task.loss(0, np.random.default_rng(0))
    (windows,) = seen
    assert windows.shape == (400, 60, 272)
    sides = [task.normal(int(clip)) for clip in task.train]
    starts = set()
    for window in windows:
        found = [
            start for side in sides for start in range(len(side) - 59) if torch.equal(side[start : start + 60], window)
        ]
        assert len(found) == 1
        starts.add(found[0])
    assert starts == set(range(9))
    with pytest.raises(UserError, match="of 90 frames or more in the splits train and val, got 0 and 0"):
        WindowTask(replace(recipe, frames=90), store, OneProcess())
    many = OneProcess()
    many.world = 9
    with pytest.raises(UserError, match="more processes than data: 9 processes"):
        WindowTask(recipe, store, many)


def test_fsq_and_wavelet_of_a_step_on_a_gpu_are_operators_of_ours(recipe, request) -> None:
    torch.manual_seed(0)
    module, frames = StoreTokenizer(recipe.model), torch.randn(2, 32, 272)
    results = []
    for through in (False, True):
        operators = request.getfixturevalue("through_operators")() if through else contextlib.nullcontext()
        with operators:
            loss = released_loss(module(frames)[0], frames)
            results.append(torch.autograd.grad(loss, list(module.parameters())))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert {name: operators.calls[name] for name in ("fsq_quantize", "fsq_quantize_backward", "dwt", "idwt")} == {
        "fsq_quantize": 1,
        "fsq_quantize_backward": 1,
        "dwt": 2,  # of the frames, and the gradient of the inverse
        "idwt": 1,
    }


def test_streamed_deviations_are_those_of_all_rows() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((length, 272)).astype(np.float32) * 3 + 5 for length in (3, 40, 7)]
    words = {"id": "", "subject": "", "label": "", "split": "train", "captions": ("x",), "heading_flips": 0}
    wanted = mean_std([Clip(**words, features=x, mirrored=x) for x in arrays])
    for one, other in zip(streamed_mean_std(arrays), wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_two_processes_are_one(trained_store, recipe, processes, tmp_path: Path) -> None:
    """On a haar tokenizer: FSQ, the wavelet and their gradients in the loop. Then the result, and its pictures."""
    pytest.importorskip("PIL", reason="samples are drawn with pillow, which is not installed")
    words = {"recipe": recipe, "data": trained_store.store}
    said = pickle.dumps({**words, "out": tmp_path / "two"}).hex()
    for code, output, errors in processes(PROGRAM, 2, SAID=said).end():
        assert code == 0, output + errors
    result = train(out=tmp_path / "one", sample_every=2, **words)
    logs = [
        [json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("one", "two")
    ]
    for one, two in zip(*logs, strict=True):
        assert (one["kind"], one["step"]) == (two["kind"], two["step"])
        for name in one.keys() & {"loss", "mpjpe_mm", "codes"}:
            assert one[name] == pytest.approx(two[name], rel=1e-4)
    assert logs[0][0]["loss"] > logs[0][-1]["loss"] and logs[0][-1]["codes"] > 1
    tokenizer, mean, std = load_tokenizer(result)
    assert tokenizer.config == recipe.model and mean.dtype == std.dtype == torch.float64
    other = load_tokenizer(tmp_path / "two" / "tokenizer.pt")[0].state_dict()
    for name, value in tokenizer.state_dict().items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-5)
    store = ClipStore(trained_store.store)
    clip = int(np.flatnonzero(store.splits == "val")[0])
    frames = ((torch.from_numpy(store.read(clip)).double() - mean) / std).float()[None]
    assert tokenizer.decode(tokenizer.encode(frames)).shape == frames.shape
    names = {path.name for path in (tmp_path / "one" / "samples").iterdir()}
    assert {"clip-0.png", "step-00000002-0.png", "step-00000004-2.npz"} <= names and "clip-2.npz" in names


def test_the_command_line(trained_store, tmp_path: Path, monkeypatch) -> None:
    from typer.testing import CliRunner

    from kinetok.cli import app

    def said(*words: str) -> str:
        result = CliRunner().invoke(app, ["train", "tokenizer", *words])
        if isinstance(result.exception, UserError):
            return str(result.exception)
        assert result.exit_code == 0, result.output
        return result.output

    dry = said("--recipe", "motionmillion", "--dry-run", "--processes", "4", "--tokens-per-second", "100000")
    assert "11,349,782 parameters" in dry and "4 of them" in dry and "12,288" in dry and "days: 8.6" in dry
    assert "data per GPU: 520.8 windows/s, 25,000 tokens/s, at that rate" in dry and "give --data STORE" in dry
    data = ["--dry-run", "--data", str(trained_store.store)]
    long = said("--recipe", "motionmillion", *data)
    assert "days: not measured" in long and "no clip of the split train has the recipe's length" in long
    monkeypatch.setattr("kinetok.train.rates.SECONDS", 0.01)
    assert re.search(r"loader: [\d,]*[1-9][\d,]* windows/s of one worker", said("--recipe", "smoke", *data))
    assert "more processes than data" in said("--recipe", "smoke", "--dry-run", "--processes", "9")
    assert "expected a clip store" in said("--recipe", "smoke", "--dry-run", "--data", str(tmp_path))
    for words in (["--dry-run"], ["--steps", "3"]):
        assert f"{words[0]} goes with a recipe for a clip store" in said("--recipe", "mini", *words)
    assert "mini, smoke or motionmillion" in said("--recipe", "smokey")
    run = ["--recipe", "smoke", "--steps", "2", "--out", str(tmp_path / "run")]
    assert "expected a clip store" in said(*run, "--data", str(tmp_path))
    assert "wrote" in said(*run, "--data", str(trained_store.store))
    assert "a run is already here" in said(*run, "--data", str(trained_store.store))


def test_what_a_window_keeps_is_counted() -> None:
    recipe = store_tokenizer_recipe("smoke")
    short, long = (cost_lines("x", replace(recipe, frames=frames), processes=1) for frames in (960, 3840))
    kept = [float(lines[1].split("activations ")[1].rstrip(")")) for lines in (short, long)]
    assert kept[1] == pytest.approx(4 * kept[0], abs=0.02) and kept[0] > 0
    with pytest.raises(UserError, match="above 0"):
        cost_lines("x", recipe, processes=1, tokens_per_second=0)
