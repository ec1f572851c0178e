"""``kinetok bench``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinetok.cli.common import example
from kinetok.errors import UserError

if TYPE_CHECKING:
    import torch

FAILED = 1  # a regression, or kinetok itself wrote wrong tokens

Preset = Annotated[str, typer.Option(help="A size of the paper (44M to 65B) with random weights, or default.")]
Model = Annotated[str | None, typer.Option(help="Model directory or hub id in place of random weights.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of a CPU; torch's own number without.")]
Dtype = Annotated[str, typer.Option(help="fp32, fp16, bf16; weights also int8, int4, fp8.")]
Backend = Annotated[str | None, typer.Option(help="What computes logits; the one made for the device without.")]
Kv = Annotated[str, typer.Option(help="Keys and values: auto for the weights' dtype, or fp8.")]
Seconds = Annotated[float, typer.Option(help="Length of each clip, up to 10.")]
Batch = Annotated[str, typer.Option(help="Characters at once; a comma list measures each.")]
Tokens = Annotated[str, typer.Option(help="Tokens of a clip; a comma list measures each.")]
Repeats = Annotated[int, typer.Option(min=5, help="Timed runs of each route.")]
Text = Annotated[int, typer.Option(min=1, help="Positions of the text before the tokens, with random weights.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the report there, whole after every row.")]
Note = Annotated[str, typer.Option(help="A sentence to keep with the figures, such as what else runs.")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Measure speed beside peers, and compare two measurements.", no_args_is_help=True)
    cpu = "kinetok bench decode --preset 111M --tokens 50,150 --peers uncached,hf,compile,ort --json mine.json"
    gpu = "kinetok bench decode --preset 7B --dtype bf16 --tokens 150 --peers hf,graph"
    group.command(epilog=example(cpu, gpu))(decode)
    group.command(epilog=example("kinetok bench step --preset 111M --positions 30,300"))(step)
    group.command(epilog=example("kinetok bench tokenizer --preset default --tokens 1,90"))(tokenizer)
    group.command(epilog=example("kinetok bench stream --seconds 6"))(stream)
    group.command(epilog=example("kinetok bench crowd --characters 1,8,32"))(crowd)
    group.command(epilog=example("kinetok bench compare before.json after.json"))(compare)
    group.command(epilog=example("kinetok bench check mine.json"))(check)
    app.add_typer(group, name="bench", epilog=example(cpu))


def numbers(name: str, text: str) -> list[int]:
    """A comma list of whole numbers from 1."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise UserError(f"--{name}: expected whole numbers from 1, such as 50 or 50,150, got {text!r}")
    return found


def place(device: str, threads: int | None) -> "torch.device":
    import torch

    from kinetok.model.pretrained import choose_device

    if threads is not None:
        torch.set_num_threads(threads)
    return choose_device(device)


def run(measure: Callable[..., Mapping[str, Any]], settings: Any, json_file: Path | None) -> None:
    """Measure, writing the file as it grows; exit code 1 where kinetok itself was wrong."""
    from kinetok.files import check_file
    from kinetok.runtime.bench.decode import PEERS
    from kinetok.runtime.bench.record import unsaved, write

    if json_file is not None:
        check_file(json_file)
    save = unsaved if json_file is None else lambda report: write(json_file, report)
    report = measure(settings, save=save)
    save(report)
    if any(one["route"] not in PEERS and "memory" not in one["reason"] for one in report["cannot_run"]):
        raise typer.Exit(FAILED)


def decode(
    preset: Preset = "111M",
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    backend: Backend = None,
    kv: Kv = "auto",
    batch: Batch = "1",
    tokens: Tokens = "50,150",
    text: Text = 20,
    peers: Annotated[str, typer.Option(help="Some of uncached,hf,compile,graph,ort to measure beside.")] = "",
    onnx: Annotated[str, typer.Option(help="A bundle of these weights for ort, in place of a graph in memory.")] = "",
    repeats: Repeats = 5,
    threads: Threads = None,
    json_file: Json = None,
    note: Note = "",
) -> None:
    """Tokens of a clip: time to the first, time a token, share of the measured bandwidth, beside peers in the same run.

    Every route first has to write the tokens that the weights choose; one that cannot run or writes others is named with
    its reason. Exit code 1 where that is kinetok itself.
    """
    from kinetok.runtime.bench import decode as bench

    settings = bench.DecodeSettings(
        preset=preset,
        model=model,
        device=place(device, threads),
        dtype=dtype,
        backend=backend,
        kv=kv,
        batch=numbers("batch", batch),
        tokens=numbers("tokens", tokens),
        text=text,
        repeats=repeats,
        peers=[name for name in peers.split(",") if name],
        onnx=onnx,
        note=note,
    )
    run(bench.measure, settings, json_file)


