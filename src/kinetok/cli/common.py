"""What the commands share."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kinetok.errors import UserError

if TYPE_CHECKING:
    from kinetok.runtime import Engine

SMALL = 20_000_000  # parameters


def fail(message: str, code: int = 2) -> NoReturn:
    """One line on standard error, then exit. What a file put into it cannot steer the terminal, nor fail to be encoded."""
    line = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in " ".join(message.split()))
    print(f"kinetok: {line}", file=sys.stderr)
    sys.exit(code)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def example(*lines: str) -> str:
    """The example that a command's help ends with; a blank line is what the help keeps as a line break."""
    return "\n\n".join(("Examples:" if len(lines) > 1 else "Example:", *(f"[bold]{line}[/bold]" for line in lines)))


@contextmanager
def output_folder(path: Path) -> Iterator[None]:
    """Work with a folder that is made here where it is missing; of one in which nothing was written before something was
    raised, nothing is left. ``UserError`` when it cannot be a folder."""
    made: list[Path] = []
    try:
        try:
            made += (folder for folder in (path, *path.parents) if not folder.exists())
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {path}: {error.strerror or error}") from error
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # one that is not empty, or was never made
                folder.rmdir()
        raise


@contextmanager
def bar(title: str, *, shown: bool) -> Iterator[Any]:
    """A progress bar on standard error: yields ``update(done, of, what)``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    # Off a terminal a bar would leave its last line in somebody's log.
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True) as progress:
        task = progress.add_task(title, total=None)

        def update(done: int, of: int, what: str = title) -> None:
            progress.update(task, completed=done, total=of, description=what)

        yield update


def few_threads_for_small_models(engine: "Engine") -> None:
    """One thread where the matrices are too small to share: as fast, and not held up by a busy neighbour core."""
    import torch

    about = engine.describe()
    if about["device"] == "cpu" and about["parameters"] < SMALL:
        torch.set_num_threads(1)
