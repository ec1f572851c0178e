"""``kinetok train``."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from kinetok.cli.common import example
from kinetok.errors import UserError

DATA = typer.Option(help="Motion data: data/cmu, or what kinetok data import wrote.")
RESUME = typer.Option(help="Continue the run in --out.")
SEED = typer.Option(help="Seed of the run; the recipe's own without.", min=0)
TOKENIZER = Path("runs/tokenizer/tokenizer.pt")
THREADS = typer.Option(help="CPU threads; torch's choice without.", min=1)


def register(app: typer.Typer) -> None:
    train = typer.Typer(help="Train a tokenizer, then a decoder on its tokens.")
    train.command(epilog=example("kinetok train tokenizer --recipe mini"))(tokenizer)
    train.command(
        epilog=example(
            "kinetok train decoder --recipe mini --tokenizer runs/tokenizer/tokenizer.pt",
            "kinetok train decoder --init default --data mydata --out runs/mine",
            "kinetok train decoder --recipe motionmillion-7b --dry-run --processes 40",
            "torchrun --nproc-per-node 8 -m kinetok train decoder --recipe motionmillion-3b --data store",
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
    steps: Annotated[
        int | None, typer.Option(help="With --init (300 without), or a motionmillion recipe.", min=1)
    ] = None,
    threads: Annotated[int | None, THREADS] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what a motionmillion recipe costs.")] = False,
    processes: Annotated[int, typer.Option(help="With --dry-run: GPUs.", min=1)] = 1,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="With --dry-run: the measured rate of all GPUs together.")
    ] = None,
    positions: Annotated[int, typer.Option(help="Positions of one pass of a process.", min=1)] = 16_384,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute activations twice to keep fewer.")
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile of the blocks.")] = False,
    sample_every: Annotated[int, typer.Option(help="Draw sample motions every so many steps; 0: never.", min=0)] = 0,
) -> None:
    """Train a decoder, or fine-tune a model; its folder then holds model/, which --model of generate takes.

    Recipes: mini for a small set, motionmillion-44m to motionmillion-65b for a clip store (docs/training.md).
    """
    _threads(threads)
    if recipe is not None and recipe != "mini" and init is None:
        _scale(
            recipe,
            data,
            tokenizer or TOKENIZER,
            out or Path("runs/decoder"),
            resume,
            seed,
            steps,
            {"pass_positions": positions, "checkpointing": checkpointing, "compile": compile},
            sample_every,
            (processes, tokens_per_second) if dry_run else None,
        )
        return
    for asked, option in ((dry_run, "--dry-run"), (checkpointing, "--checkpointing"), (compile, "--compile")):
        if asked:
            raise UserError(f"{option} goes with a motionmillion recipe")
    if sample_every:
        raise UserError("--sample-every goes with a motionmillion recipe")
    if init is None:
        from kinetok.train.decoder import train

        if steps is not None:
            raise UserError("--steps goes with --init; a recipe has its own number of steps")
        tokens = tokenizer or TOKENIZER
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


def _scale(
    recipe: str,
    data: Path,
    tokenizer: Path,
    out: Path,
    resume: bool,
    seed: int | None,
    steps: int | None,
    engine: dict[str, Any],
    sample_every: int,
    dry_run: tuple[int, float | None] | None,
) -> None:
    from kinetok.train.scale_recipes import cost, cost_lines, scale_recipe

    chosen = scale_recipe(recipe)
    if dry_run is None:
        from kinetok.train.scale import Engine, train

        options = Engine(**engine)
        made = train(
            recipe=recipe,
            data=data,
            tokenizer=tokenizer,
            out=out,
            resume=resume,
            seed=seed,
            steps=steps,
            engine=options,
            sample_every=sample_every,
        )
        if int(os.environ.get("RANK", "0")) == 0:
            print("wrote", made)
        return
    from kinetok.train.data.sequences import mean_lengths
    from kinetok.train.data.shards import is_store

    means = mean_lengths(data, chosen.max_text, chosen.min_tokens, chosen.max_tokens) if is_store(data) else None
    found = cost(
        chosen,
        processes=dry_run[0],
        tokens_per_second=dry_run[1],
        pass_positions=engine["pass_positions"],
        checkpointing=engine["checkpointing"],
        text=means[0] if means else None,
        motion=means[1] + 1 if means else None,
    )
    print("\n".join(cost_lines(recipe, chosen, found, longest=means is None)))


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
