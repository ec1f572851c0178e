"""``kinetok train``."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kinetok.cli.common import example
from kinetok.errors import UserError

if TYPE_CHECKING:
    from kinetok.train.scale_recipes import ScaleRecipe

DATA = typer.Option(help="Motion data: data/cmu, or what kinetok data import wrote.")
RESUME = typer.Option(help="Continue the run in --out.")
SEED = typer.Option(help="Seed of the run; the recipe's own without.", min=0, max=2**63 - 1)
CMU = Path("data/cmu")
TOKENIZER = Path("runs/tokenizer/tokenizer.pt")
THREADS = typer.Option(help="CPU threads; torch's choice without.", min=1)
SAMPLES = typer.Option(help="Draw sample motions every so many steps; 0: never.", min=0)
DRY_RUN = typer.Option("--dry-run", help="Only print what a recipe for a clip store costs.")
GPUS = typer.Option(help="With --dry-run: GPUs; 1 without.", min=1)
RATE = typer.Option(help="With --dry-run: the measured rate of all GPUs together.")
EMA = typer.Option(help="Keep the moving average of this decay (0.9999).")
CLIP = typer.Option(help="Clip the gradient of a step to this norm.")


def register(app: typer.Typer) -> None:
    train = typer.Typer(help="Train a tokenizer, then a decoder on its tokens.")
    lines = "kinetok train tokenizer --recipe mini", "kinetok train tokenizer --recipe motionmillion --data store"
    train.command(epilog=example(*lines))(tokenizer)
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


def _dry_run_only(dry_run: bool, processes: int | None, tokens_per_second: float | None) -> None:
    for asked, option in (
        (processes is not None, "--processes"),
        (tokens_per_second is not None, "--tokens-per-second"),
    ):
        if asked and not dry_run:
            raise UserError(f"{option} goes with --dry-run; torchrun --nproc-per-node N starts N processes")


def _names_store(data: Path) -> bool:
    """Whether a dry run is to read a clip store: the default is none, and any other folder that is none is a slip."""
    from kinetok.train.data.shards import is_store

    return is_store(data) or data != CMU


def _one_process(recipe: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{recipe} trains in one process: start it without torchrun")


def tokenizer(
    recipe: Annotated[str, typer.Option(help="The recipe's name.")] = "mini",
    data: Annotated[Path, DATA] = CMU,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/tokenizer"),
    resume: Annotated[bool, RESUME] = False,
    seed: Annotated[int | None, SEED] = None,
    steps: Annotated[int | None, typer.Option(help="With a recipe for a clip store.", min=1)] = None,
    threads: Annotated[int | None, THREADS] = None,
    dry_run: Annotated[bool, DRY_RUN] = False,
    processes: Annotated[int | None, GPUS] = None,
    tokens_per_second: Annotated[float | None, RATE] = None,
    sample_every: Annotated[int, SAMPLES] = 0,
) -> None:
    """Train a motion tokenizer.

    Recipes: mini for a small set; motionmillion, and the toy smoke, for a clip store (docs/training.md).
    """
    _threads(threads)
    _dry_run_only(dry_run, processes, tokens_per_second)
    from kinetok.train.recipes import TOKENIZER_RECIPES

    if recipe not in TOKENIZER_RECIPES:
        from kinetok.train.scale_recipes import with_loop
        from kinetok.train.scale_tokenizer import cost_lines, store_tokenizer_recipe
        from kinetok.train.scale_tokenizer import train as train_on_store

        chosen = with_loop(store_tokenizer_recipe(recipe), steps=steps, seed=seed)
        if dry_run:
            from kinetok.train.data.shards import ClipStore
            from kinetok.train.rates import windows_line

            gpus, store = processes or 1, ClipStore(data) if _names_store(data) else None
            print("\n".join(cost_lines(recipe, chosen, processes=gpus, tokens_per_second=tokens_per_second)))
            print(windows_line(chosen, store, processes=gpus))
            return
        _wrote(train_on_store(recipe=chosen, data=data, out=out, resume=resume, sample_every=sample_every))
        return
    from kinetok.train.tokenizer import train

    for asked, option in ((dry_run, "--dry-run"), (steps is not None, "--steps")):
        if asked:
            raise UserError(f"{option} goes with a recipe for a clip store: smoke or motionmillion")
    _one_process(f"the recipe {recipe}")
    _wrote(train(recipe=recipe, data=data, out=out, resume=resume, seed=seed, sample_every=sample_every))


def decoder(
    recipe: Annotated[str | None, typer.Option(help="The recipe's name; mini without.")] = None,
    data: Annotated[Path, DATA] = CMU,
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
        int | None, typer.Option(help="With --init (300 without), or a recipe for a clip store.", min=1)
    ] = None,
    threads: Annotated[int | None, THREADS] = None,
    dry_run: Annotated[bool, DRY_RUN] = False,
    processes: Annotated[int | None, GPUS] = None,
    tokens_per_second: Annotated[float | None, RATE] = None,
    positions: Annotated[
        int | None, typer.Option(help="Positions of one pass of a process; 16384 without.", min=1)
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute activations twice to keep fewer.")
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile of the blocks.")] = False,
    ema: Annotated[float | None, EMA] = None,
    clip_norm: Annotated[float | None, CLIP] = None,
    sample_every: Annotated[int, SAMPLES] = 0,
) -> None:
    """Train a decoder, or fine-tune a model; its folder then holds model/, which --model of generate takes.

    Recipes: mini for a small set; motionmillion-44m to motionmillion-65b, and the toy smoke, for a clip store
    (docs/training.md).
    """
    _threads(threads)
    _dry_run_only(dry_run, processes, tokens_per_second)
    if recipe is not None and recipe != "mini" and init is None:
        from kinetok.train.scale_recipes import PASS_POSITIONS, scale_recipe, with_loop

        chosen = with_loop(scale_recipe(recipe), steps=steps, seed=seed, ema=ema, clip_norm=clip_norm)
        if dry_run:
            from kinetok.train.rates import sequences_line

            gpus, room = processes or 1, positions or PASS_POSITIONS
            _decoder_cost(recipe, chosen, data, gpus, tokens_per_second, room, checkpointing)
            print(sequences_line(chosen, data, tokenizer or TOKENIZER, processes=gpus, pass_positions=room))
            return
        from kinetok.train.scale import Engine
        from kinetok.train.scale import train as train_on_store

        result = train_on_store(
            recipe=chosen,
            name=recipe,
            data=data,
            tokenizer=tokenizer or TOKENIZER,
            out=out or Path("runs/decoder"),
            resume=resume,
            engine=Engine(pass_positions=positions or PASS_POSITIONS, checkpointing=checkpointing, compile=compile),
            sample_every=sample_every,
        )
        _wrote(result)
        return
    for asked, option in (
        (dry_run, "--dry-run"),
        (positions is not None, "--positions"),
        (checkpointing, "--checkpointing"),
        (compile, "--compile"),
        (ema is not None, "--ema"),
        (clip_norm is not None, "--clip-norm"),
    ):
        if asked:
            raise UserError(f"{option} goes with a recipe for a clip store: smoke, motionmillion-44m to -65b")
    _one_process(f"the recipe {recipe or 'mini'}" if init is None else "fine-tuning")
    if init is None:
        from kinetok.train.decoder import train

        if steps is not None:
            raise UserError("--steps goes with --init; a recipe has its own number of steps")
        tokens = tokenizer or TOKENIZER
        folder = out or Path("runs/decoder")
        made = train(
            recipe=recipe or "mini",
            data=data,
            tokenizer=tokens,
            out=folder,
            resume=resume,
            seed=seed,
            sample_every=sample_every,
        )
        print("wrote", made)
        return
    from kinetok.train.finetune import finetune

    given = next(
        (name for name, value in (("--recipe", recipe), ("--tokenizer", tokenizer)) if value is not None), None
    )
    if given is not None:
        raise UserError(f"{given} does not go with --init: the model brings its own tokenizer and sizes")
    tuned = finetune(
        init=init,
        data=data,
        out=out or Path("runs/finetune"),
        resume=resume,
        steps=steps,
        seed=seed,
        sample_every=sample_every,
    )
    print(
        f"wrote {tuned.model}  (validation loss {tuned.before:.3f} before, {tuned.after:.3f} after {tuned.step} steps)"
    )
    print(f"the tokenizer, which stays as it is, reproduces these clips within {tuned.mpjpe_mm:.0f} mm a joint")
    if tuned.after >= tuned.before:
        print("the validation loss did not fall: what it learned does not carry over to the clips held out")


def _decoder_cost(
    name: str,
    recipe: "ScaleRecipe",
    data: Path,
    processes: int,
    tokens_per_second: float | None,
    positions: int,
    checkpointing: bool,
) -> None:
    from kinetok.train.data.sequences import mean_lengths
    from kinetok.train.scale_recipes import cost, cost_lines

    means = None
    if _names_store(data):
        means = mean_lengths(data, recipe.max_text, recipe.min_tokens, recipe.max_tokens)
    found = cost(
        recipe,
        processes=processes,
        tokens_per_second=tokens_per_second,
        pass_positions=positions,
        checkpointing=checkpointing,
        text=means[0] if means else None,
        motion=means[1] + 1 if means else None,
    )
    print("\n".join(cost_lines(name, recipe, found, longest=means is None)))


def _wrote(path: Path) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print("wrote", path)


def evaluator(
    recipe: Annotated[str, typer.Option(help="The recipe's name.")] = "mini",
    data: Annotated[Path, DATA] = CMU,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/evaluator"),
    resume: Annotated[bool, RESUME] = False,
    threads: Annotated[int | None, THREADS] = None,
) -> None:
    """Train an evaluator, which measures how well motions fit their captions (kinetok evaluate)."""
    from kinetok.train.evaluator import train

    _threads(threads)
    _one_process(f"the recipe {recipe}")
    print("wrote", train(recipe=recipe, data=data, out=out, resume=resume))
