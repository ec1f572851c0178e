"""What a run needs to go on after a crash: two checkpoints, so that a damaged one never is the only one."""

import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kinetok.errors import UserError
from kinetok.files import whole_file

LAST, PREVIOUS = "last.pt", "previous.pt"  # of one process
FOLDER = "checkpoints"  # of many (train/distributed.py)


def save_whole(path: Path, state: Any) -> None:
    """``torch.save`` to a file that appears complete and on the disk, or not at all. ``UserError`` for a full disk."""
    with whole_file(path) as temporary:
        _write(temporary, path, state)


def _write(temporary: Path, path: Path, state: Any) -> None:
    with temporary.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch wraps what the file says in an error of its own archive writer
            cause = error.__context__ or error
            raise UserError(f"cannot write {path}: {getattr(cause, 'strerror', None) or cause}") from error
        file.flush()
        os.fsync(file.fileno())  # a rename may reach the disk before the bytes do


def damage(path: Path) -> str | None:
    """What is wrong with a file of ``torch.save``, by its own checksums; None for a whole one."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return f"bad checksum of {bad}" if bad else None


class Damaged(Exception):
    """Why a file of ``torch.save`` cannot be used, in one line."""


def load_whole(path: Path, *, mmap: bool = False) -> Any:
    """What ``save_whole`` wrote. Raises ``Damaged`` where that is not there, cut, changed, or something else."""
    problem = damage(path)
    if problem is not None:
        raise Damaged(problem)
    try:
        return torch.load(path, weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise Damaged(" ".join(str(error).split())[:200]) from error


def load_best(path: Path, *, mmap: bool = False) -> Mapping[str, Any]:
    """The weights that a run chose: {"model", "step", "figures"}. ``UserError`` where they are damaged or gone."""
    try:
        state = load_whole(path, mmap=mmap)
    except Damaged as error:
        raise UserError(
            f"{path}: expected the weights of this run, but they are damaged or gone ({error}); name another folder with --out"
        ) from error
    return state


@dataclass(frozen=True, slots=True)
class Found:
    """A whole checkpoint: where it is, the identity of its run, and what it holds (in one process) or how to load it."""

    path: Path
    identity: Any
    step: int
    state: Mapping[str, Any]


class FileCheckpoints:
    """``last.pt`` and ``previous.pt`` of one process, each {"identity", "step", "model", "optimizer", ...}."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def save(self, module: nn.Module, optimizer: torch.optim.Optimizer, rest: Mapping[str, Any]) -> None:
        """Write ``last.pt``; the one before becomes ``previous.pt``. ``UserError`` for a full disk, both then as before."""
        last = self.run / LAST
        with whole_file(last) as temporary:
            _write(temporary, last, {**rest, "model": module.state_dict(), "optimizer": optimizer.state_dict()})
            if last.exists():
                last.replace(self.run / PREVIOUS)

    def any(self) -> bool:
        return any((self.run / name).exists() for name in (LAST, PREVIOUS))

    def find(self, told: Callable[[str], None]) -> Found | None:
        """The newest whole checkpoint, None where there is none at all; ``told`` hears of damaged ones.

        Raises ``UserError`` when there are checkpoints and all are damaged, or those of several processes.
        """
        if any((self.run / FOLDER).glob("*")):
            raise UserError(
                f"{self.run}: its checkpoints are those of several processes: continue it with torchrun, or name another "
                "folder with --out"
            )
        problems: list[str] = []
        for path in (self.run / LAST, self.run / PREVIOUS):
            if not path.exists():
                continue
            try:
                state = load_whole(path)
                found = Found(path, state["identity"], int(state["step"]), state)
            except (Damaged, KeyError, TypeError, ValueError) as error:
                problems.append(f"{path} is damaged ({error})")
                continue
            for line in problems:
                told(f"{line}; going on from {path.name}, step {found.step}")
            return found
        if problems:
            raise UserError(f"{'; '.join(problems)}: no whole checkpoint is left; name another folder with --out")
        return None

    def load(self, found: Found, module: nn.Module, optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
        module.load_state_dict(found.state["model"])
        optimizer.load_state_dict(found.state["optimizer"])
        return found.state

    def finish(self) -> None:
        """Wait for what is still being written: nothing here."""
