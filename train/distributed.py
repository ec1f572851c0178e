"""Training in many processes: FSDP2 over all of them, sharded checkpoints, and errors that every process hears of."""

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, async_save, load
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from kinetok.errors import UserError
from kinetok.files import whole_file
from kinetok.train.checkpoints import FOLDER, FileCheckpoints, Found, save_whole
from kinetok.train.loop import Checkpoints, OneProcess, Result
from kinetok.train.packing import PackedDecoder, fill_rest
from kinetok.train.sums import SummedWriter, changed

COMPLETE, REST = "complete.json", "rest.pt"
TIMEOUT = timedelta(minutes=10)  # until a process that no longer answers counts as lost
KEPT = 2
LOST = re.compile(r"closed by peer|reset by peer|timed out|timeout|broken pipe|connection refused", re.IGNORECASE)


class SaidElsewhere(UserError):
    """A ``UserError`` that every process has and the first one says."""


def launched() -> bool:
    """Whether torchrun (or whatever sets its variables) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start_processes() -> OneProcess:
    """All processes that torchrun started, or this one."""
    processes = ManyProcesses() if launched() else OneProcess()
    if processes.rank:
        logging.disable(logging.WARNING)  # the first process says it
    return processes


class ManyProcesses(OneProcess):
    """All processes that torchrun started: parameters, gradients and optimiser are spread over them (FSDP2)."""

    def __init__(self) -> None:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # gloo beside nccl: asynchronous checkpoints talk on the CPU while the GPUs train.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self.mesh = init_device_mesh(self.device.type, (self.world,))
        # Checkpoints are written in a thread: its messages must not mix with those of the training.
        self.writers = dist.new_group(backend="gloo")

    @contextmanager
    def running(self) -> Iterator[None]:
        """The training itself: a process that no longer answers becomes a ``UserError`` in the others.

        Of an error that all have, the first process alone speaks; the others end with the same exit code.
        """
        try:
            yield
        except SaidElsewhere:
            raise SystemExit(2) from None
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not LOST.search(str(error)):
                raise
            detail = " ".join(str(error).split())[:160]
            raise UserError(
                f"process {self.rank} of {self.world} lost another one ({detail}): see that process's own message, then "
                "start all of them again with --resume"
            ) from error
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    def place(self, module: PackedDecoder, fill: Callable[[nn.Module], None], *, bf16: bool) -> None:
        """Fill a module that is on the meta device block by block and spread each: no process ever holds all of it.

        The forward pass gathers a block at a time.
        """
        # Inputs are not cast: the rotary table would be rounded.
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in module.decoder.blocks:
            fill(block)
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        fill_rest(module, fill)
        fully_shard(module, mesh=self.mesh, mp_policy=policy)

    def spread(self, module: nn.Module) -> None:
        fully_shard(module.to(self.device), mesh=self.mesh)

    @contextmanager
    def computing(self, bf16: bool) -> Iterator[None]:
        yield  # the gathered weights are in bf16 already

    @contextmanager
    def gathering_gradients(self, module: nn.Module, last: bool) -> Iterator[None]:
        assert isinstance(module, FSDPModule)
        module.set_requires_gradient_sync(last)
        yield

    def total(self, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    def checkpoints(self, run: Path) -> Checkpoints:
        return ShardedCheckpoints(run, self)

    def agree(self, call: Callable[[], Result]) -> Result:
        said: list[Any] = [None, None]
        if self.rank == 0:
            try:
                said[0] = call()
            except UserError as error:
                said[1] = str(error)
        dist.broadcast_object_list(said, src=0)
        if said[1] is not None:
            raise self.error(said[1])
        return said[0]

    def first(self, call: Callable[[], Result]) -> Result:
        results = []
        self.agree(lambda: results.append(call()))
        return results[0] if results else call()

    def error(self, message: str) -> UserError:
        return SaidElsewhere(message) if self.rank else UserError(message)

    def whole(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        result = {}
        for name, value in state.items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if self.rank == 0:
                result[name] = full.cpu()
        return result

    def plain(self, value: Tensor) -> Tensor:
        return value.full_tensor() if isinstance(value, DTensor) else value

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        numbers = torch.stack([self.plain(value.detach()).double() for value in values.values()])
        dist.all_reduce(numbers)
        return dict(zip(values, (numbers / self.world).tolist(), strict=True))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class ShardedCheckpoints:
    """``checkpoints/step-*``: each process writes its part while training goes on; ``complete.json`` comes last.

    It names every file with its size and a checksum, a SHA-256 of the small ones and a CRC-32 of the parts, so a half-written,
    cut or changed checkpoint is known. Parts of an earlier version have none and are taken as they are.
    """

    def __init__(self, run: Path, processes: ManyProcesses) -> None:
        self.folder = run / FOLDER
        self.processes = processes
        self.pending: tuple[Path, Future[Any]] | None = None

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True)

    def any(self) -> bool:
        return bool(self._folders())

    def _state(self, module: nn.Module, optimizer: torch.optim.Optimizer, average: Any) -> dict[str, Any]:
        state = {"model": module.state_dict(), "optimizer": get_optimizer_state_dict(module, optimizer)}
        return state if average is None else {**state, "average": dict(average)}

    def save(self, module: nn.Module, optimizer: torch.optim.Optimizer, rest: Mapping[str, Any]) -> None:
        self.finish()
        folder = self.folder / f"step-{rest['step']:08d}"
        small = {name: value for name, value in rest.items() if name != "average"}

        def prepare() -> None:
            shutil.rmtree(folder, ignore_errors=True)  # a half-written one of a run that was killed
            save_whole(folder / REST, {**small, "has_average": rest["average"] is not None})

        self.processes.agree(prepare)
        state = self._state(module, optimizer, rest["average"])
        writer = SummedWriter(folder)
        response = async_save(state, storage_writer=writer, process_group=self.processes.writers)
        future = response if isinstance(response, Future) else response.upload_completion
        about = {"identity": rest["identity"], "step": rest["step"]}
        complete: Future[None] = Future()

        def written(one: Future[Any]) -> None:
            try:
                one.result()
                # The first process's future ends after every process has written and the list of files is there.
                if self.processes.rank == 0:
                    self._complete(folder, {**about, "crc32": writer.sums})
            except BaseException as error:  # for finish() to raise: a callback's own error is only logged
                complete.set_exception(error)
            else:
                complete.set_result(None)

        future.add_done_callback(written)
        self.pending = folder, complete

    def _complete(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Call a checkpoint complete; older ones than the last two go."""
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        digests = {name: _digest(folder / name) for name in (REST, ".metadata")}
        with whole_file(folder / COMPLETE) as temporary:
            temporary.write_text(json.dumps({**about, "files": files, "sha256": digests}), encoding="utf-8")
        for old in [one for one in self._folders() if (one / COMPLETE).exists()][KEPT:]:
            shutil.rmtree(old)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. ``UserError``, in all processes, where one of them could not."""
        if self.pending is None:
            return
        (folder, future), self.pending = self.pending, None
        error = future.exception()
        told = self._first(None if error is None else " ".join(str(error).split())[-200:])
        if told is not None:
            raise self.processes.error(f"cannot write {folder}: {told}")

    def _first(self, mine: str | None) -> str | None:
        """The first problem that any process has, in all of them."""
        problems: list[str | None] = [None] * self.processes.world
        dist.all_gather_object(problems, mine)
        return next((problem for problem in problems if problem is not None), None)

    def find(self, told: Callable[[str], None]) -> Found | None:
        """As ``FileCheckpoints.find``; each process compares its share of the parts with their checksums."""
        problems: list[str] = []
        for folder in self.processes.agree(self._candidates):
            problem, found, sums = self.processes.agree(partial(self._look, folder))
            mine = dict(sorted(sums.items())[self.processes.rank :: self.processes.world])
            problem = problem or self._first(changed(folder, mine))
            if problem is None:
                for line in problems:
                    told(f"{line}; going on from {folder.name}")
                return found
            problems.append(f"{folder} is damaged ({problem})")
        if problems:
            raise self.processes.error(
                f"{'; '.join(problems)}: no whole checkpoint is left; name another folder with --out"
            )
        return None

    def _candidates(self) -> list[Path]:
        run = self.folder.parent
        if FileCheckpoints(run).any():
            raise UserError(
                f"{run}: its checkpoints are those of one process: continue it without torchrun, or name another folder "
                "with --out"
            )
        return self._folders()

    @staticmethod
    def _look(folder: Path) -> tuple[str | None, Found | None, dict[str, int]]:
        """What is wrong with a checkpoint but for the content of its parts; what it is; and the parts' checksums."""
        try:
            about = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
            for name, size in about["files"].items():
                if (folder / name).stat().st_size != size:
                    return f"{name} has {(folder / name).stat().st_size} bytes, expected {size}", None, {}
            for name, digest in about["sha256"].items():
                if _digest(folder / name) != digest:
                    return f"bad checksum of {name}", None, {}
            sums = {name: int(crc) for name, crc in about.get("crc32", {}).items()}
            # A process that has nothing to write makes an empty part, of which nobody hears.
            parts = {name for name, size in about["files"].items() if size and name.endswith(DEFAULT_SUFFIX)}
            if "crc32" in about and not parts <= sums.keys() <= about["files"].keys():
                return f"{COMPLETE} has not the checksums of its parts", None, {}
            state = torch.load(folder / REST, weights_only=True)
            found = Found(folder, state["identity"], int(state["step"]), {"has_average": state["has_average"]})
            return None, found, sums
        except FileNotFoundError as error:
            return f"{Path(str(error.filename)).name} is missing: it was never completed", None, {}
        except (
            OSError,
            RuntimeError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            pickle.UnpicklingError,
        ) as error:
            return " ".join(str(error).split())[:200], None, {}

    def load(self, found: Found, module: nn.Module, optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
        """Fills the sharded module and optimiser; also from a checkpoint of another number of processes."""
        rest = torch.load(found.path / REST, weights_only=True)
        average = {name: torch.empty_like(value) for name, value in module.state_dict().items()}
        state = self._state(module, optimizer, average if rest["has_average"] else None)
        load(state, storage_reader=FileSystemReader(found.path))
        set_optimizer_state_dict(module, optimizer, state["optimizer"])
        return {**rest, "average": state.get("average")}
