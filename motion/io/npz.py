"""numpy files: ``.npz`` with everything, ``.npy`` with the 272 features."""

import io
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

from kinetok.errors import UserError
from kinetok.files import whole_file
from kinetok.motion.motion import Motion

FEATURES = 272
DAMAGED = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    RuntimeError,  # zipfile's word for encryption and for compressions that it does not know
    MemoryError,  # a header that asks for more than there is
    tokenize.TokenError,  # numpy lets it out of a damaged header
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy raises for a file that is not what it seems."""


def save_numpy(motion: Motion, path: str | Path) -> None:
    """.npz: rotations [T,22,3,3], root [T,3], offsets [22,3], joints [T,22,3], features [T,272], fps, text; .npy: features."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        if Path(path).suffix.lower() == ".npy":
            np.save(file, motion.features, allow_pickle=False)
        else:
            np.savez_compressed(
                file,
                rotations=motion.rotations,
                root=motion.root,
                offsets=motion.offsets,
                joints=motion.joints,
                features=motion.features,
                fps=np.float64(motion.fps),
                text=np.array(motion.text),
            )


def load_numpy(path: Path, data: bytes) -> Motion:
    """Read what ``save_numpy`` writes, or any ``.npy`` of features ``[T, 272]``. Nothing pickled is admitted."""
    try:
        content = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(content, np.ndarray):
            if content.ndim != 2 or content.shape[1] != FEATURES or content.dtype.kind not in "fiu":
                raise UserError(f"{path}: expected features [T, {FEATURES}], got {content.dtype} {list(content.shape)}")
            return _checked(path, lambda: Motion.from_features(content))
        with content:
            fields = {
                name: content[name] for name in ("rotations", "root", "offsets", "fps", "text") if name in content
            }
    except UserError:
        raise
    except DAMAGED as error:
        detail = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: expected a numpy motion file, but it cannot be read ({detail})") from error
    absent = [name for name in ("rotations", "root", "offsets", "fps") if name not in fields]
    if absent:
        raise UserError(f"{path}: expected the arrays of a kinetok .npz; missing: {', '.join(absent)}")
    text = str(fields["text"]) if "text" in fields else ""

    def build() -> Motion:
        if fields["fps"].size != 1 or fields["fps"].dtype.kind not in "fiu":
            raise UserError("fps: expected one number")
        return Motion(
            rotations=fields["rotations"],
            root=fields["root"],
            offsets=fields["offsets"],
            fps=float(fields["fps"]),
            text=text,
        )

    return _checked(path, build)


def _checked(path: Path, build) -> Motion:  # type: ignore[no-untyped-def]
    try:
        return build()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
