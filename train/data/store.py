"""A small captioned set (``data/cmu``, or an import): clips on one skeleton as 272 features, each also mirrored."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinetok.errors import UserError
from kinetok.model.text import check_prompt
from kinetok.motion.features import from_motion, mirrored
from kinetok.motion.skeleton import CANONICAL_OFFSETS
from kinetok.train.data.recordings import Recordings, between_t_poses, matrices

MIN_FRAMES = 30
KINDS = ("whole", "window", "long")
SPLITS = ("train", "val", "test")
OPPOSITES = {
    "left": "right",
    "leftward": "rightward",
    "leftwards": "rightwards",
    "clockwise": "counterclockwise",
    "counter-clockwise": "clockwise",
    "counter clockwise": "clockwise",
    "anticlockwise": "clockwise",
    "anti-clockwise": "clockwise",
    "anti clockwise": "clockwise",
}
OPPOSITES |= {other: word for word, other in OPPOSITES.items() if other not in OPPOSITES}
SIDED = re.compile(rf"\b({'|'.join(sorted(OPPOSITES, key=len, reverse=True))})\b", re.IGNORECASE)


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
    """The caption of the mirrored motion: left and right exchanged, and the two ways round."""

    def other(match: re.Match[str]) -> str:
        word = OPPOSITES[match[0].lower()]
        return word.upper() if match[0].isupper() else word.capitalize() if match[0][0].isupper() else word

    return SIDED.sub(other, caption)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of a ``clips_*.jsonl``, checked: frames ``start`` to ``end`` of the recording ``trial``."""

    id: str
    trial: str
    kind: str
    split: str
    start: int
    end: int
    captions: tuple[str, ...]
    subject: str
    label: str
    heading_flips: int = 0

    @classmethod
    def parse(cls, line: str) -> "Entry":
        """A line of JSON. ``UserError`` saying which key is missing or wrong; keys beyond these are left alone."""
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"expected a JSON object, but {error}") from error
        if not isinstance(value, dict):
            raise UserError(f"expected a JSON object, got {type(value).__name__}")
        absent = [name for name in cls.__slots__ if name not in value and name != "heading_flips"]
        if absent:
            raise UserError(f"missing: {', '.join(absent)}")
        for name in ("id", "trial", "subject", "label"):
            if not isinstance(value[name], str):
                raise UserError(f"expected {name} to be text, got {_short(value[name])}")
        for name, words in (("kind", KINDS), ("split", SPLITS)):
            if value[name] not in words:
                raise UserError(f"expected {name} to be one of {', '.join(words)}, got {_short(value[name])}")
        for name in ("start", "end", "heading_flips"):
            if type(value.get(name, 0)) is not int or value.get(name, 0) < 0:
                raise UserError(f"expected {name} to be a count of frames, got {_short(value[name])}")
        captions = value["captions"]
        if not isinstance(captions, list) or not captions:
            got = "none" if captions == [] else _short(captions)
            raise UserError(f"expected captions to be a list of sentences, got {got}")
        known = {name: value[name] for name in cls.__slots__ if name in value}
        return cls(**{**known, "captions": tuple(map(check_prompt, captions))})


def _short(value: Any) -> str:
    return repr(value)[:60] if isinstance(value, str | int | float | None) else type(value).__name__


def set_lines(folder: Path) -> Iterator[tuple[Path, int, str]]:
    """The lines of a motion set's ``clips_*.jsonl``: (file, number of the line, line); blank ones are skipped.

    ``UserError`` where there are none, and where a file is not UTF-8.
    """
    lists = sorted(folder.glob("clips_*.jsonl"))
    if not lists:
        raise UserError(
            f"{folder}: expected motion data (clips_*.jsonl with motions_*.npz beside), found none; a folder of motion "
            "files and captions becomes such data with kinetok data import"
        )
    for path in lists:
        try:
            with path.open(encoding="utf-8", newline="\n") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield path, number, line
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: expected a UTF-8 file of JSON lines, but {error}") from error


class MotionSet:
    """The clips of a motion set one after another; one file of recordings is in memory at a time."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._recordings: Recordings | None = None

    def open(self, path: Path) -> None:
        """Go to the recordings beside a ``clips_*.jsonl``. ``UserError`` where they cannot be read."""
        source = recordings_of(path)
        if self._recordings is None or self._recordings.path != source:
            self._recordings = Recordings(source)

    def entry(self, line: str) -> Entry:
        """The clip of a line. ``UserError`` where it is wrong or met before, or its recording is not there."""
        assert self._recordings is not None
        entry = Entry.parse(line)
        if entry.id in self._seen:
            raise UserError(f"the clip id {entry.id!r} occurs twice")
        self._seen.add(entry.id)
        frames = self._recordings.frames(entry.trial)
        if frames is None:
            raise UserError(f"{self._recordings.path.name} has no trial {entry.trial!r}")
        if not entry.start < entry.end <= frames:
            got = f"start {entry.start} and end {entry.end}"
            raise UserError(f"expected a stretch of the {frames} frames of {entry.trial!r}, got {got}")
        return entry

    def motion(self, entry: Entry) -> tuple[NDArray, NDArray]:
        """Rotation vectors and root of an entry of the open file, without opening and closing T-poses, on the canonical
        skeleton."""
        assert self._recordings is not None
        recording = self._recordings.read(entry.trial, entry.start, entry.end)
        keep = between_t_poses(recording.vectors)
        vectors, root = (array[keep] for array in recording.on_canonical_skeleton())
        return vectors, root


def recordings_of(path: Path) -> Path:
    """The recordings beside a ``clips_*.jsonl``."""
    return path.with_name(path.name.replace("clips_", "motions_", 1)).with_suffix(".npz")


def read_clips(folder: str | Path, *, min_frames: int = MIN_FRAMES) -> list[Clip]:
    """All clips of a folder in the form of ``data/cmu`` (see its README), on the canonical skeleton.

    Whole long recordings are left out, since their windows are there; opening and closing T-poses are cut off; what is
    then shorter than ``min_frames`` is left out. Raises ``UserError`` naming the file and what is wrong with it.
    """
    motions, clips = MotionSet(), []
    for path, number, line in set_lines(Path(folder)):
        motions.open(path)
        try:
            entry = motions.entry(line)
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        if entry.kind == "long":
            continue
        vectors, root = motions.motion(entry)
        if len(root) >= min_frames:
            clips.append(_clip(entry, vectors, root))
    if not clips:
        raise UserError(f"{folder}: expected clips of at least {min_frames} frames, found none")
    return clips


def _clip(entry: Entry, vectors: NDArray, root: NDArray) -> Clip:
    features = from_motion(matrices(vectors), root, np.array(CANONICAL_OFFSETS))
    return Clip(
        id=entry.id,
        subject=entry.subject,
        label=entry.label,
        split=entry.split,
        captions=entry.captions,
        heading_flips=entry.heading_flips,
        features=features.astype(np.float32),
        mirrored=mirrored(features).astype(np.float32),
    )
