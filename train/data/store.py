"""The small motion-capture set in ``data/cmu``: clips on one skeleton as 272 features, each also mirrored."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinetok.errors import UserError
from kinetok.motion.features import from_motion
from kinetok.motion.skeleton import CANONICAL_OFFSETS, JOINT_NAMES, LEFT_RIGHT

LEFT_KNEE, LEFT_ANKLE = JOINT_NAMES.index("left_knee"), JOINT_NAMES.index("left_ankle")
ARMS = [JOINT_NAMES.index(f"{side}_{joint}") for side in ("left", "right") for joint in ("shoulder", "elbow")]
T_POSE_ANGLE = 0.2  # radians; both upper and lower arms this close to the rest pose is a T-pose, not an action
T_POSE_BLEND = 10  # frames in which a recording leaves its T-pose
MIN_FRAMES = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One captioned clip: ``features`` float32 [T, 272] at 30 frames a second, and the same mirrored left to right."""

    id: str
    subject: str
    label: str
    split: str
    captions: tuple[str, ...]
    heading_flips: int
    features: NDArray[np.float32]
    mirrored: NDArray[np.float32]

    def side(self, mirror: bool) -> NDArray[np.float32]:
        return self.mirrored if mirror else self.features


def mirror_words(caption: str) -> str:
    """The caption of the mirrored motion: left and right exchanged."""
    other = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}
    return re.sub(r"\b(left|right|Left|Right)\b", lambda match: other[match[0]], caption)


def mirror_motion(vectors: NDArray, root: NDArray) -> tuple[NDArray, NDArray]:
    """Mirror rotation vectors ``[T, 22, 3]`` and the root ``[T, 3]`` in the plane x = 0."""
    swapped = vectors.copy()
    for left, right in LEFT_RIGHT:
        swapped[:, left], swapped[:, right] = vectors[:, right], vectors[:, left]
    return swapped * np.array([1, -1, -1]), root * np.array([-1, 1, 1])


def matrices(vectors: NDArray) -> NDArray[np.float64]:
    """Rotation vectors ``[..., 3]`` in radians to matrices ``[..., 3, 3]``."""
    vectors = vectors.astype(np.float64)
    angle = np.linalg.norm(vectors, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(vectors / np.maximum(angle[..., 0], 1e-12), -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack((zero, -z, y, z, zero, -x, -y, x, zero), -1).reshape(*x.shape, 3, 3)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)


def _trim_t_pose(vectors: NDArray) -> slice:
    """The frames between a T-pose that opens a recording and one that closes it."""
    posed = np.linalg.norm(vectors[:, ARMS], axis=-1).max(-1) < T_POSE_ANGLE
    moving = np.flatnonzero(~posed)
    if not len(moving):
        return slice(0, 0)
    first, last = int(moving[0]), int(moving[-1]) + 1
    return slice(first + T_POSE_BLEND * (first > 0), last - T_POSE_BLEND * (last < len(vectors)))


class _Recordings:
    """Random access to the recordings of one ``motions_*.npz``."""

    def __init__(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {
                    name: file[name] for name in ("trial", "start", "length", "skeleton", "rot", "trans", "offsets")
                }
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: expected recordings in the form of data/cmu/README.md, but {error}") from error
        self.rows: Mapping[str, int] = {str(name): row for row, name in enumerate(arrays["trial"])}
        self.arrays = arrays

    def read(self, trial: str, start: int, end: int) -> tuple[NDArray, NDArray]:
        """Rotation vectors ``[T, 22, 3]`` and the root ``[T, 3]``, scaled to the canonical leg length."""
        row = self.rows[trial]
        first, count = int(self.arrays["start"][row]), int(self.arrays["length"][row])
        rows = slice(first, first + count)
        vectors = np.cumsum(self.arrays["rot"][rows], axis=0, dtype=np.int16) * (np.pi / 32767)
        own, canonical = self.arrays["offsets"][self.arrays["skeleton"][row]], np.array(CANONICAL_OFFSETS)
        leg = [np.linalg.norm(o[[LEFT_KNEE, LEFT_ANKLE]], axis=-1).sum() for o in (canonical, own)]
        return vectors[start:end], self.arrays["trans"][rows][start:end] * (leg[0] / leg[1])


def _entries(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    lists = sorted(folder.glob("clips_*.jsonl"))
    if not lists:
        raise UserError(f"{folder}: expected motion data (clips_*.jsonl with motions_*.npz beside), found none")
    for path in lists:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                yield path, json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: expected a JSON object, but {error}") from error


def read_clips(folder: str | Path, *, min_frames: int = MIN_FRAMES) -> list[Clip]:
    """All clips of a folder in the form of ``data/cmu`` (see its README), on the canonical skeleton.

    Whole long recordings are left out, since their windows are there; opening and closing T-poses are cut off; what is
    then shorter than ``min_frames`` is left out. Raises ``UserError`` naming the file and what is wrong with it.
    """
    folder = Path(folder)
    recordings: dict[Path, _Recordings] = {}
    clips, seen = [], set()
    for path, entry in _entries(folder):
        if entry["kind"] == "long":
            continue
        if entry["id"] in seen:
            raise UserError(f"{path}: the clip id {entry['id']} occurs twice")
        seen.add(entry["id"])
        source = path.with_name(path.name.replace("clips_", "motions_")).with_suffix(".npz")
        if source not in recordings:
            recordings[source] = _Recordings(source)
        vectors, root = recordings[source].read(entry["trial"], entry["start"], entry["end"])
        keep = _trim_t_pose(vectors)
        vectors, root = vectors[keep], root[keep]
        if len(vectors) < min_frames:
            continue
        sides = [(vectors, root), mirror_motion(vectors, root)]
        plain, mirrored = (
            from_motion(matrices(v), r, np.array(CANONICAL_OFFSETS)).astype(np.float32) for v, r in sides
        )
        clips.append(
            Clip(
                id=entry["id"],
                subject=entry["subject"],
                label=entry["label"],
                split=entry["split"],
                captions=tuple(entry["captions"]),
                heading_flips=entry.get("heading_flips", 0),
                features=plain,
                mirrored=mirrored,
            )
        )
    return clips