def step(
    preset: Preset = "111M",
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    backend: Backend = None,
    kv: Kv = "auto",
    batch: Batch = "1",
    positions: Annotated[
        str, typer.Option(help="Text and motion that a step sees; a comma list measures each.")
    ] = "30,300",
    text: Text = 20,
    steps: Annotated[int, typer.Option(min=2, help="Steps of a run, around the position.")] = 2,
    repeats: Repeats = 10,
    threads: Threads = None,
    json_file: Json = None,
    note: Note = "",
) -> None:
    """One step with the cache filled to given positions: a late step's cost over an early one's, who keeps a deadline."""
    from kinetok.runtime.bench import step as bench

    settings = bench.StepSettings(
        preset=preset,
        model=model,
        device=place(device, threads),
        dtype=dtype,
        backend=backend,
        kv=kv,
        batch=numbers("batch", batch),
        positions=numbers("positions", positions),
        text=text,
        steps=steps,
        repeats=repeats,
        note=note,
    )
    run(bench.measure, settings, json_file)


def tokenizer(
    preset: Annotated[str, typer.Option(help="released (random weights) or default.")] = "released",
    model: Model = None,
    device: Device = "auto",
    batch: Batch = "1",
    tokens: Tokens = "1,50,150",
    repeats: Repeats = 10,
    threads: Threads = None,
    json_file: Json = None,
    note: Note = "",
) -> None:
    """Tokens to frames and back: milliseconds a clip, frames a second, times real time."""
    from kinetok.runtime.bench import tokenizer as bench

    settings = bench.TokenizerSettings(
        preset=preset,
        model=model,
        device=place(device, threads),
        batch=numbers("batch", batch),
        tokens=numbers("tokens", tokens),
        repeats=repeats,
        note=note,
    )
    run(bench.measure, settings, json_file)


def stream(
    preset: Preset = "default",
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    backend: Backend = None,
    kv: Kv = "auto",
    causal: Annotated[
        bool, typer.Option("--causal", help="Random weights: a tokenizer that looks at no later token.")
    ] = False,
    seconds: Seconds = 6.0,
    text: Text = 20,
    repeats: Repeats = 5,
    threads: Threads = None,
    json_file: Json = None,
    note: Note = "",
) -> None:
    """One character's frames as they come: time to the first, time a block, times real time."""
    from kinetok.runtime.bench import live

    settings = live.LiveSettings(
        preset=preset,
        model=model,
        device=place(device, threads),
        dtype=dtype,
        backend=backend,
        kv=kv,
        causal=causal,
        seconds=seconds,
        text=text,
        repeats=repeats,
        note=note,
    )
    run(live.stream, settings, json_file)


def crowd(
    preset: Preset = "default",
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    backend: Backend = None,
    kv: Kv = "auto",
    characters: Annotated[str, typer.Option(help="Characters at once; a comma list measures each.")] = "1,8,32",
    seconds: Seconds = 6.0,
    text: Text = 20,
    repeats: Repeats = 5,
    threads: Threads = None,
    json_file: Json = None,
    note: Note = "",
) -> None:
    """Many characters at once: time of a step of all of them, and how many keep a deadline."""
    from kinetok.runtime.bench import live

    settings = live.LiveSettings(
        preset=preset,
        model=model,
        device=place(device, threads),
        dtype=dtype,
        backend=backend,
        kv=kv,
        characters=numbers("characters", characters),
        seconds=seconds,
        text=text,
        repeats=repeats,
        note=note,
    )
    run(live.crowd, settings, json_file)


def compare(
    before: Annotated[Path, typer.Argument(help="A report of kinetok bench.")],
    after: Annotated[Path, typer.Argument(help="A later one.")],
) -> None:
    """Ratios of the rows that two reports share; exit code 1 where the later is slower beyond the repeats' noise."""
    from kinetok.runtime.bench.record import compare as ratios
    from kinetok.runtime.bench.record import read

    old, new = read(before), read(after)
    for name in ("device", "torch"):
        a, b = (report["machine"].get(name) for report in (old, new))
        if a != b:
            print(f"note: {name} was {a}, is {b}")
    found = ratios(old, new)
    for row in found:
        verdict = "SLOWER" if row["regression"] else "faster" if row["ratio"] > 1 + row["noise"] else "within noise"
        at = "" if row["context"] is None else f" at position {row['context']}"
        print(
            f"{row['kind']} {row['model']} {row['dtype']} batch {row['batch']} tokens {row['tokens']}{at} {row['route']}: "
            f"{row['ratio']:.3f}x (noise {row['noise']:.3f}) {verdict}"
        )
    if any(row["regression"] for row in found):
        raise typer.Exit(FAILED)


def check(files: Annotated[list[Path], typer.Argument(help="Reports of kinetok bench.")]) -> None:
    """Whether files keep to the schema of results, as a submitted one must."""
    from kinetok.runtime.bench.record import read

    for path in files:
        report = read(path)
        print(f"{path}: {len(report['rows'])} rows, schema {report['schema']}, {report['machine']['device']}")
