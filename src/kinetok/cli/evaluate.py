"""``kinetok evaluate``."""

from pathlib import Path
from typing import Annotated

import typer

from kinetok.cli import evaluate_prompts
from kinetok.cli.common import bar, example, few_threads_for_small_models, print_json

RESULT, PAGE = Path("benchmarks/results/eval_default.json"), Path("docs/evaluation.md")
SMOKE = Path("out/evaluation")
DEFAULT = "kinetok evaluate default"


def register(app: typer.Typer) -> None:
    evaluate = typer.Typer(help="Measure a model: against real clips, by its sentences, by physics.")
    evaluate.command("default", epilog=example(DEFAULT, f"{DEFAULT} --model runs/decoder/model --out mine.json"))(
        default
    )
    evaluate.command("page", epilog=example(f"kinetok evaluate page {RESULT} --page {PAGE}"))(page)
    evaluate_prompts.register(evaluate)
    app.add_typer(evaluate, name="evaluate", epilog=example(DEFAULT))


def default(
    model: Annotated[str | None, typer.Option(help="A model directory; the default model without.")] = None,
    data: Annotated[Path, typer.Option(help="Motion data in the form of data/cmu.")] = Path("data/cmu"),
    evaluator: Annotated[Path | None, typer.Option(help="An evaluator's folder; the packaged one without.")] = None,
    out: Annotated[Path | None, typer.Option(help=f"The results file; {RESULT} without, in WORK with --model.")] = None,
    page: Annotated[
        Path | None, typer.Option(help=f"The page made of it; {PAGE} without, in WORK with --model.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Folder that keeps generated clips.")] = Path("runs/evaluation"),
    quick: Annotated[bool, typer.Option(help=f"A smoke run whose figures mean nothing, to {SMOKE}.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure a model on held-out subjects and by the physical probes; an interrupted run goes on where it stopped.

    With its settings the default model makes some 4,000 clips.
    """
    from kinetok.runtime import load
    from kinetok.train.data.store import read_clips
    from kinetok.train.evaluate import Settings, evaluate
    from kinetok.train.evaluate import quick as smoke
    from kinetok.train.evaluation_page import check_page, check_target, write_page, write_result
    from kinetok.train.evaluator import load_evaluator

    own = SMOKE if quick else work  # the committed files are the default model's
    out = out or (own / "eval.json" if quick or model else RESULT)
    page = page or (own / "evaluation.md" if quick or model else PAGE)
    check_target(out)
    check_page(page)
    engine = load(model)
    few_threads_for_small_models(engine)
    judge = load_evaluator(evaluator)
    with bar("reading", shown=not as_json) as update:
        result = evaluate(engine, judge, read_clips(data), work, smoke() if quick else Settings(), update)
    write_result(result, out)
    files = write_page(result, page)
    if as_json:
        print_json(result)
    else:
        print("wrote", ", ".join(map(str, [out, *files])))


def page(
    result: Annotated[Path, typer.Argument(help="A results file of kinetok evaluate default.")],
    page: Annotated[Path, typer.Option(help="The page to write.")] = PAGE,
) -> None:
    """Make the page and its charts again from a results file."""
    from kinetok.train.evaluation_page import read_result, write_page

    print("wrote", ", ".join(map(str, write_page(read_result(result), page))))
