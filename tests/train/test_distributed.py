"""Several processes over gloo: one process's numbers, sharded checkpoints, and errors that are said once."""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.filesystem import _StoragePrefix

from kinetok.errors import UserError
from kinetok.model.decoder import MotionDecoder
from kinetok.train.checkpoints import LAST, Found
from kinetok.train.distributed import COMPLETE, REST, ManyProcesses, ShardedCheckpoints
from kinetok.train.scale import train
from kinetok.train.scale_recipes import ScaleRecipe, with_loop
from kinetok.train.sums import LARGE, SummedWriter, _Files, changed

pytest.importorskip("pyarrow", reason="a clip store has a Parquet index, and pyarrow is not installed")
pytest.importorskip("tensorboard", reason="training logs to tensorboard, which is not installed")

PROGRAM = """
import os, pickle, sys, time, torch
torch.set_num_threads(1)
from kinetok.errors import UserError
from datetime import timedelta
from kinetok.train import distributed, scale
said = pickle.loads(bytes.fromhex(os.environ["SAID"]))
distributed.TIMEOUT = timedelta(seconds=said["timeout"])
plain = scale.PackedTask.loss
def loss(self, step, rng):
    if said["slow"]:
        print("step", step, flush=True)
        time.sleep(0.2)
    losses = dict(plain(self, step, rng))
    if step == said["bad"] and self.processes.rank == 1:
        losses["loss"] = losses["loss"] * float("nan")
    return losses
scale.PackedTask.loss = loss
try:
    scale.train(**said["train"])
except UserError as error:
    print("kinetok:", error, file=sys.stderr, flush=True)
    os._exit(2)
"""


@pytest.fixture
def start(trained_store, processes, tmp_path: Path):
    """Start processes that train with a recipe in ``tmp_path / run``."""

    def begin(
        recipe: ScaleRecipe, *, world: int = 2, room: int | None = None, slow=False, bad=-1, timeout=300, **words
    ):
        data = {"data": trained_store.store, "tokenizer": trained_store.tokenizer, "out": tmp_path / "run"}
        said = {"slow": slow, "bad": bad, "timeout": timeout, "train": {"recipe": recipe, **data, **words}}
        return processes(PROGRAM, world, room=room, SAID=pickle.dumps(said).hex())

    return begin


