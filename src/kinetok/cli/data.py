"""``kinetok data``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kinetok.cli.common import bar, example, print_json
from kinetok.errors import UserError

IMPORT = "kinetok data import recordings --out mydata"
SHARDS = "kinetok data import MotionMillion --out store --shards"
STORE = typer.Argument(help="A clip store, which import --shards wrote.")


def register(app: typer.Typer) -> None:
    data = typer.Typer(help="Motion data to train on.")
    data.command("import", epilog=example(IMPORT, SHARDS))(import_command)
    data.command("check", epilog=example("kinetok data check store"))(check_command)
    tokens = "kinetok data tokens store --tokenizer runs/tokenizer/tokenizer.pt"
    data.command("tokens", epilog=example(tokens))(tokens_command)
    text = "kinetok data text store --encoder flan-t5 --name google/flan-t5-xl"
    data.command("text", epilog=example("kinetok data text store", text))(text_command)
    app.add_typer(data, name="data", epilog=example(IMPORT))


def import_command(
    source: Annotated[Path, typer.Argument(help="A folder of motion files and captions (docs/fine-tuning.md).")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write, which --data of train takes.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    shards: Annotated[
        bool, typer.Option("--shards", help="Write a clip store, for data of any size (docs/training.md).")
    ] = False,
) -> None:
    """Turn motion files and their captions into data to train on; what cannot be used is left out and named."""
    if shards:
        _import_shards(source, out, as_json)
        return
    from kinetok.train.data.importing import import_motions

    with bar("importing", shown=not as_json) as update:
        report = import_motions(source, out, progress=update)
    if as_json:
        print_json({**asdict(report), "out": str(out), "clips": sum(report.splits.values())})
        return
    splits = ", ".join(f"{count} {split}" for split, count in sorted(report.splits.items()))
    print(f"wrote {out}  ({splits}; {report.seconds:.1f} s of motion, {report.captions} captions)")
    if report.flipped:
        print(f"{report.flipped} clips turn upside down (rolls, cartwheels); training leaves them out")
    if report.refused:
        width = max(map(len, report.refused))
        print(f"left out {len(report.refused)}:")
        for file, reason in report.refused.items():
            print(f"  {file.ljust(width)}  {reason}")


def _import_shards(source: Path, out: Path, as_json: bool) -> None:
    from kinetok.train.data.shard_import import import_shards, summary

    with bar("importing", shown=not as_json) as update:
        report = import_shards(source, out, progress=update)
    if as_json:
        print_json(summary(report))
        return
    splits = ", ".join(f"{count} {split}" for split, count in sorted(report.splits.items()))
    print(
        f"wrote {out}  ({splits}; {report.seconds:.1f} s of motion, {report.captions} captions, {report.shards} shards)"
    )
    if report.resumed:
        print(f"{report.resumed} clips were there from an interrupted import")
    if report.left_out:
        print(f"left out {report.left_out}, all of them in {out / 'refused.jsonl'}:")
        for reason, count in sorted(report.reasons.items(), key=lambda one: -one[1]):
            print(f"  {count:>8}  {reason}")


def check_command(store: Annotated[Path, STORE]) -> None:
    """Read every byte of a store and compare it with the index: what was copied or is old may have been damaged."""
    from kinetok.train.data.checking import check_store
    from kinetok.train.data.shards import ClipStore

    clips = ClipStore(store)
    with bar("checking", shown=True) as update:
        check_store(clips, progress=update)
    print(f"{store} is whole  ({len(clips)} clips in {len(clips.shards)} shards)")


def tokens_command(
    store: Annotated[Path, STORE],
    tokenizer: Annotated[Path, typer.Option(help="The trained tokenizer.")] = Path("runs/tokenizer/tokenizer.pt"),
) -> None:
    """Write the tokens of every clip of a store beside it, once for each tokenizer."""
    import torch

    from kinetok.train.data.sequences import write_tokens
    from kinetok.train.data.shards import ClipStore
    from kinetok.train.decoder import load_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with bar("tokens", shown=True) as update:
        made = write_tokens(ClipStore(store), tokenizer, *load_tokenizer(tokenizer), device=device, progress=update)
    print("wrote", made)


def text_command(
    store: Annotated[Path, STORE],
    encoder: Annotated[str, typer.Option(help="minilm or flan-t5.")] = "minilm",
    name: Annotated[str | None, typer.Option(help="For flan-t5: a local directory or a hub id.")] = None,
) -> None:
    """Write the text features of every different caption of a store beside it, so that training runs no text encoder."""
    import torch

    from kinetok.train.data.sequences import write_text
    from kinetok.train.data.shards import ClipStore
    from kinetok.train.decoder import TEXT_ENCODER

    if encoder == "minilm" and name is None:
        spec = dict(TEXT_ENCODER)
    elif encoder == "flan-t5" and name is not None:
        spec = {"type": "flan-t5", "name": name}
    else:
        raise UserError(f"expected --encoder minilm, or --encoder flan-t5 with its --name, got {encoder} and {name}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with bar("captions", shown=True) as update:
        print("wrote", write_text(ClipStore(store), spec, device=device, progress=update))
