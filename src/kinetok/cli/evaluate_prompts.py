"""``kinetok evaluate prompts``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kinetok.cli.clip_folder import FORMATS, ClipFolder, Job, manifest_digest, parse_formats
from kinetok.cli.common import bar, example, few_threads_for_small_models, output_folder, print_json
from kinetok.errors import UserError

INDEX, PAGE = "prompts.json", "index.html"


def register(group: typer.Typer) -> None:
    group.command(
        epilog=example("kinetok evaluate prompts", "kinetok evaluate prompts --limit 10 --format npz,bvh -o out/ten")
    )(prompts)


def prompts(
    out: Annotated[Path, typer.Option("-o", "--out", help=f"Folder for the clips, {INDEX} and {PAGE}.")] = Path(
        "out/prompts"
    ),
    file: Annotated[Path | None, typer.Option("--prompts", help="Other prompts: a UTF-8 file, one a line.")] = None,
    limit: Annotated[int | None, typer.Option(help="The first prompts only.", min=1)] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help=f"Beside npz, some of {', '.join(FORMATS)}: a comma list.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Length of a clip, up to 10; the model decides without.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt; the others count on from it.")] = 0,
    model: Annotated[str | None, typer.Option(help="Model directory or hub id; the default model without.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the index and the summary as JSON.")] = False,
) -> None:
    """The 126 prompts of MotionMillion-Eval as clips and one page that shows them moving, with physical scores.

    An interrupted run goes on where it stopped.
    """
    from kinetok.model.pretrained import MANIFEST, find_model
    from kinetok.model.text import read_prompts
    from kinetok.motion import Motion
    from kinetok.runtime import SamplingParams, load
    from kinetok.train.prompt_page import Shown, motionmillion_eval, scores, summary, write_prompt_page

    suffixes = parse_formats(["npz", *(formats or [])])
    params = SamplingParams(seconds=seconds, seed=seed)
    texts = (motionmillion_eval() if file is None else read_prompts(file))[:limit]
    model_folder = find_model(model)
    settings = {"model": model or "default", "manifest": manifest_digest(model_folder / MANIFEST), **asdict(params)}
    with output_folder(out):
        if not (out / INDEX).exists() and any(out.iterdir()):
            raise UserError(f"--out: expected an empty folder or one of an earlier run, but {out} holds other files")
        folder = ClipFolder(out / INDEX, settings, suffixes)
        jobs = [Job(number, text) for number, text in enumerate(texts)]
        todo = [job for job in jobs if not folder.done(job)]
        if todo:
            engine = load(model_folder, device, dtype)
            few_threads_for_small_models(engine)
            with bar("generating", shown=not as_json) as update:
                for done, job in enumerate(todo):
                    # A prompt that occurs twice is two clips, as each line has its own seed.
                    motion = engine.generate(job.text, params, seed=(seed + job.number) % 2**64)[0]
                    folder.add(job, motion, seed + job.number, scores=scores(motion))
                    update(done + 1, len(todo), job.text[:50])
    entries = [{"name": job.stem, **folder.clips[job.stem]} for job in jobs]
    shown = []
    with bar("the page", shown=not as_json) as update:
        for done, (job, entry) in enumerate(zip(jobs, entries, strict=True)):
            motion = Motion.load(out / f"{job.stem}.npz")
            shown.append(Shown(job.text, entry["seed"], motion, scores(motion)))
            update(done + 1, len(jobs))
    figures = summary([clip.scores for clip in shown])
    about = f"{len(jobs)} clips of the model {settings['model']} (manifest {settings['manifest']}), seeds from {seed}."
    write_prompt_page(out / PAGE, shown, about)
    if as_json:
        print_json({"clips": entries, "summary": figures, "page": str(out / PAGE)})
        return
    print(f"{len(todo)} clips made, {len(jobs) - len(todo)} kept; wrote {out / PAGE}")
    for score, values in figures.items():
        print(f"  {score:20}", "  ".join(f"{name} {value:.2f}" for name, value in values.items()))
