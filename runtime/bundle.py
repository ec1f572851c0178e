"""Reading a bundle (docs/bundle.md): the manifest checked, every file's hash compared, plain tensors."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from kinetok.errors import UserError
from kinetok.model.config import DecoderConfig
from kinetok.model.tensor_files import natural, parse_json, possible_shape

MANIFEST = "kinetok_bundle.json"
FORMAT, VERSION = "kinetok-bundle", 1
ALIGNMENT = 64  # of the tensors in a flat file
TENSOR_DTYPES = {name: np.dtype(name) for name in ("float32", "int32", "int64")}
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose files are whole. ``manifest`` is the parsed kinetok_bundle.json."""

    directory: Path
    manifest: dict[str, Any]
    source: ClassVar[str] = MANIFEST

    def section(self, name: str, parent: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """An object of the manifest. ``UserError`` where it is none."""
        value = (self.manifest if parent is None else parent).get(name)
        if not isinstance(value, dict):
            raise UserError(f"{self.directory / self.source}: expected {name!r} to be an object")
        return value

    def number(self, section: str, name: str) -> int:
        """A size from a section of the manifest."""
        value = self.section(section).get(name)
        if not isinstance(value, int) or not natural(value):
            raise UserError(
                f"{self.directory / self.source}: expected {section}.{name} to be a whole number, got {value!r}"
            )
        return value

    def graph(self, name: str) -> Path:
        """The file of a graph. ``UserError`` with the reason where the bundle has none."""
        graphs = self.section("graphs")
        if name not in graphs:
            why = self.manifest.get("absent", {}).get(name, "it was exported without")
            raise UserError(f"{self.directory}: this bundle has no graph {name!r}: {why}")
        return self.directory / self._file(self.section(name, graphs).get("file"))

    def tensor(self, reference: Any) -> np.ndarray:
        """A plain tensor that the manifest refers to. ``UserError`` where it does not lie within its file."""
        where = f"{self.directory / self.source}: tensor {str(reference)[:80]}"
        if not isinstance(reference, dict) or reference.get("dtype") not in TENSOR_DTYPES:
            raise UserError(f"{where}: expected file, dtype (one of {list(TENSOR_DTYPES)}), shape and offset")
        dtype, shape, offset = TENSOR_DTYPES[reference["dtype"]], reference.get("shape"), reference.get("offset")
        path = self.directory / self._file(reference.get("file"))
        if (
            not isinstance(shape, list)
            or not possible_shape(shape)
            or not isinstance(offset, int)
            or not natural(offset)
        ):
            raise UserError(f"{where}: expected a shape and an offset of whole numbers")
        if offset % ALIGNMENT or offset + prod(shape) * dtype.itemsize > path.stat().st_size:
            raise UserError(f"{where}: expected it at a multiple of {ALIGNMENT} bytes within the file")
        count = prod(shape)
        return np.fromfile(path, dtype.newbyteorder("<"), count, offset=offset).reshape(shape)

    def check_decoder(self, config: DecoderConfig) -> None:
        """Raise ``UserError`` where the bundle was made from a decoder of other sizes."""
        for name, wanted in (
            ("layers", config.n_layer),
            ("heads", config.n_head),
            ("head_dim", config.head_dim),
            ("logits", config.head_rows),
            ("positions", config.block_size),
            ("text_dim", config.text_dim),
        ):
            if (got := self.number("decoder", name)) != wanted:
                raise UserError(
                    f"{self.directory}: this bundle is of another model ({name} {got}, the model has {wanted}): export the "
                    "model again, or name the model that it was made from"
                )

    def _file(self, name: Any) -> str:
        if not isinstance(name, str) or name not in self.section("files"):
            raise UserError(f"{self.directory / self.source}: {str(name)[:80]!r} is not among its files")
        return name


def is_bundle(path: str | Path) -> bool:
    return (Path(path) / MANIFEST).is_file()


def read_bundle(path: str | Path) -> Bundle:
    """Open a bundle. Raises ``UserError`` for a newer version, a file that is absent, cut or edited, or no bundle at all."""
    folder = Path(path)
    try:
        manifest = parse_json((folder / MANIFEST).read_bytes(), folder / MANIFEST)
    except OSError as error:
        raise UserError(
            f"{folder} is no bundle: cannot read {MANIFEST} ({error.strerror or error}); make one with kinetok export onnx"
        ) from error
    version = manifest.get("version")
    if manifest.get("format") != FORMAT or not isinstance(version, int) or version < 1:
        raise UserError(
            f"{folder / MANIFEST}: expected the format {FORMAT!r}, got {str(manifest.get('format'))[:40]!r}"
        )
    if version > VERSION:
        raise UserError(
            f"{folder / MANIFEST}: version {version} is newer than this kinetok reads ({VERSION}): update kinetok, or "
            "export the model again with this one"
        )
    bundle = Bundle(folder, manifest)
    check_files(folder, manifest, MANIFEST)
    return bundle


def check_files(folder: Path, manifest: Mapping[str, Any], source: str) -> None:
    """Compare every file that a manifest lists with its SHA-256 and size. ``UserError`` names the first that differs."""
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise UserError(f"{folder / source}: expected 'files' to be an object")
    for name, about in files.items():
        if not _NAME.fullmatch(name) or not isinstance(about, dict):
            raise UserError(f"{folder / source}: {name[:80]!r} is not the name of one of its files")
        digest, size = file_digest(folder / name)
        if (digest, size) != (about.get("sha256"), about.get("bytes")):
            raise UserError(
                f"{folder / name}: not the file that was exported (its SHA-256 or size differs from the manifest's): "
                "export the model again, or fetch an intact copy"
            )


def file_digest(path: Path) -> tuple[str, int]:
    """SHA-256 in hex, and the size."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest(), size
