"""What a run tells: JSON lines, tensorboard, and a live view on a terminal."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kinetok.errors import UserError, missing_package
from kinetok.files import whole_file

LOG = "log.jsonl"


def cut_log(path: Path, step: int) -> None:
    """Drop the lines after ``step``, which a resumed run writes again, and a line that a crash left half written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    with whole_file(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


@contextlib.contextmanager
def _writing(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write the log of {run}: {error.strerror or error}") from error


class Journal:
    """The journal of the process that tells: opened after the checkpoint is read, at its ``step``."""

    def __init__(self, run: Path, steps: int, step: int, stack: ExitStack) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing_package("tensorboard", "train", "training") from error
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.run = run
        self.console = Console()
        self.shown: dict[str, str] = {}
        with _writing(run):
            cut_log(run / LOG, step)
            self.lines = stack.enter_context((run / LOG).open("a", encoding="utf-8"))
            self.board = stack.enter_context(SummaryWriter(str(run), purge_step=step + 1 if step else None))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=self.console)
        self.bar = self.progress.add_task(run.name, total=steps, completed=step)
        self.live: Any = None
        if self.console.is_terminal:
            live = Live(get_renderable=self._view, console=self.console, refresh_per_second=4)
            self.live = stack.enter_context(live)

    def _view(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for name, value in self.shown.items():
            table.add_row(f"[dim]{name}[/dim]", value)
        return Group(table, self.progress)

    def step(self, step: int, loss: float, rate: float) -> None:
        """What is seen of each step."""
        self.progress.update(self.bar, completed=step)
        self.shown |= {"loss": f"{loss:.4f}", "learning rate": f"{rate:.3g}"}

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """A line of the log and tensorboard scalars ``kind/name``. ``UserError`` for a full disk."""
        with _writing(self.run):
            self.lines.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self.lines.flush()
            for name, value in values.items():
                self.board.add_scalar(f"{kind}/{name}", value, step)
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if kind == "validate":
            self.say(f"step {step}: {text}")
        else:
            self.shown["logged"] = text

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Silent:
    """The journal of the other processes."""

    def step(self, step: int, loss: float, rate: float) -> None: ...
    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None: ...
    def say(self, text: str) -> None: ...
