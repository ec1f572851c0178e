"""``kinetok view``."""

from pathlib import Path
from typing import Annotated

import typer

from kinetok.cli.common import example


def register(app: typer.Typer) -> None:
    app.command(epilog=example("kinetok view out/000-a-person-walks.bvh"))(view)


def view(
    file: Annotated[Path, typer.Argument(help="A motion file: .bvh, .glb, .npz or .npy.")],
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve on.", min=1, max=65535)] = 8080,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
) -> None:
    """Look at a motion in the browser: play, pause, scrub. Ctrl-C ends it."""
    from kinetok.motion import Motion
    from kinetok.motion.viewer import view as show

    show(Motion.load(file), host=host, port=port, open_browser=browser)
