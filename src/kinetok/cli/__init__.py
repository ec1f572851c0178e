"""The command line: thin commands over the rooms, one line and exit code 2 for what a user can mend."""

import errno
import io
import os
import sys
from typing import Any

import typer

from kinetok.cli import (
    aot,
    bench,
    convert,
    data,
    doctor,
    embed,
    evaluate,
    export,
    generate,
    importing,
    quantize,
    training,
    view,
)
from kinetok.cli.common import fail
from kinetok.errors import UserError

INTERRUPTED = 130

app = typer.Typer(
    name="kinetok",
    help="A sentence to human motion.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for module in (
    generate,
    view,
    convert,
    embed,
    importing,
    data,
    training,
    evaluate,
    export,
    doctor,
    aot,
    bench,
    quantize,
):
    module.register(app)

# typer carries click inside from some version on, so its base class of usage errors is reached through typer's own.
USAGE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main() -> None:
    """Run the command line; exits with 0, 2 for a user's error, 130 when interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A console that lacks a prompt's letters shows them as escapes; it is no reason to stop.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False, prog_name="kinetok") or 0
        sys.stdout.flush()
    except UserError as error:
        fail(str(error))
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except USAGE_ERROR as error:
        fail(f"{error.format_message()} Try --help.")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        # Python would try to write the rest once more at exit, and report that as a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail(f"cannot write: {error.strerror}")
    # typer turns an interrupt into this code itself, without a word.
    if code == INTERRUPTED:
        fail("interrupted", INTERRUPTED)
    sys.exit(code)
