"""``kinetok generate``."""

import os
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kinetok.cli.clip_folder import FORMATS, ClipFolder, Job, manifest_digest, parse_formats
from kinetok.cli.common import bar, example, few_threads_for_small_models, output_folder, print_json
from kinetok.errors import UserError

DEFAULT_FORMATS = ["bvh,glb,npz,png"]
INDEX = "index.json"


def register(app: typer.Typer) -> None:
    app.command(
        epilog=example(
            'kinetok generate "a person walks forward" -o out', "kinetok generate --prompts prompts.txt -o out --seed 7"
        )
    )(generate)


def generate(
    prompt: Annotated[list[str] | None, typer.Argument(help="One sentence a clip.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A UTF-8 file with one sentence a line.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the clips and index.json.")] = Path("out"),
    formats: Annotated[
        list[str], typer.Option("--format", help=f"Some of {', '.join(FORMATS)}: a comma list, or given several times.")
    ] = DEFAULT_FORMATS,
    seconds: Annotated[
        float | None, typer.Option(help="Length of a clip, up to 600; models are trained on 10.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same motion.")] = 0,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="1 is off.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is off.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Cap on the tokens of a clip.")] = None,
    model: Annotated[str | None, typer.Option(help="Model directory or hub id; the default model without.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    backend: Annotated[
        str,
        typer.Option(
            help="auto, torch, fused, onnx, onnx:DIR (a bundle of this model) or tensorrt:DIR (engines): kinetok export."
        ),
    ] = "auto",
    kv: Annotated[str, typer.Option(help="Keys and values: auto for the weights' dtype, or fp8 with fused.")] = "auto",
    clean: Annotated[
        bool, typer.Option("--clean-feet", help="Hold planted feet still; what that changed is printed and kept.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the index as JSON.")] = False,
) -> None:
    """Sentences to motion files. A clip that is already there with the same settings is kept, so a run can be resumed."""
    began = time.perf_counter()
    from kinetok.model.pretrained import MANIFEST, find_model
    from kinetok.model.text import check_prompt, read_prompts
    from kinetok.motion.cleanup import clean_feet
    from kinetok.runtime import SamplingParams, load

    suffixes = parse_formats(formats)
    params = SamplingParams(
        seconds=seconds,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        guidance=guidance,
        max_tokens=max_tokens,
    )
    texts = [check_prompt(text) for text in prompt or ()] + (read_prompts(prompts) if prompts is not None else [])
    if not texts:
        raise UserError("nothing to generate: give a sentence, or a file of sentences with --prompts")
    if out.suffix.lower().lstrip(".") in FORMATS and not os.path.isdir(out):
        raise UserError(f"--out: expected a folder, got the file name {out}; choose the kind of file with --format")
    model_folder = find_model(model)
    settings = {"model": model or "default", "manifest": manifest_digest(model_folder / MANIFEST), **asdict(params)}
    if clean:
        settings["clean_feet"] = True
    if backend != "auto":
        settings["backend"] = backend
    if kv != "auto":
        settings["kv"] = kv
    with output_folder(out):
        folder = ClipFolder(out / INDEX, settings, suffixes)
        jobs = [Job(number, text) for number, text in enumerate(texts)]
        todo = [job for job in jobs if not folder.done(job)]
        stages = {"start": time.perf_counter() - began, "load": 0.0, "generate": 0.0, "write": 0.0}
        within: Counter[str] = Counter()
        made = 0.0
        if todo:
            mark = time.perf_counter()
            engine = load(model_folder, device, dtype, backend=backend, kv=kv)
            few_threads_for_small_models(engine)
            stages["load"] = time.perf_counter() - mark
            with bar("generating", shown=not as_json) as update:
                for done, job in enumerate(todo):
                    mark = time.perf_counter()
                    # Each line is its own request with its own seed, so a line's clip does not depend on the lines before.
                    motion = engine.generate(job.text, params, seed=(seed + job.number) % 2**64)[0]
                    stages["generate"] += time.perf_counter() - mark
                    within.update(engine.timings)
                    mark = time.perf_counter()
                    changed = {}
                    if clean:
                        motion, report = clean_feet(motion)
                        changed = {"feet": {"line": str(report), **report.to_json()}}
                    folder.add(job, motion, seed + job.number, **changed)
                    made += motion.duration
                    stages["write"] += time.perf_counter() - mark
                    update(done + 1, len(todo), job.text[:50])
    entries = [{"name": job.stem, **folder.clips[job.stem]} for job in jobs]
    factor = made / stages["generate"] if made else None
    if as_json:
        print_json({"clips": entries, "stages_s": stages, "generate_s": within, "real_time_factor": factor})
        return
    fresh = {job.stem for job in todo}
    for entry in entries:
        state = "wrote" if entry["name"] in fresh else "kept "
        print(f'{state} "{entry["prompt"]}"  {entry["duration_s"]} s')
        if clean:
            print(f"      {entry['feet']['line']}")
        for name in entry["files"]:
            print(f"      {folder.path / name}")
    print(f"index {folder.index}")
    print("time ", ", ".join(f"{stage} {spent:.2f} s" for stage, spent in stages.items()))
    if factor is not None:
        print("      of generate:", ", ".join(f"{stage} {spent:.2f} s" for stage, spent in within.items()))
        print(f"real-time factor {factor:.1f} ({made:.1f} s of motion in {stages['generate']:.2f} s)")
