"""Reading a bundle (docs/bundle.md): the manifest checked, every file's hash compared, plain tensors."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from kinetok.errors import UserError
from kinetok.model.config import DecoderConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.tensor_files import natural, parse_json, possible_shape
from kinetok.runtime.manifest import FILE_NAME, INTACT, MANIFEST, TENSOR_DTYPES, read_manifest
from kinetok.runtime.schema import each, real

ALIGNMENT = 64  # of the tensors in a flat file
PROBED = 16  # numbers of a tensor
_DTYPES = {name: np.dtype(name) for name in TENSOR_DTYPES}
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
        if not isinstance(reference, dict) or reference.get("dtype") not in _DTYPES:
            raise UserError(f"{where}: expected file, dtype (one of {list(_DTYPES)}), shape and offset")
        dtype, shape, offset = _DTYPES[reference["dtype"]], reference.get("shape"), reference.get("offset")
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
        """Raise ``UserError`` where this was made from a decoder of other sizes."""
        for name, wanted in (
            ("layers", config.n_layer),
            ("heads", config.n_head),
            ("head_dim", config.head_dim),
            ("logits", config.head_rows),
            ("positions", config.block_size),
            ("text_dim", config.text_dim),
        ):
            if (got := self.number("decoder", name)) != wanted:
                raise self._of_another_model(f"{name} {got}, the model has {wanted}")

    def check_weights(self, decoder: MotionDecoder) -> None:
        """Raise ``UserError`` where this was made from other weights, such as those before a fine-tuning.

        Only what the manifest's ``probe`` holds is compared, in the decoder's precision. Engines of before there was one pass.
        """
        stored, own = self.manifest.get("probe"), torch.tensor(probe(decoder))
        if stored is None:
            return
        if bad := each(real())(stored):
            raise UserError(f"{self.directory / self.source}: expected 'probe' to be {bad[1]}")
        dtype = decoder.norm.scale.dtype
        if not torch.equal(torch.tensor(stored, dtype=torch.float32).to(dtype), own.to(dtype)):
            raise self._of_another_model("of the same sizes, with other weights")

    def _of_another_model(self, how: str) -> UserError:
        return UserError(
            f"{self.directory}: this was made from another model ({how}): export the model again, or name the model that it "
            "was made from"
        )

    def _file(self, name: Any) -> str:
        if not isinstance(name, str) or name not in self.section("files"):
            raise UserError(f"{self.directory / self.source}: {str(name)[:80]!r} is not among its files")
        return name


def probe(decoder: MotionDecoder) -> list[float]:
    """A few numbers that tell a decoder from others of its sizes; quantising leaves them as they are."""
    parts = decoder.text_proj.bias, decoder.norm.scale, decoder.embed.weight[0]
    return [value for part in parts for value in part[:PROBED].detach().float().tolist()]


def is_bundle(path: str | Path) -> bool:
    return (Path(path) / MANIFEST).is_file()


def read_bundle(path: str | Path) -> Bundle:
    """Open a bundle. Raises ``UserError`` for a newer version, a file that is absent, cut or edited, or no bundle at all."""
    folder = Path(path)
    bundle = Bundle(folder, read_manifest(folder))
    check_files(folder, bundle.manifest, MANIFEST)
    return bundle


def check_files(folder: Path, manifest: Mapping[str, Any], source: str) -> None:
    """Compare every file that a manifest lists with its SHA-256 and size. ``UserError`` names the first that differs."""
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise UserError(f"{folder / source}: expected 'files' to be an object")
    for name, about in files.items():
        if not FILE_NAME.fullmatch(name) or not isinstance(about, dict):
            raise UserError(f"{folder / source}: {name[:80]!r} is not the name of one of its files")
        path = folder / name
        if not path.exists():
            raise UserError(f"cannot read {path}: it is not there: {INTACT}")
        if not path.is_file():  # a device or a pipe has no end
            raise UserError(f"{path}: expected a file")
        # What is too long is not read to its end.
        whole = path.stat().st_size == about.get("bytes")
        if not whole or file_digest(path) != (about.get("sha256"), about.get("bytes")):
            raise UserError(
                f"{path}: not the file that was exported (its SHA-256 or size differs from the manifest's): {INTACT}"
            )


def only_holds(folder: Path, source: str, more: str = "") -> bool:
    """Whether a folder has the manifest ``source`` and besides what that lists, and names that end with ``more``, nothing."""
    try:
        listed = parse_json((folder / source).read_bytes(), folder / source).get("files")
    except (UserError, OSError):
        return False
    ours = {source, *listed} if isinstance(listed, dict) else {source}
    return all(path.name in ours or (more != "" and path.name.endswith(more)) for path in folder.iterdir())


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
