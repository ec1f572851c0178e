"""``kinetok convert``."""

from pathlib import Path
from typing import Annotated

import typer

from kinetok.cli.common import example
from kinetok.errors import UserError


def register(app: typer.Typer) -> None:
    app.command(
        epilog=example("kinetok convert walk.bvh walk.glb", "kinetok convert walk.npz walk.bvh --up Z --clean-feet")
    )(convert)


def convert(
    source: Annotated[Path, typer.Argument(help="A motion file: .bvh, .glb, .npz or .npy.")],
    target: Annotated[Path, typer.Argument(help="The file to write: .bvh, .glb, .npz, .npy, .png or .mp4.")],
    up: Annotated[str | None, typer.Option(help="BVH only: the up axis, Y or Z.")] = None,
    scale: Annotated[float | None, typer.Option(help="BVH only: units a metre (100 for centimetres).")] = None,
    clean: Annotated[bool, typer.Option("--clean-feet", help="Hold feet still where they stand on the floor.")] = False,
) -> None:
    """Turn one motion file into another; BVH files of other skeletons come in at 30 frames a second."""
    from kinetok.motion import Motion

    options = {name: value for name, value in (("up", up), ("scale", scale)) if value is not None}
    if options and target.suffix.lower() != ".bvh":
        raise UserError(f"--{next(iter(options))} is for .bvh files, but the target is {target.name}")
    motion, report = Motion.load(source), None
    if clean:
        from kinetok.motion.cleanup import clean_feet

        motion, report = clean_feet(motion)
    motion.save(target, **options)
    print(f"wrote {target}  ({len(motion)} frames, {motion.duration:.2f} s)")
    if report is not None:
        print(report)
