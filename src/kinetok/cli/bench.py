"""``kinetok bench``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kinetok.cli.common import example
from kinetok.errors import UserError

if TYPE_CHECKING:
    import torch

REGRESSION = 1

Preset = Annotated[str, typer.Option(help="A size of the paper (44M to 65B) with random weights, or default.")]
Model = Annotated[str | None, typer.Option(help="Model directory or hub id in place of random weights.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of a CPU; torch's own number without.")]
Dtype = Annotated[str, typer.Option(help="fp32, fp16 or bf16.")]
Seconds = Annotated[float, typer.Option(help="Length of each clip, up to 10.")]
Batch = Annotated[str, typer.Option(help="Characters at once; a comma list measures each.")]
Tokens = Annotated[str, typer.Option(help="Tokens of a clip; a comma list measures each.")]
Repeats = Annotated[int, typer.Option(min=5, help="Timed runs of each route.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the report there.")]
Note = Annotated[str, typer.Option(help="A sentence to keep with the figures, such as what else runs.")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Measure speed beside peers, and compare two measurements.", no_args_is_help=True)
    group.command(
        epilog=example(
            "kinetok bench decode --preset 111M --tokens 50,150 --peers uncached,hf --json mine.json",
            "kinetok bench decode --preset 7B --dtype bf16 --tokens 150 --peers hf,graph",
        )
    )(decode)
    group.command(epilog=example("kinetok bench tokenizer --preset default --tokens 1,90"))(tokenizer)
    group.command(epilog=example("kinetok bench stream --seconds 6"))(stream)
    group.command(epilog=example("kinetok bench crowd --characters 1,8,32"))(crowd)
    group.command(epilog=example("kinetok bench compare before.json after.json"))(compare)
    app.add_typer(group, name="bench")


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


def decode(
    preset: Preset = "111M",
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    batch: Batch = "1",
    tokens: Tokens = "50,150",
    text: Annotated[int, typer.Option(min=1, help="Positions of the text before them.")] = 20,
    peers: Annotated[str, typer.Option(help="Some of uncached,hf,compile,graph,ort to measure beside.")] = "",
    onnx: Annotated[str, typer.Option(help="The bundle of the same model that ort runs.")] = "",
    repeats: Repeats = 5,
    threads: Threads = None,
    json_file: Json = None,
    note: Note = "",
) -> None:
    """Tokens of a clip: time to the first, time a token, share of the measured bandwidth, beside peers in the same run.

    Every route first has to write the same tokens; one that cannot run or writes others is named with its reason.
    """
    from kinetok.runtime.bench import decode as bench
    from kinetok.runtime.bench.record import write

    settings = bench.DecodeSettings(
        preset=preset,
        model=model,
        device=place(device, threads),
        dtype=dtype,
        batch=numbers("batch", batch),
        tokens=numbers("tokens", tokens),
        text=text,
        repeats=repeats,
        peers=[name for name in peers.split(",") if name],
        onnx=onnx,
        note=note,
    )
    report = bench.measure(settings)
    if json_file is not None:
        write(json_file, report)


def tokenizer(
    preset: Annotated[str, typer.Option(help="released (random weights) or default.")] = "released",
    model: Model = None,
    device: Device = "auto",
    batch: Batch = "1",
    tokens: Tokens = "1,50,150",
    repeats: Repeats = 20,
    threads: Threads = None,
    json_file: Json = None,
    note: Note = "",
) -> None:
    """Tokens to frames and back: milliseconds a clip, frames a second, times real time."""
    from kinetok.runtime.bench import tokenizer as bench
    from kinetok.runtime.bench.record import write

    settings = bench.TokenizerSettings(
        preset=preset,
        model=model,
        device=place(device, threads),
        batch=numbers("batch", batch),
        tokens=numbers("tokens", tokens),
        repeats=repeats,
        note=note,
    )
    report = bench.measure(settings)
    if json_file is not None:
        write(json_file, report)


def stream(
    preset: Preset = "default",
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    seconds: Seconds = 6.0,
    repeats: Repeats = 5,
    threads: Threads = None,
    json_file: Json = None,
    note: Note = "",
) -> None:
    """One character's frames as they come: time to the first, time a block, times real time."""
    _live("stream", json_file, preset, model, place(device, threads), dtype, seconds, repeats, note, [1])


def crowd(
    preset: Preset = "default",
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    characters: Annotated[str, typer.Option(help="Characters at once; a comma list measures each.")] = "1,8,32",
    seconds: Seconds = 6.0,
    repeats: Repeats = 5,
    threads: Threads = None,
    json_file: Json = None,
    note: Note = "",
) -> None:
    """Many characters at once: time of a step of all of them, and how many keep a deadline."""
    crowds = numbers("characters", characters)
    _live("crowd", json_file, preset, model, place(device, threads), dtype, seconds, repeats, note, crowds)


def _live(
    kind: str,
    json_file: Path | None,
    preset: str,
    model: str | None,
    device: "torch.device",
    dtype: str,
    seconds: float,
    repeats: int,
    note: str,
    characters: list[int],
) -> None:
    from kinetok.runtime.bench import live
    from kinetok.runtime.bench.record import write

    settings = live.LiveSettings(
        preset=preset,
        model=model,
        device=device,
        dtype=dtype,
        seconds=seconds,
        characters=characters,
        repeats=repeats,
        note=note,
    )
    report = live.stream(settings) if kind == "stream" else live.crowd(settings)
    if json_file is not None:
        write(json_file, report)


def compare(
    before: Annotated[Path, typer.Argument(help="A report of kinetok bench.")],
    after: Annotated[Path, typer.Argument(help="A later one.")],
) -> None:
    """Ratios of the rows that two reports share; exit code 1 where the later is slower beyond the repeats' noise."""
    from kinetok.runtime.bench.record import compare as ratios
    from kinetok.runtime.bench.record import read

    old, new = read(before), read(after)
    for name in ("device", "torch"):
        a, b = (report.get("machine", {}).get(name) for report in (old, new))
        if a != b:
            print(f"note: {name} was {a}, is {b}")
    found = ratios(old, new)
    for row in found:
        verdict = "SLOWER" if row["regression"] else "faster" if row["ratio"] > 1 + row["noise"] else "within noise"
        print(
            f"{row['kind']} {row['model']} {row['dtype']} batch {row['batch']} tokens {row['tokens']} {row['route']}: "
            f"{row['ratio']:.3f}x (noise {row['noise']:.3f}) {verdict}"
        )
    if any(row["regression"] for row in found):
        raise typer.Exit(REGRESSION)
