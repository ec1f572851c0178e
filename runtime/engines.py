"""Folders of TensorRT engines: what is in them, and whether this machine's GPU can run them."""

from pathlib import Path
from typing import Any

from kinetok.errors import UserError
from kinetok.model.tensor_files import parse_json
from kinetok.runtime.bundle import check_files

ENGINES = "kinetok_engines.json"
FORMAT, VERSION = "kinetok-engines", 1


def read_engines(path: str | Path) -> dict[str, Any]:
    """The manifest of a folder of engines whose files are whole. ``UserError`` for anything else."""
    folder = Path(path)
    try:
        manifest = parse_json((folder / ENGINES).read_bytes(), folder / ENGINES)
    except OSError as error:
        raise UserError(f"{folder}: cannot read {ENGINES} ({error.strerror or error})") from error
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        got = f"{manifest.get('format')!r} version {manifest.get('version')!r}"
        raise UserError(
            f"{folder / ENGINES}: expected {FORMAT!r} version {VERSION}, got {got[:60]}: build the engines again"
        )
    check_files(folder, manifest, ENGINES)
    return manifest


def check_gpu(manifest: dict[str, Any], capability: tuple[int, int] | None) -> None:
    """Raise ``UserError`` where engines were built for other GPUs than one of ``capability`` (None: no GPU)."""
    if capability is None:
        raise UserError("these engines need an NVIDIA GPU, and torch sees none: use the backend onnx or torch")
    targets, own = manifest.get("targets", []), f"sm_{capability[0]}{capability[1]}"
    if targets and own not in targets:
        raise UserError(
            f"these engines were built for {', '.join(map(str, targets))}, but this GPU is {own}: build them again with "
            f"kinetok export {manifest.get('library')} --targets {own}"
        )
