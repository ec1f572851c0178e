"""The command line: thin commands over the rooms, one line and exit code 2 for what a user can mend."""

import sys
from typing import Any

import typer

from kinetok.cli import convert, doctor, embed, generate, importing, training, view
from kinetok.cli.common import fail
from kinetok.errors import UserError

app = typer.Typer(
    name="kinetok",
    help="A sentence to human motion.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for module in (generate, view, convert, embed, importing, training, doctor):
    module.register(app)

# typer carries click inside from some version on, so its base class of usage errors is reached through typer's own.
USAGE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main() -> None:
    """Run the command line; exits with 0, 2 for a user's error, 130 when interrupted."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except UserError as error:
        fail(str(error))
    except (typer.Abort, KeyboardInterrupt):
        fail("interrupted", 130)
    except USAGE_ERROR as error:
        fail(f"{error.format_message()} Try --help.")
