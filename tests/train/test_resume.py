"""Crashes: a killed run goes on with the same bits, a damaged checkpoint is noticed, a full disk is said."""

import json
import os
import resource
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from kinetok.errors import UserError
from kinetok.train.checkpoints import LAST, PREVIOUS, damage, load_best, save_whole
from kinetok.train.journal import cut_log
from kinetok.train.loop import fit

pytest.importorskip("tensorboard", reason="training logs to tensorboard, which is not installed")
ROOT = Path(__file__).resolve().parents[2]


def test_three_kills_change_nothing(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "train" / "soak_resume.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "--kills", "3", "--seed", "0", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["equal"] and [kill["signal"] for kill in result["kills"]] == [-9, -9, -9]
    assert result["lines_compared"] == 45


@pytest.fixture
def interrupted(line, config):
    def run(folder: Path, stop: int = 27) -> None:
        with pytest.raises(KeyboardInterrupt):
            fit(line(stop=stop), config, folder, identity={})

    return run


@pytest.mark.parametrize("harm", ["truncated", "empty", "flipped", "no zip"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_used(
    tmp_path: Path, capsys, harm: str, line, config, interrupted
) -> None:
    interrupted(tmp_path / "run")
    fit(line(), config, tmp_path / "whole", identity={})
    last = tmp_path / "run" / LAST
    content = bytearray(last.read_bytes())
    if harm == "flipped":
        with zipfile.ZipFile(last) as archive:
            bits = max(archive.infolist(), key=lambda entry: entry.file_size)
            content[content.index(archive.read(bits), bits.header_offset) + bits.file_size // 2] ^= 1
    cut = {"truncated": content[: len(content) // 2], "empty": b"", "no zip": b"x" * 100, "flipped": content}
    last.write_bytes(cut[harm])
    assert damage(last) is not None and damage(last.with_name(PREVIOUS)) is None
    capsys.readouterr()
    fit(line(), config, tmp_path / "run", resume=True, identity={})
    told = capsys.readouterr().out
    assert "last.pt is damaged" in told and "going on from previous.pt, step 10" in told
    one, other = (torch.load(tmp_path / name / LAST, weights_only=True)["model"] for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_no_whole_checkpoint_is_an_error_and_nothing_is_overwritten(tmp_path: Path, line, config, interrupted) -> None:
    interrupted(tmp_path)
    for name in (LAST, PREVIOUS):
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(UserError, match="no whole checkpoint is left"):
        fit(line(), config, tmp_path, resume=True, identity={})
    assert (tmp_path / LAST).read_bytes() == b"PK"


def test_a_run_killed_before_its_first_checkpoint_is_not_mixed_with_another(
    tmp_path: Path, line, config, interrupted
) -> None:
    interrupted(tmp_path, stop=3)
    assert not (tmp_path / LAST).exists()
    with pytest.raises(UserError, match="--resume"):
        fit(line(), config, tmp_path, identity={})
    with pytest.raises(UserError, match=r"another recipe.*differs in a\)"):
        fit(line(), config, tmp_path, resume=True, identity={"a": 2})
    assert fit(line(), config, tmp_path, resume=True, identity={}).exists()


def test_a_run_from_before_an_option_existed_goes_on(tmp_path: Path, line, config) -> None:
    identity = {"loop": asdict(config)}
    with pytest.raises(KeyboardInterrupt):
        fit(line(stop=27), config, tmp_path, identity=identity)
    state = torch.load(tmp_path / LAST, weights_only=True)
    for name in ("schedule", "eps"):
        del state["identity"]["identity"]["loop"][name]
    save_whole(tmp_path / LAST, state)
    (tmp_path / "run.json").unlink()
    with pytest.raises(UserError, match="it differs in eps"):
        fit(line(), config, tmp_path, resume=True, identity={"loop": asdict(replace(config, eps=1e-6))})
    assert fit(line(), config, tmp_path, resume=True, identity=identity).exists()


def test_a_second_process_in_the_same_folder_is_refused(tmp_path: Path, line, config) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(UserError, match="another process is training"):
        fit(line(), config, tmp_path, identity={})


@pytest.mark.parametrize("file", ["checkpoint", "log"])
def test_a_disk_without_room_is_said(tmp_path: Path, file: str, line, config, interrupted) -> None:
    interrupted(tmp_path)
    before = (tmp_path / LAST).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = len(before) // 2 if file == "checkpoint" else 100
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*File too large") as told:
            fit(line(), config, tmp_path, resume=True, identity={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(told.value) and (tmp_path / LAST).read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".last")]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_no_space_left(tmp_path: Path) -> None:
    from kinetok.train.checkpoints import _write

    with pytest.raises((UserError, OSError), match="No space left"):
        _write(Path("/dev/full"), tmp_path / "last.pt", {"x": torch.zeros(10**6)})


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path, line, config) -> None:
    class Steep(line):
        def loss(self, step, rng):
            loss = super().loss(step, rng)["loss"]
            if step == 5:
                loss = loss + (self.module.bias - self.module.bias.detach()).abs().sqrt().sum()  # slope inf at 0
            return {"loss": loss}

    with pytest.raises(UserError, match="gradient is not finite at step 5"):
        fit(Steep(), config, tmp_path, identity={})


def test_the_log_is_cut_to_the_step(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n{"kind": "tr')
    cut_log(log, 1)
    assert log.read_text() == '{"kind": "train", "step": 1}\n'


def test_samples_change_nothing(tmp_path: Path, line, config) -> None:
    seen = []
    sample = lambda module, step: seen.append((step, float(torch.randn(()))))  # noqa: E731
    fit(line(), config, tmp_path / "a", identity={}, sample=sample, sample_every=15)
    fit(line(), config, tmp_path / "b", identity={})
    assert [step for step, _ in seen] == [15, 30]
    one, other = (torch.load(tmp_path / name / LAST, weights_only=True)["model"] for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_save_whole_round_trip(tmp_path: Path) -> None:
    save_whole(tmp_path / "x.pt", {"a": torch.arange(3)})
    assert damage(tmp_path / "x.pt") is None and torch.load(tmp_path / "x.pt")["a"].tolist() == [0, 1, 2]


def test_the_live_view(tmp_path: Path) -> None:
    from contextlib import ExitStack
    from io import StringIO

    from rich.console import Console

    from kinetok.train.journal import Journal

    with ExitStack() as stack:
        journal = Journal(tmp_path, 100, 7, stack)
        journal.step(8, 1.25, 3e-4)
        journal.write("train", 8, {"loss": 1.25, "grad_norm": 0.5})
        shown = StringIO()
        Console(file=shown, width=100).print(journal._view())
    assert "1.2500" in shown.getvalue() and "0.0003" in shown.getvalue() and "8/100" in shown.getvalue()
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {
        "kind": "train",
        "step": 8,
        "loss": 1.25,
        "grad_norm": 0.5,
    }
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert board.Tags()["scalars"] == ["train/loss", "train/grad_norm"]
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(8, 1.25)]


@pytest.mark.parametrize("harm", ["cut", "gone", "another"])
def test_a_finished_run_without_its_best_weights_is_said(tmp_path: Path, harm: str, line, config) -> None:
    best = fit(line(), config, tmp_path, identity={})
    assert load_best(best)["step"] > 0
    if harm == "gone":
        best.unlink()
    else:
        best.write_bytes(best.read_bytes()[:500] if harm == "cut" else b"{}")
    again = fit(line(), config, tmp_path, resume=True, identity={})
    with pytest.raises(
        UserError, match=r"best.pt: expected the weights of this run, but they are damaged or gone"
    ) as told:
        load_best(again)
    assert "\n" not in str(told.value)
