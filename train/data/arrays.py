"""Reading files and arrays that nobody has looked at yet: bounded, plain files only, no code."""

import io
import os
import stat
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from kinetok.errors import UserError
from kinetok.motion.io.npz import DAMAGED, FEATURES
from kinetok.train.data.recordings import FAR

MOST_FRAMES = 108_000  # an hour
MOST_BYTES = MOST_FRAMES * FEATURES * 8 + 4096  # of the file of one clip, which may be in double precision


def plain_bytes(path: Path, most: int) -> bytes:
    """All of a plain file. ``UserError``, which does not name it, where it is none, unreadable or of over ``most`` bytes."""
    try:
        # Without waiting: a pipe under the name of a clip would hold the import up for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            about = os.fstat(handle)
            if not stat.S_ISREG(about.st_mode):
                raise UserError("expected a plain file, but it is a pipe or a device")
            if about.st_size > most:
                raise UserError(f"expected at most {most} bytes, got {about.st_size}")
            return file.read(about.st_size)
    except FileNotFoundError as error:
        raise UserError("there is no such file") from error
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot be read, {getattr(error, 'strerror', None) or error}") from error


def read_features(content: bytes) -> NDArray[np.floating]:
    """The features ``[T, 272]`` in the bytes of a ``.npy``, as they are stored.

    ``UserError``, which does not name the file, where it is something else; what the header promises is compared with
    what is there before anything is made of it.
    """
    file = io.BytesIO(content)
    try:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise UserError(f"cannot be read, a .npy of version {version[0]}.{version[1]}")
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = header(file)
        if dtype.kind != "f" or len(shape) != 2 or shape[1] != FEATURES:
            raise UserError(f"expected features [T, {FEATURES}], got {dtype} {list(shape)}")
        if shape[0] > MOST_FRAMES:
            raise UserError(f"expected at most {MOST_FRAMES} frames, got {shape[0]}")
        if len(content) - file.tell() != shape[0] * FEATURES * dtype.itemsize:
            raise UserError(f"cannot be read, it has {len(content)} bytes, not {list(shape)} of {dtype}")
        return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(f"cannot be read, {' '.join(str(error).split())[:80]}") from error


def check_features(features: NDArray[np.floating], least: int) -> NDArray[np.float32]:
    """Features as float32. ``UserError`` where they are shorter than ``least`` frames, not finite, or far beyond a body."""
    if len(features) < least:
        raise UserError(f"expected at least {least} frames, got {len(features)}")
    if not np.abs(features).max() <= FAR:  # false for NaN as well
        raise UserError(f"expected finite numbers up to {FAR:g}, got {features.flat[np.abs(features).argmax()]:g}")
    return np.ascontiguousarray(features, dtype=np.float32)
