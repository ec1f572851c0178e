"""The training loop: it learns, resumes exactly, and refuses to mix runs."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from kinetok.errors import UserError
from kinetok.train.loop import fit
from kinetok.train.optim import LoopConfig, adamw, learning_rate

pytest.importorskip("tensorboard", reason="training logs to tensorboard, which is not installed")


def test_learns_and_keeps_the_best(tmp_path: Path, line, config) -> None:
    best = torch.load(fit(line(), config, tmp_path / "run", identity={}), weights_only=True)
    assert best["figures"]["loss"] < 1.0 and best["step"] in (10, 20, 30, 40)
    assert (tmp_path / "run" / "log.jsonl").read_text().count('"validate"') == 4


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, line, config) -> None:
    fit(line(), config, tmp_path / "whole", identity={})
    with pytest.raises(KeyboardInterrupt):
        fit(line(stop=27), config, tmp_path / "cut", identity={})
    fit(line(), config, tmp_path / "cut", resume=True, identity={})
    whole, cut = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    for key in ("model", "average"):
        assert all(torch.equal(whole[key][name], cut[key][name]) for name in whole[key])


def test_runs_are_not_mixed(tmp_path: Path, line, config) -> None:
    fit(line(), config, tmp_path, identity={"a": 1})
    with pytest.raises(UserError, match="--resume"):
        fit(line(), config, tmp_path, identity={"a": 1})
    with pytest.raises(UserError, match="another recipe"):
        fit(line(), config, tmp_path, resume=True, identity={"a": 2})


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, line, config) -> None:
    with pytest.raises(UserError, match="step 0"):
        fit(line(bad=True), config, tmp_path, identity={})


def test_schedule(config) -> None:
    rates = [learning_rate(config, step) for step in range(config.steps)]
    assert rates[3] == rates[4] == config.lr and rates[0] == config.lr / 4
    assert all(a >= b for a, b in pairwise(rates[4:])) and rates[-1] < 0.01 * config.lr


def test_the_reference_schedule_is_the_golden_one(golden) -> None:
    reference = LoopConfig(steps=240_000, lr=4e-4, warmup=12_000, schedule="reference")
    with np.load(golden("schedules.npz")) as z:
        rates = [learning_rate(reference, int(step)) for step in z["cosine_iter"]]
        np.testing.assert_allclose(rates, z["cosine_lr"], atol=1e-9, rtol=0)
    assert rates[-1] > learning_rate(reference, 228_000) == 0  # it rises again
    with np.load(golden("schedules.npz")) as z:
        warm = int(z["tok_warm_up_iter"])
        tokenizer = LoopConfig(
            steps=10**6,
            lr=float(z["tok_base_lr"]),
            warmup=warm,
            schedule="reference-tokenizer",
            milestone=int(z["tok_milestones"][0]),
        )
        steps = [*(z["tok_warm_iter"] - 1), *(z["tok_main_iter"] + warm - 2)]
        rates = [learning_rate(tokenizer, int(step)) for step in steps]
        np.testing.assert_allclose(rates, [*z["tok_warm_lr"], *z["tok_main_lr"]], atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"schedule": "linear"}, "cosine, reference"),
        ({"ema": 1.0}, "ema from 0 to below 1, got 1.0"),
        ({"clip_norm": 0.0}, "clip_norm above 0, got 0.0"),
    ],
)
def test_numbers_that_are_none_are_refused(words, says: str) -> None:
    with pytest.raises(UserError, match=says):
        LoopConfig(steps=1, **words)


def test_without_average_and_clipping(tmp_path: Path, line, config) -> None:
    run = replace(config, ema=None, clip_norm=None)
    best = torch.load(fit(line(), run, tmp_path, identity={}), weights_only=True)
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert last["average"] is None
    best_is_last = best["step"] == 40
    assert not best_is_last or all(torch.equal(best["model"][k], last["model"][k]) for k in best["model"])


def test_decay_of_all_parameters(config) -> None:
    groups = [len(adamw(torch.nn.Linear(2, 2), replace(config, decay_all=flag)).param_groups) for flag in (False, True)]
    assert groups == [2, 1]


def test_a_validation_that_is_not_finite_stops_the_run(tmp_path: Path, line, config) -> None:
    """Its weights would have become the result, or there would have been none."""

    class Unseen(line):
        def validate(self, module):
            return {"loss": float("nan")}

    with pytest.raises(UserError, match="the validation loss is nan at step 10; lower the learning rate"):
        fit(Unseen(), config, tmp_path, identity={})
    assert not (tmp_path / "best.pt").exists()


def test_a_file_in_place_of_the_folder(tmp_path: Path, line, config) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(
        UserError, match=r"run: expected a folder for the run, but it is a file; name another with --out"
    ):
        fit(line(), config, tmp_path / "run", identity={})
    assert (tmp_path / "run").read_text() == "mine"
    with pytest.raises(UserError, match="cannot write"):
        fit(line(), config, tmp_path / "run" / "deeper", identity={})


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "name", ["notes.txt", "log.jsonl", "best.pt", "model/kinetok.json", "checkpoints/readme", "x.log/y"]
)
def test_a_folder_with_other_files_is_refused(tmp_path: Path, line, config, name: str, resume: bool) -> None:
    """Neither mixed with them nor taken for a run, also where they have a run's names."""
    file = tmp_path / "folder" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    expected = (
        rf"^{tmp_path}/folder: expected a new folder or a run, but it holds other files \({name.split('/')[0]}\);"
    )
    with pytest.raises(UserError, match=expected) as told:
        fit(line(), config, tmp_path / "folder", resume=resume, identity={})
    assert "\n" not in str(told.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file] and file.read_text() == "mine"


def test_output_sent_into_the_folder_is_no_other_file(tmp_path: Path, line, config) -> None:
    """As ``kinetok train ... --out run > run/train.log`` has it, and slurm's --output and --error; hidden files too."""
    for name in ("train.log", "slurm-17.out", "slurm-17.err", ".gitignore"):
        (tmp_path / name).write_text("step 1")
    assert fit(line(), config, tmp_path, identity={}).exists()
    assert (tmp_path / "train.log").read_text() == "step 1"


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b"[1]"])
def test_a_run_that_no_longer_says_what_it_is(tmp_path: Path, line, config, content: bytes) -> None:
    fit(line(), config, tmp_path, identity={})
    (tmp_path / "run.json").write_bytes(content)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=r"expected the description of a run, but|differs in its description") as told:
        fit(line(), config, tmp_path, resume=True, identity={})
    assert "\n" not in str(told.value)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_a_folder_that_cannot_be_held(tmp_path: Path, line, config, monkeypatch) -> None:
    def fails(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("filelock.FileLock.acquire", fails)
    with pytest.raises(UserError, match=r"cannot write .*: Permission denied; name another folder with --out"):
        fit(line(), config, tmp_path / "run", identity={})
