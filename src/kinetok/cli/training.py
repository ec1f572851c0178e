"""``kinetok train``."""

from pathlib import Path
from typing import Annotated

import typer

from kinetok.cli.common import example
from kinetok.errors import UserError

DATA = typer.Option(help="Motion data: data/cmu, or what kinetok data import wrote.")
RESUME = typer.Option(help="Continue the run in --out.")
SEED = typer.Option(help="Seed of the run; the recipe's own without.", min=0)
THREADS = typer.Option(help="CPU threads; torch's choice without.", min=1)


def register(app: typer.Typer) -> None:
    train = typer.Typer(help="Train a tokenizer, then a decoder on its tokens.")
    train.command(epilog=example("kinetok train tokenizer --recipe mini"))(tokenizer)
    train.command(
        epilog=example(
            "kinetok train decoder --recipe mini --tokenizer runs/tokenizer/tokenizer.pt",
            "kinetok train decoder --init default --data mydata --out runs/mine",
        )
    )(decoder)
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
    recipe: Annotated[str | None, typer.Option(help="The recipe's name; mini without.")] = None,
    data: Annotated[Path, DATA] = Path("data/cmu"),
    tokenizer: Annotated[
        Path | None, typer.Option(help="The trained tokenizer; runs/tokenizer/tokenizer.pt without.")
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="Fine-tune this model instead: default, a model directory or a hub id.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/decoder, or runs/finetune, without.")
    ] = None,
    resume: Annotated[bool, RESUME] = False,
    seed: Annotated[int | None, SEED] = None,
    steps: Annotated[int | None, typer.Option(help="With --init: how many steps; 300 without.", min=1)] = None,
    threads: Annotated[int | None, THREADS] = None,
) -> None:
    """Train a decoder, or fine-tune a model; its folder then holds model/, which --model of generate takes."""
    _threads(threads)
    if init is None:
        from kinetok.train.decoder import train

        if steps is not None:
            raise UserError("--steps goes with --init; a recipe has its own number of steps")
        tokens = tokenizer or Path("runs/tokenizer/tokenizer.pt")
        folder = out or Path("runs/decoder")
        made = train(recipe=recipe or "mini", data=data, tokenizer=tokens, out=folder, resume=resume, seed=seed)
        print("wrote", made)
        return
    from kinetok.train.finetune import finetune

    given = next(
        (name for name, value in (("--recipe", recipe), ("--tokenizer", tokenizer)) if value is not None), None
    )
    if given is not None:
        raise UserError(f"{given} does not go with --init: the model brings its own tokenizer and sizes")
    tuned = finetune(init=init, data=data, out=out or Path("runs/finetune"), resume=resume, steps=steps, seed=seed)
    print(
        f"wrote {tuned.model}  (validation loss {tuned.before:.3f} before, {tuned.after:.3f} after {tuned.step} steps)"
    )
    print(f"the tokenizer, which stays as it is, reproduces these clips within {tuned.mpjpe_mm:.0f} mm a joint")
    if tuned.after >= tuned.before:
        print("the validation loss did not fall: what it learned does not carry over to the clips held out")


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
