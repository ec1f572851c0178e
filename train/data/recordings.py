"""Recordings in one ``motions_*.npz`` (the form is in ``data/cmu/README.md``): reading, checking and writing."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kinetok.errors import UserError
from kinetok.files import whole_file
from kinetok.motion.io.npz import DAMAGED
from kinetok.motion.skeleton import CANONICAL_OFFSETS, FPS, JOINT_NAMES, JOINTS, PARENTS

UNIT = np.pi / 32767  # radians a step of the stored rotation vectors
FAR = 1000.0  # metres from the origin that no recording reaches; beyond, the unit of length is wrong
LEG = [JOINT_NAMES.index("left_knee"), JOINT_NAMES.index("left_ankle")]
ARMS = [JOINT_NAMES.index(f"{side}_{joint}") for side in ("left", "right") for joint in ("shoulder", "elbow")]
# Radians; both upper and lower arms this close to the rest pose is a T-pose, not an action. From 0.5 on, captured arms that
# are swung outward count as well.
T_POSE_ANGLE = 0.4
T_POSE_BLEND = 10  # frames in which a recording leaves its T-pose
KINDS: Mapping[str, Callable[[np.dtype], bool]] = {
    "text": lambda dtype: dtype.kind == "U",
    "integers": lambda dtype: dtype.kind in "iu",
    "16-bit integers": lambda dtype: dtype == np.int16,
    "floating-point numbers": lambda dtype: dtype.kind == "f",
}
FIELDS: Mapping[str, tuple[str, tuple[int | str, ...]]] = {
    "trial": ("text", ("trials",)),
    "start": ("integers", ("trials",)),
    "length": ("integers", ("trials",)),
    "skeleton": ("integers", ("trials",)),
    "rot": ("16-bit integers", ("rows", JOINTS, 3)),
    "trans": ("floating-point numbers", ("rows", 3)),
    "offsets": ("floating-point numbers", ("skeletons", JOINTS, 3)),
}
"""The arrays: their kind and their shape, in which a name stands for any one size."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One recording at 30 frames a second: local rotation vectors ``[T, 22, 3]`` in radians (joint 0 global), the pelvis
    ``[T, 3]`` and the joints' offsets from their parents ``[22, 3]`` in metres."""

    vectors: NDArray
    root: NDArray
    offsets: NDArray

    def on_canonical_skeleton(self) -> tuple[NDArray, NDArray]:
        """Rotation vectors and the root path scaled to the canonical leg length."""
        leg = [np.linalg.norm(o[LEG], axis=-1).sum() for o in (np.array(CANONICAL_OFFSETS), self.offsets)]
        return self.vectors, self.root * (leg[0] / leg[1])


