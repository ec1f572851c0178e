"""The loop that all trainings share: schedule, clipping, moving average, validation, logs, exact resuming."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kinetok.errors import UserError
from kinetok.files import alone, whole_file
from kinetok.train.checkpoints import FileCheckpoints, Found, save_whole
from kinetok.train.journal import Journal, Silent
from kinetok.train.optim import Average, LoopConfig, adamw, learning_rate
from kinetok.train.packing import PackedDecoder, fill_rest

BEST, ABOUT = "best.pt", "run.json"
OUTPUT = (".log", ".out", ".err")  # suffixes of what a shell or slurm writes into the folder of a run
Result = TypeVar("Result")


class Task(Protocol):
    """What is trained: ``module`` holds the parameters, ``loss`` draws a batch, ``validate`` judges a module."""

    @property
    def module(self) -> nn.Module: ...

    def loss(self, step: int, rng: np.random.Generator) -> Mapping[str, Tensor]:
        """Named losses of one batch; "loss" is the one to minimise, and parts of it may have gone backward already.

        rng and torch's own generator are all it may draw from: a resumed run puts both back.
        """
        ...

    def validate(self, module: nn.Module) -> Mapping[str, float]:
        """Named figures of held-out data; the lowest "loss" marks the best checkpoint."""
        ...


class Checkpoints(Protocol):
    """``FileCheckpoints``, or those of several processes (train/distributed.py)."""

    def save(self, module: nn.Module, optimizer: torch.optim.Optimizer, rest: Mapping[str, Any]) -> None: ...
    def any(self) -> bool: ...
    def find(self, told: Callable[[str], None]) -> Found | None: ...
    def load(self, found: Found, module: nn.Module, optimizer: torch.optim.Optimizer) -> Mapping[str, Any]: ...
    def finish(self) -> None: ...


class OneProcess:
    """Training in this process alone, on a GPU where there is one."""

    def __init__(self) -> None:
        self.rank, self.world = 0, 1
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def running(self) -> AbstractContextManager[None]:
        """Around a whole training."""
        return contextlib.nullcontext()

    def place(self, module: PackedDecoder, fill: Callable[[nn.Module], None], *, bf16: bool) -> None:
        """Fill a module that is on the meta device with its first weights, and bring it to the device."""
        for block in module.decoder.blocks:
            fill(block)
        fill_rest(module, fill)
        module.to(self.device)

    def spread(self, module: nn.Module) -> None:
        """Bring a module to the device that fits into every process and is the same in all of them."""
        module.to(self.device)

    def computing(self, bf16: bool) -> AbstractContextManager[None]:
        """Around a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def gathering_gradients(self, module: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around a backward pass: gradients are added up over the processes in the last one of a step."""
        return contextlib.nullcontext()

    def total(self, value: Tensor) -> Tensor:
        """The sum over the processes."""
        return value

    def plain(self, value: Tensor) -> Tensor:
        """A number of which every process has a share, as a whole."""
        return value

    def divide(
        self, folder: Path, fits: NDArray[np.bool_], splits: NDArray[np.str_], what: str, batch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The clips of a store that fit, of the splits train and val. ``UserError`` where one is empty, or where there are
        more processes than clips to train on, or than a batch has. what: which clips fit, for the error."""
        train, held_out = (np.flatnonzero(fits & (splits == name)) for name in ("train", "val"))
        if not len(train) or not len(held_out):
            raise self.error(
                f"{folder}: expected clips {what} in the splits train and val, got {len(train)} and {len(held_out)}"
            )
        if self.world > min(len(train), batch):
            raise self.error(
                f"more processes than data: {self.world} processes for {len(train)} clips {what} in batches of {batch}"
            )
        return train, held_out

    def checkpoints(self, run: Path) -> Checkpoints:
        return FileCheckpoints(run)

    def agree(self, call: Callable[[], Result]) -> Result:
        """What ``call`` gives the first process, or the ``UserError`` it raises there, in every process."""
        return call()

    def first(self, call: Callable[[], Result]) -> Result:
        """What ``call`` gives each process, the first one before the others: its ``UserError`` is the only one said."""
        return call()

    def error(self, message: str) -> UserError:
        """The error to raise for something that every process knows."""
        return UserError(message)

    def whole(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A state with nothing sharded, in the first process."""
        return state

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Numbers of a step, averaged over the processes."""
        return {name: float(value.detach()) for name, value in values.items()}


def _with_defaults(identity: Any) -> Any:
    """An identity from before a loop option existed is one with the option's default."""
    inner = identity.get("identity") if isinstance(identity, dict) else None
    if isinstance(inner, dict) and isinstance(inner.get("loop"), dict):
        defaults = json.loads(json.dumps(asdict(LoopConfig(steps=0))))
        return {**identity, "identity": {**inner, "loop": {**defaults, **inner["loop"]}}}
    return identity


def _refuse(run: Path, checkpoints: Checkpoints, identity: Any, resume: bool) -> None:
    """Refuse the folder of another run, an existing run that is not resumed, and a folder that holds something else."""
    if (run / ABOUT).exists() or checkpoints.any():
        if not resume:
            raise UserError(
                f"{run}: a run is already here; continue it with --resume, or name another folder with --out"
            )
        if (run / ABOUT).exists():
            _same(run, _described(run / ABOUT), identity)
    elif run.exists():
        try:
            other = sorted(path.name for path in run.iterdir() if not _is_redirected(path))
        except NotADirectoryError as error:
            raise UserError(
                f"{run}: expected a folder for the run, but it is a file; name another with --out"
            ) from error
        if other:
            raise UserError(
                f"{run}: expected a new folder or a run, but it holds other files ({', '.join(other[:3])}); name another "
                "folder with --out"
            )


def _described(about: Path) -> Any:
    try:
        return json.loads(about.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{about}: expected the description of a run, but {error}") from error


def _is_redirected(path: Path) -> bool:
    """What may be in the folder of a run before it begins: its own output, which a shell or slurm sends there, and what is
    hidden (a lock, a file server's own)."""
    return path.name.startswith(".") or (path.is_file() and path.suffix in OUTPUT)


def _begin(run: Path, checkpoints: Checkpoints, identity: Any, resume: bool, stack: ExitStack) -> None:
    """Hold the folder and write what this run is; all that is refused is refused before anything is written."""
    try:
        _refuse(run, checkpoints, identity, resume)
        run.mkdir(parents=True, exist_ok=True)
        stack.enter_context(alone(run, "training in this folder; name another with --out"))
        _refuse(run, checkpoints, identity, resume)  # another process may have begun, and ended, in between
        if not checkpoints.any() and not (run / ABOUT).exists():
            with whole_file(run / ABOUT) as temporary:
                temporary.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {run}: {error.strerror or error}; name another folder with --out") from error


def _same(run: Path, theirs: Any, identity: Any) -> None:
    theirs = _with_defaults(theirs)
    if theirs != identity:
        names = list(dict.fromkeys(_differences(theirs, identity)))
        raise UserError(
            f"{run}: this run was made with another recipe or other data (it differs in {', '.join(names[:4])}); "
            "name another folder with --out"
        )


def _differences(one: Any, other: Any, name: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted({*one, *other})
        return [path for key in keys for path in _differences(one.get(key), other.get(key), key)]
    return [] if one == other else [name or "its description"]


def fit(
    task: Task,
    config: LoopConfig,
    run: str | Path,
    *,
    resume: bool = False,
    identity: Mapping[str, Any],
    processes: OneProcess | None = None,
    sample: Callable[[nn.Module, int], None] | None = None,
    sample_every: int = 0,
) -> Path:
    """Train ``task`` in the folder ``run``; returns the file with the best averaged weights.

    ``run`` then holds ``best.pt`` ({"model", "step", "figures"}), ``last.pt`` and ``previous.pt`` (all that a resumed run
    needs), ``run.json`` (what the run is), ``log.jsonl`` and tensorboard events. ``identity`` is what makes the run what it
    is: a resumed run with another one is refused. A run that is stopped at any moment and resumed has the same losses, bit
    for bit on a CPU with as many threads. A damaged checkpoint is reported and the one before is used.
    sample is called with the averaged module every ``sample_every`` steps, to show what it does so far.
    Raises ``UserError`` for an existing run that is not resumed, a folder that holds other files than output sent there
    (``.log``, ``.out``, ``.err``) or in which another process trains, a loss or gradient that is not finite, a full disk,
    and where no whole checkpoint is left.
    """
    run = Path(run)
    processes = processes or OneProcess()
    checkpoints = processes.checkpoints(run)
    described = json.loads(json.dumps({"identity": identity, "steps": config.steps, "seed": config.seed}))
    with ExitStack() as stack:
        processes.agree(lambda: _begin(run, checkpoints, described, resume, stack))
        return _train(task, config, run, described, processes, checkpoints, stack, sample, sample_every)


def _train(
    task: Task,
    config: LoopConfig,
    run: Path,
    identity: Any,
    processes: OneProcess,
    checkpoints: Checkpoints,
    stack: ExitStack,
    sample: Callable[[nn.Module, int], None] | None,
    sample_every: int,
) -> Path:
    module = task.module
    optimizer = adamw(module, config)
    average = Average(module) if config.ema is not None else None
    rng = np.random.default_rng(config.seed)
    torch.manual_seed(config.seed)
    step, lowest, spent, spent_cpu = 0, math.inf, 0.0, 0.0
    notes: list[str] = []
    found = checkpoints.find(notes.append)
    if found is not None:
        theirs = found.identity
        processes.agree(lambda: _same(run, theirs, identity))
        state = checkpoints.load(found, module, optimizer)
        if average is not None:
            average.load(state["average"])
        rng.bit_generator.state = state["rng"]
        torch.set_rng_state(state["torch_rng"])
        step, lowest, spent, spent_cpu = (state[key] for key in ("step", "lowest", "seconds", "cpu_seconds"))
        del state, found

    began, began_cpu = time.perf_counter() - spent, time.process_time() - spent_cpu
    logged = step, spent
    journal = Journal(run, config.steps, step, stack) if processes.rank == 0 else Silent()
    for note in notes:
        journal.say(note)
    while step < config.steps:
        rate = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        module.train()
        optimizer.zero_grad(set_to_none=True)
        losses = task.loss(step, rng)
        losses["loss"].backward()
        most = math.inf if config.clip_norm is None else config.clip_norm
        norm = processes.plain(nn.utils.clip_grad_norm_(module.parameters(), most))
        # One process's loss may be bad and another's not: all have to stop together.
        bad = processes.total(torch.stack((losses["loss"].detach().isfinite(), norm.isfinite())).logical_not().float())
        if bad.any():
            value = processes.mean({"loss": losses["loss"]})["loss"]
            what = f"the loss is {value}" if bad[0] else "the gradient is not finite"
            raise processes.error(f"{run}: {what} at step {step}; lower the learning rate")
        optimizer.step()
        if average is not None:
            assert config.ema is not None
            average.follow(module, min(config.ema, (step + 1) / (step + 10)))
        step += 1
        journal.step(step, losses["loss"].item(), rate)
        if step % config.log_every == 0:
            values = processes.mean({**losses, "grad_norm": norm})
            values["seconds"], values["cpu_seconds"] = time.perf_counter() - began, time.process_time() - began_cpu
            values["seconds_per_step"] = (values["seconds"] - logged[1]) / (step - logged[0])
            logged = step, values["seconds"]
            journal.write("train", step, {**values, "lr": rate})
        validates = step % config.validate_every == 0 or step == config.steps
        samples = sample is not None and sample_every and step % sample_every == 0
        if validates or samples:
            with average.applied(module) if average is not None else _evaluating(module):
                if validates:
                    figures = {name: float(value) for name, value in task.validate(module).items()}
                    journal.write("validate", step, figures)
                    if not math.isfinite(figures["loss"]):  # the same in every process; it would become the result
                        raise processes.error(
                            f"{run}: the validation loss is {figures['loss']} at step {step}; lower the learning rate"
                        )
                    if figures["loss"] < lowest or config.keep == "last":
                        lowest = min(lowest, figures["loss"])
                        weights = processes.whole(module.state_dict())
                        if processes.rank == 0:
                            save_whole(run / BEST, {"model": weights, "step": step, "figures": figures})
                if samples:
                    assert sample is not None
                    with torch.random.fork_rng([]):  # whether samples are drawn must not change the run
                        sample(module, step)
        if step % config.save_every == 0 or step == config.steps:
            checkpoints.save(
                module,
                optimizer,
                {
                    "identity": identity,
                    "average": average.state if average is not None else None,
                    "rng": rng.bit_generator.state,
                    "torch_rng": torch.get_rng_state(),
                    "step": step,
                    "lowest": lowest,
                    "seconds": time.perf_counter() - began,
                    "cpu_seconds": time.process_time() - began_cpu,
                },
            )
    checkpoints.finish()
    return run / BEST


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[nn.Module]:
    try:
        yield module.eval()
    finally:
        module.train()
