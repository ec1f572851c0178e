"""``kinetok import-checkpoint`` and ``kinetok verify-checkpoint``."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kinetok.cli.common import example, print_json
from kinetok.errors import UserError


def register(app: typer.Typer) -> None:
    app.command(
        "import-checkpoint",
        epilog=example(
            "kinetok import-checkpoint models/7B --tokenizer fsq.pth --decoder 7B.pth --mean mean.npy --std std.npy",
            "kinetok import-checkpoint models/3B --artifact FOLDER",
        ),
    )(import_command)
    app.command("verify-checkpoint", epilog=example("kinetok verify-checkpoint models/7B --against saved.npz"))(verify)


def import_command(
    out: Annotated[Path, typer.Argument(help="The model directory to write.")],
    tokenizer: Annotated[Path | None, typer.Option(help="The released tokenizer (.pth or .safetensors).")] = None,
    decoder: Annotated[Path | None, typer.Option(help="The released transformer.")] = None,
    mean: Annotated[Path | None, typer.Option(help="mean.npy, 272 numbers.")] = None,
    std: Annotated[Path | None, typer.Option(help="std.npy, 272 numbers.")] = None,
    artifact: Annotated[Path | None, typer.Option(help="A folder with all of these as safetensors.")] = None,
    config: Annotated[list[str] | None, typer.Option(help="KEY=VALUE that shapes do not show, e.g. n_head=16.")] = None,
) -> None:
    """Turn released checkpoints into a model directory. Nothing in the files can run code."""
    from kinetok.model.checkpoint import import_checkpoint

    print(
        "wrote",
        import_checkpoint(
            out,
            tokenizer=tokenizer,
            decoder=decoder,
            mean=mean,
            std=std,
            artifact=artifact,
            config=dict(_option(text) for text in config or ()),
            progress=(lambda text: print(text, file=sys.stderr)) if sys.stderr.isatty() else None,
        ),
    )


def _option(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--config: expected KEY=VALUE, got {text!r}")
    words: dict[str, object] = {"true": True, "false": False, "none": None}
    return key, int(value) if value.isdecimal() else words.get(value.lower(), value)


def verify(
    model: Annotated[str, typer.Argument(help="A model directory.")],
    against: Annotated[Path, typer.Option(help="Arrays saved from the authors' code (docs/checkpoints.md).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare our logits, tokens and frames with the authors'. Exit code 1 when they differ."""
    from kinetok.model.verify import verify_checkpoint

    report = verify_checkpoint(model, against)
    if as_json:
        print_json({**asdict(report), "passed": report.passed})
    else:
        print(report)
    if not report.passed:
        raise typer.Exit(1)