def losses(run: Path) -> list[tuple[str, int, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(one["kind"], one["step"], one["loss"]) for one in lines]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("tied", [False, True])
def test_two_processes_are_one(trained_store, start, tmp_path: Path, tied: bool) -> None:
    """FSDP2 over gloo, in several passes with recomputed activations: one process's losses and weights within float
    tolerance. Then a cut checkpoint, and one of which the second process's part has a flipped bit: the one before takes its
    place, also in three processes; and the folder of another run, of one that goes on, and of this run in one process."""
    from kinetok.train.scale import Engine

    recipe = replace(trained_store.recipe, model=replace(trained_store.recipe.model, tie_weights=tied))
    engine = Engine(pass_positions=90, checkpointing=True)
    for code, output, errors in start(recipe, engine=engine).end():
        assert code == 0, output + errors
    data = {"data": trained_store.store, "tokenizer": trained_store.tokenizer}
    train(recipe=recipe, out=tmp_path / "one", **data)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "run")
    assert [a[:2] for a in one] == [a[:2] for a in two] and len(one) == 8
    np.testing.assert_allclose([a[2] for a in one], [a[2] for a in two], rtol=1e-5)
    assert one[-1][2] < one[0][2]
    weights = [torch.load(tmp_path / name / "best.pt", weights_only=True)["model"] for name in ("one", "run")]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-5)
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-00000004", "step-00000006"]  # the last two
    model = MotionDecoder(recipe.model)
    model.load_state_dict({name.removeprefix("decoder."): value for name, value in weights[1].items()})
    assert (tmp_path / "run" / "model" / "kinetok.json").exists()

    part = folders[1] / "__1_0.distcp"
    if tied:
        flip(part, part.stat().st_size // 2)
    else:
        part.write_bytes(part.read_bytes()[:-10])
    (tmp_path / "run" / "best.pt").unlink()
    (code, output, errors), *_ = start(recipe, resume=True, engine=engine, world=3 if tied else 2).end()
    assert code == 0, errors
    assert "step-00000006 is damaged" in output.replace("\n", "") and "going on from step-00000004" in output
    resumed = losses(tmp_path / "run")
    assert resumed[:5] == two[:5]  # up to step 4
    np.testing.assert_allclose([a[2] for a in resumed], [a[2] for a in two], rtol=1e-5 if tied else 1e-6)
    with pytest.raises(UserError, match="those of several processes: continue it with torchrun"):
        train(recipe=recipe, out=tmp_path / "run", resume=True, **data)
    assert losses(tmp_path / "run") == resumed

    if not tied:
        before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
        first, second = start(with_loop(recipe, seed=5), resume=True).end()
        assert first[0] == second[0] == 2 and "it differs in seed" in first[2] and first[2].count("\n") == 1
        assert second[2] == ""  # one process says it
        assert before == sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
        with FileLock(tmp_path / "run" / ".lock"):
            first, second = start(recipe, resume=True).end()
        assert first[0] == second[0] == 2 and second[2] == "" and first[2].count("\n") == 1
        assert "another process is training in this folder" in first[2]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_hanging_process_is_loud(trained_store, start, how: signal.Signals) -> None:
    recipe = replace(with_loop(trained_store.recipe, steps=1000, save_every=1000, validate_every=1000), bf16=True)
    running = start(recipe, slow=True, timeout=30 if how == signal.SIGSTOP else 300)
    first, second = running.all
    assert second.stdout is not None
    while "step 2" not in second.stdout.readline():
        assert second.poll() is None
    second.send_signal(how)
    try:
        _, errors = first.communicate(timeout=120)
    finally:
        second.kill()
    assert first.returncode == 2 and "process 0 of 2 lost another one" in errors and "--resume" in errors
    assert errors.count("kinetok:") == 1 and "Traceback" not in errors
    second.communicate()


def test_one_process_with_a_bad_loss_stops_all_of_them(trained_store, start, tmp_path: Path) -> None:
    first, second = start(trained_store.recipe, bad=3).end(timeout=120)
    assert first[0] == second[0] == 2 and second[2] == ""
    assert first[2].count("\n") == 1 and "the loss is nan at step 3" in first[2]
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_full_disk_is_said(trained_store, start, tmp_path: Path) -> None:
    first, second = start(with_loop(trained_store.recipe, validate_every=6), room=24_000).end(timeout=120)
    assert first[0] == second[0] == 2 and second[2] == "" and first[2].count("\n") == 1
    assert "cannot write" in first[2] and "step-00000002" in first[2] and "File too large" in first[2]
    assert not list((tmp_path / "run").glob(f"checkpoints/*/{COMPLETE}"))


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardedCheckpoints]:
    """Those of a group of one process, this one."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    alone = ManyProcesses()
    with alone.running():
        yield ShardedCheckpoints(tmp_path, alone)


def test_the_run_of_one_process_is_not_continued_by_several(sharded: ShardedCheckpoints) -> None:
    (sharded.folder.parent / LAST).write_bytes(b"x")
    with pytest.raises(UserError, match="those of one process: continue it without torchrun"):
        sharded.find(lambda line: None)


def saved(checkpoints: ShardedCheckpoints, step: int) -> torch.nn.Module:
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoints.save(module, optimizer, {"step": step, "identity": {"a": 1}, "average": None})
    return module


def test_a_flipped_bit_is_noticed_and_the_checkpoint_before_used(sharded: ShardedCheckpoints) -> None:
    """Anywhere in a part: in the numbers, and in what their form leaves unused. A part without a checksum, of an earlier
    version, is taken as it is."""
    weight = saved(sharded, 1).weight
    last = saved(sharded, 2).weight
    sharded.finish()
    part, about = (sharded.folder / "step-00000002" / name for name in ("__0_0.distcp", COMPLETE))
    content = part.read_bytes()
    numbers = content.index(last.detach().numpy().tobytes())

    def find() -> tuple[Found, list[str]]:
        told: list[str] = []
        found = sharded.find(told.append)
        assert found is not None
        return found, told

    for at in (0, numbers, len(content) // 2, len(content) - 1):
        flip(part, at)
        found, told = find()
        assert found.step == 1
        assert "step-00000002 is damaged (bad checksum of __0_0.distcp); going on from step-00000001" in told[0]
        flip(part, at)
    other = torch.nn.Linear(3, 2)
    sharded.load(found, other, torch.optim.AdamW(other.parameters()))
    assert torch.equal(other.weight, weight)
    assert find()[0].step == 2
    said = json.loads(about.read_text())
    assert list(said.pop("crc32")) == [part.name]
    about.write_text(json.dumps(said))
    found, told = find()
    assert found.step == 2 and not told
    for folder in sharded.folder.iterdir():
        flip(folder / REST, 300)
    with pytest.raises(UserError, match=r"step-00000001 is damaged \(bad checksum of rest.pt\): no whole checkpoint"):
        find()


@pytest.mark.parametrize(
    "sums",
    [{}, [1], None, {"__0_0.distcp": "x"}, {"__0_0.distcp": math.inf}, {"__0_0.distcp": 1}, {"a\0b": 1}, {"../x": 1}],
)
def test_checksums_that_are_none(sharded: ShardedCheckpoints, sums: object) -> None:
    """A list of them that was changed makes its checkpoint a damaged one."""
    for step in (1, 2):
        saved(sharded, step)
    sharded.finish()
    about = sharded.folder / "step-00000002" / COMPLETE
    about.write_text(json.dumps({**json.loads(about.read_text()), "crc32": sums}))
    told: list[str] = []
    found = sharded.find(told.append)
    assert found is not None and found.step == 1
    assert "step-00000002 is damaged (" in told[0] and "\n" not in told[0]


def test_a_process_with_nothing_to_write(sharded: ShardedCheckpoints) -> None:
    """Its part is empty, and nobody hears of its checksum."""
    saved(sharded, 1)
    sharded.finish()
    folder = sharded.folder / "step-00000001"
    writer = SummedWriter(folder)
    writer.set_up_storage_writer(False)
    plan = SavePlan([], storage_data=_StoragePrefix("__1_"))
    assert writer.write_data(plan, DefaultSavePlanner()).value() == []
    assert (folder / "__1_0.distcp").read_bytes() == b""
    about = json.loads((folder / COMPLETE).read_text())
    (folder / COMPLETE).unlink()
    sharded._complete(folder, about)
    told: list[str] = []
    found = sharded.find(told.append)
    assert found is not None and found.step == 1 and not told


@pytest.mark.parametrize("sizes", [(5, 3), (LARGE + 1, 7, 2 * LARGE)])
def test_the_sum_is_that_of_the_file(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """Large writes, which another thread counts, and small ones; a write that fails says so."""
    rng = np.random.default_rng(0)
    files = _Files()
    with files.create_stream(tmp_path / "part", "wb") as stream:
        for size in sizes:
            stream.write(memoryview(rng.bytes(size)))
    crc = zlib.crc32((tmp_path / "part").read_bytes())
    assert files.sums == {"part": crc} and (tmp_path / "part").stat().st_size == sum(sizes)
    assert changed(tmp_path, {"part": crc}) is None and changed(tmp_path, {"part": crc ^ 1}) == "bad checksum of part"
    assert changed(tmp_path, {"none": 0}) == "cannot read none: No such file or directory"
    with (
        pytest.raises(OSError, match="write"),
        files.create_stream(tmp_path / "part", "rb") as stream,
    ):
        stream.write(bytes(LARGE))


def test_training_goes_on_while_a_checkpoint_is_written(sharded: ShardedCheckpoints, monkeypatch) -> None:
    from torch.distributed.checkpoint import FileSystemWriter

    go, write = threading.Event(), FileSystemWriter.write_data

    def late(self, *args):
        assert go.wait(60)
        return write(self, *args)

    monkeypatch.setattr(FileSystemWriter, "write_data", late)
    module = saved(sharded, 1)
    weight = module.weight.detach().clone()
    assert not sharded.pending[1].done() and not list(sharded.folder.glob(f"*/{COMPLETE}"))
    with torch.no_grad():
        module.weight.zero_()  # the training goes on: what is written are the weights of the call
    go.set()
    sharded.finish()
    found = sharded.find(lambda line: None)
    assert found is not None and found.step == 1
    other = torch.nn.Linear(3, 2)
    sharded.load(found, other, torch.optim.AdamW(other.parameters()))
    assert torch.equal(other.weight, weight)


def test_a_checkpoint_that_cannot_be_called_complete(sharded: ShardedCheckpoints, monkeypatch) -> None:
    saved(sharded, 1)
    sharded.finish()

    def fails(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardedCheckpoints, "_complete", fails)
        saved(sharded, 2)
        with pytest.raises(UserError, match=r"cannot write .*step-00000002: .*No space left on device"):
            sharded.finish()
    told: list[str] = []
    found = sharded.find(told.append)
    assert found is not None and found.step == 1
    assert "complete.json is missing: it was never completed" in told[0] and "going on from step-00000001" in told[0]


def test_torchrun_from_the_command_line(trained_store, tmp_path: Path) -> None:
    """The real launcher and the real command; then a run that is not the one in the folder."""
    words = ["train", "decoder", "--recipe", "smoke", "--steps", "4", "--data", str(trained_store.store)]
    words += ["--tokenizer", str(trained_store.tokenizer), "--out", str(tmp_path / "run")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kinetok"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "src")

    def torchrun(*more: str) -> subprocess.CompletedProcess[str]:
        command = [*launch, *words, *more]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    options = ["--checkpointing", "--ema", "0.9", "--clip-norm", "0.5", "--positions", "200", "--resume"]
    done = torchrun(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("wrote ") == 1
    loop = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]["loop"]
    assert (loop["ema"], loop["clip_norm"], loop["steps"]) == (0.9, 0.5, 4)
    assert len(losses(tmp_path / "run")) == 5 and (tmp_path / "run" / "model" / "kinetok.json").exists()
    again = torchrun("--resume")
    assert again.returncode and again.stderr.count("kinetok: ") == 1 and "it differs in clip_norm, ema" in again.stderr
