"""``kinetok data``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kinetok.cli.common import bar, example, print_json

IMPORT = "kinetok data import recordings --out mydata"


def register(app: typer.Typer) -> None:
    data = typer.Typer(help="Motion data to train on.")
    data.command("import", epilog=example(IMPORT))(import_command)
    app.add_typer(data, name="data", epilog=example(IMPORT))


def import_command(
    source: Annotated[Path, typer.Argument(help="A folder of motion files and captions (docs/fine-tuning.md).")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write, which --data of train takes.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Turn BVH files and their captions into data to train on; what cannot be used is left out and named."""
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
