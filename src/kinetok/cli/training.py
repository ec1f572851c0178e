"""``kinetok train``."""

from pathlib import Path
from typing import Annotated

import typer

from kinetok.cli.common import example

DATA = typer.Option(help="Motion data in the form of data/cmu.")
RESUME = typer.Option(help="Continue the run in --out.")
SEED = typer.Option(help="Seed of the run; the recipe's own without.", min=0)
THREADS = typer.Option(help="CPU threads; torch's choice without.", min=1)


def register(app: typer.Typer) -> None:
    train = typer.Typer(help="Train a tokenizer, then a decoder on its tokens.")
    train.command(epilog=example("kinetok train tokenizer --recipe mini"))(tokenizer)
    train.command(epilog=example("kinetok train decoder --recipe mini --tokenizer runs/tokenizer/tokenizer.pt"))(
        decoder
    )
    train.command(epilog=example("kinetok train evaluator --recipe mini"))(evaluator)
    app.add_typer(train, name="train", epilog=example("kinetok train tokenizer --recipe mini"))


def _threads(count: int | None) -> None:
    if count is not None:
        import torch

        torch.set_num_threads(count)


def tokenizer(
    recipe: Annotated[str, typer.Option(help="The recipe's name.")] = "mini",
    data: Annotated[Path, DATA] = Path("data/cmu"),
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/tokenizer"),
    resume: Annotated[bool, RESUME] = False,
    seed: Annotated[int | None, SEED] = None,
    threads: Annotated[int | None, THREADS] = None,
) -> None:
    """Train a motion tokenizer."""
    from kinetok.train.tokenizer import train

    _threads(threads)
    print("wrote", train(recipe=recipe, data=data, out=out, resume=resume, seed=seed))


def decoder(
    recipe: Annotated[str, typer.Option(help="The recipe's name.")] = "mini",
    data: Annotated[Path, DATA] = Path("data/cmu"),
    tokenizer: Annotated[Path, typer.Option(help="The trained tokenizer.")] = Path("runs/tokenizer/tokenizer.pt"),
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/decoder"),
    resume: Annotated[bool, RESUME] = False,
    seed: Annotated[int | None, SEED] = None,
    threads: Annotated[int | None, THREADS] = None,
) -> None:
    """Train a decoder; its folder then holds model/, which --model of generate takes."""
    from kinetok.train.decoder import train

    _threads(threads)
    print("wrote", train(recipe=recipe, data=data, tokenizer=tokenizer, out=out, resume=resume, seed=seed))


def evaluator(
    recipe: Annotated[str, typer.Option(help="The recipe's name.")] = "mini",
    data: Annotated[Path, DATA] = Path("data/cmu"),
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/evaluator"),
    resume: Annotated[bool, RESUME] = False,
    threads: Annotated[int | None, THREADS] = None,
) -> None:
    """Train an evaluator, which measures how well motions fit their captions (kinetok evaluate)."""
    from kinetok.train.evaluator import train

    _threads(threads)
    print("wrote", train(recipe=recipe, data=data, out=out, resume=resume))