def matrices(vectors: NDArray) -> NDArray[np.float64]:
    """Rotation vectors ``[..., 3]`` in radians to matrices ``[..., 3, 3]``."""
    vectors = vectors.astype(np.float64)
    angle = np.linalg.norm(vectors, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(vectors / np.maximum(angle[..., 0], 1e-12), -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack((zero, -z, y, z, zero, -x, -y, x, zero), -1).reshape(*x.shape, 3, 3)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)


def between_t_poses(vectors: NDArray) -> slice:
    """The frames between a T-pose that opens a recording and one that closes it; none when it never leaves it."""
    posed = np.linalg.norm(vectors[:, ARMS], axis=-1).max(-1) < T_POSE_ANGLE
    moving = np.flatnonzero(~posed)
    if not len(moving):
        return slice(0, 0)
    first, last = int(moving[0]), int(moving[-1]) + 1
    return slice(first + T_POSE_BLEND * (first > 0), last - T_POSE_BLEND * (last < len(vectors)))


class Recordings:
    """Random access to the recordings of one file. ``UserError`` naming the file and what is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        arrays = _read(path)
        _check(path, arrays)
        self.rows: Mapping[str, int] = {str(name): row for row, name in enumerate(arrays["trial"])}
        self.arrays = arrays

    def frames(self, trial: str) -> int | None:
        """How many frames a trial has; None for one that is not here."""
        return int(self.arrays["length"][self.rows[trial]]) if trial in self.rows else None

    def read(self, trial: str, start: int, end: int) -> Recording:
        """Frames ``start`` to ``end`` of a trial, which must be there."""
        row = self.rows[trial]
        first, count = int(self.arrays["start"][row]), int(self.arrays["length"][row])
        rows = slice(first, first + count)
        vectors = np.cumsum(self.arrays["rot"][rows], axis=0, dtype=np.int16) * UNIT
        offsets = self.arrays["offsets"][self.arrays["skeleton"][row]]
        return Recording(vectors[start:end], self.arrays["trans"][rows][start:end], offsets)


def _read(path: Path) -> dict[str, NDArray]:
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            raise UserError(f"{path}: expected recordings in the form of data/cmu/README.md, got a single array")
        with content:
            absent = [name for name in FIELDS if name not in content]
            if absent:
                raise UserError(
                    f"{path}: expected recordings in the form of data/cmu/README.md; missing: {', '.join(absent)}"
                )
            return {name: content[name] for name in FIELDS}
    except UserError:
        raise
    except DAMAGED as error:
        detail = " ".join(str(error).split())[:100]
        raise UserError(
            f"{path}: expected recordings in the form of data/cmu/README.md, but they cannot be read ({detail})"
        ) from error


def _check(path: Path, arrays: Mapping[str, NDArray]) -> None:
    sizes: dict[str, int] = {}
    for name, (kind, shape) in FIELDS.items():
        array = arrays[name]
        if array.ndim == len(shape):
            for size, got in zip(shape, array.shape, strict=True):
                sizes.setdefault(str(size), got if isinstance(size, str) else size)
        wanted = tuple(sizes.get(str(size), size) for size in shape)
        if array.shape != wanted or not KINDS[kind](array.dtype):
            form = ", ".join(map(str, wanted))
            raise UserError(f"{path}: expected {name} to be {kind} [{form}], got {array.dtype} {list(array.shape)}")
    counts = Counter(map(str, arrays["trial"]))
    names = list(counts)
    if len(names) < counts.total():
        raise UserError(f"{path}: the trial {counts.most_common(1)[0][0]!r} occurs twice")
    start, length, skeleton = (arrays[name].astype(np.int64) for name in ("start", "length", "skeleton"))
    bad = (start < 0) | (length < 1) | (length > sizes["rows"] - start)
    bad |= (skeleton < 0) | (skeleton >= sizes["skeletons"])
    if bad.any():
        row = int(bad.argmax())
        raise UserError(
            f"{path}: the trial {names[row]!r} (start {start[row]}, length {length[row]}, skeleton {skeleton[row]}) is "
            f"outside of the {sizes['rows']} rows and {sizes['skeletons']} skeletons"
        )
    near = (np.abs(arrays["trans"]) <= FAR).all(-1)  # false for NaN
    if not near.all():
        row = int((~near).argmax())
        owner = next((n for n, a, b in zip(names, start, start + length, strict=True) if a <= row < b), "no trial")
        got = ", ".join(f"{value:g}" for value in arrays["trans"][row])
        raise UserError(f"{path}: expected positions within {FAR:g} m, got ({got}) in row {row} ({owner})")
    legs = np.linalg.norm(arrays["offsets"][:, LEG], axis=-1).sum(-1)
    if not (np.isfinite(arrays["offsets"]).all() and (legs > 0).all()):
        raise UserError(f"{path}: expected finite offsets and legs longer than 0 m")


def write_recordings(path: Path, recordings: Iterable[tuple[str, Recording]]) -> None:
    """Write named recordings, at least one, as ``Recordings`` reads them; rotations within 0.01 degree, whole or not at all.

    One after another is taken and kept as it is stored, in 144 bytes a frame.
    """
    names, steps, trans, offsets = [], [], [], []
    for name, recording in recordings:
        stored = np.rint(recording.vectors / UNIT).astype(np.int16)
        names.append(name)
        # Integers wrap around, and so does the sum that undoes these differences.
        steps.append(np.diff(stored, axis=0, prepend=np.zeros_like(stored[:1])))
        trans.append(recording.root.astype(np.float32))
        offsets.append(recording.offsets.astype(np.float32))
    different, skeletons = np.unique(np.stack(offsets), axis=0, return_inverse=True)
    lengths = [len(path) for path in trans]
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            trial=np.array(names),
            start=np.cumsum([0, *lengths[:-1]]),
            length=np.array(lengths),
            skeleton=skeletons,
            rot=np.concatenate(steps),
            trans=np.concatenate(trans),
            offsets=different,
            joints=np.array(JOINT_NAMES),
            parents=np.array(PARENTS),
            fps=np.float64(FPS),
        )
