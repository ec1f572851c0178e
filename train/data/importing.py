"""Somebody's motion files and captions as a motion set that ``read_clips`` reads."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kinetok.errors import UserError
from kinetok.files import whole_directory
from kinetok.motion import Motion
from kinetok.motion.io.resample import resample, rotation_vectors
from kinetok.motion.skeleton import FPS
from kinetok.train.data.recordings import FAR, LEG, Recording, between_t_poses, matrices, write_recordings
from kinetok.train.data.sources import Found, Source, find_sources
from kinetok.train.data.store import MIN_FRAMES, Entry

MOTIONS, CLIPS, DROPPED = "motions_imported.npz", "clips_imported.jsonl", "dropped_imported.json"
VALIDATION = 0.1
FLIP = 0.5  # radians of heading within a frame; a body that turns faster is upside down
SHOWN = 3
MOST_FRAMES = 4_000_000  # 37 hours: 0.6 GB here, and 9 GB where a training holds the set with its mirror image


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What became of an import: clips by split, their ``seconds`` and ``captions`` in all, and refused files with reasons.

    ``flipped`` counts clips whose heading flips (rolls, cartwheels); trainings leave those out.
    """

    out: Path
    splits: dict[str, int]
    seconds: float
    captions: int
    flipped: int
    refused: dict[str, str]


def import_motions(
    source: str | Path, out: str | Path, *, progress: Callable[[int, int, str], None] | None = None
) -> Report:
    """Read every motion file of a folder with its captions and write the motion set ``out``, whole or not at all.

    What cannot be used is left out and named in the report and in ``dropped_imported.json``. An earlier import in ``out``
    is replaced. A clip without a split falls into train or val by a hash of its id, one in ten into val and at least one.
    In memory are 144 bytes a frame. progress is told (done, of, file). Raises ``UserError`` when nothing can be used, for
    more than ``MOST_FRAMES``, and where ``out`` is neither new nor an earlier import.
    """
    source, out = Path(source), Path(out)
    with whole_directory(out, _is_import, "an earlier import") as folder:
        found = find_sources(source, without=out)
        usable: list[tuple[Source, int, int]] = []  # with the number of frames and of flips
        write_recordings(folder / MOTIONS, _recordings(source, found, usable, progress))
        splits = splits_of([one for one, _, _ in usable])
        lines = [
            json.dumps(asdict(_entry(one, frames, flips, split)), ensure_ascii=False)
            for (one, frames, flips), split in zip(usable, splits, strict=True)
        ]
        (folder / CLIPS).write_text("\n".join(lines) + "\n", encoding="utf-8")
        dropped = [{"trial": file, "reason": reason} for file, reason in found.refused.items()]
        (folder / DROPPED).write_text(json.dumps(dropped, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return Report(
        out=out,
        splits=dict(Counter(splits)),
        seconds=sum(frames for _, frames, _ in usable) / FPS,
        captions=sum(len(one.captions) for one, _, _ in usable),
        flipped=sum(flips > 0 for _, _, flips in usable),
        refused=found.refused,
    )


def _recordings(
    source: Path,
    found: Found,
    usable: list[tuple[Source, int, int]],
    progress: Callable[[int, int, str], None] | None,
) -> Iterator[tuple[str, Recording]]:
    """One recording after another, each of which goes into ``usable``; what cannot be used is refused in ``found``."""
    total = 0
    for done, one in enumerate(found.sources):
        file = one.path.relative_to(source).as_posix()
        if progress is not None:
            progress(done, len(found.sources), file)
        try:
            recording, flips = read_recording(one.path)
        except UserError as error:
            found.refuse(file, str(error).removeprefix(f"{one.path}: "))
            continue
        total += len(recording.root)
        if total > MOST_FRAMES:
            raise UserError(
                f"{source}: expected at most {MOST_FRAMES / FPS / 3600:.0f} hours of motion, as a motion set is held in "
                "memory: import it with --shards"
            )
        usable.append((one, len(recording.root), flips))
        yield one.id, recording
    if not usable:
        reasons = "; ".join(f"{file}: {reason}" for file, reason in list(found.refused.items())[:SHOWN])
        more = f"; and {len(found.refused) - SHOWN} more" if len(found.refused) > SHOWN else ""
        raise UserError(f"{source}: expected motion files with captions, but none can be used: {reasons}{more}")


def _is_import(folder: Path) -> bool:
    return {path.name for path in folder.iterdir()} == {MOTIONS, CLIPS, DROPPED}


def read_recording(path: Path) -> tuple[Recording, int]:
    """A motion file at 30 frames a second, and how often its heading flips. ``UserError`` when it cannot be trained on."""
    motion = Motion.load(path)
    rotations, root = resample(motion.rotations.astype(np.float64), motion.root, motion.fps, FPS)
    recording = Recording(rotation_vectors(rotations), root, motion.offsets)
    # Written so that NaN, which a matrix of zeros gives, is refused as well.
    if not np.abs(matrices(recording.vectors) - rotations).max() <= 0.01:
        raise UserError("expected rotation matrices, got matrices that are none")
    if not np.abs(root).max() <= FAR:
        raise UserError(f"goes {np.abs(root).max():g} m far, expected at most {FAR:g} m: is its unit of length right?")
    if not np.linalg.norm(motion.offsets[LEG], axis=-1).sum() > 0:
        raise UserError("expected legs longer than 0 m")
    left = len(root[between_t_poses(recording.vectors)])
    if left < MIN_FRAMES:
        cut = "" if left == len(root) else f" ({len(root) - left} frames of T-pose are cut off)"
        raise UserError(f"expected at least {MIN_FRAMES} frames at {FPS:g} a second, got {left}{cut}")
    return recording, _heading_flips(rotations)


def _heading_flips(rotations: NDArray) -> int:
    heading = np.arctan2(rotations[:, 0, 0, 2], rotations[:, 0, 2, 2])
    turned = np.abs((np.diff(heading) + np.pi) % (2 * np.pi) - np.pi)
    return int((turned > FLIP).sum())


def _entry(source: Source, frames: int, flips: int, split: str) -> Entry:
    return Entry(
        id=source.id,
        trial=source.id,
        kind="whole",
        split=split,
        start=0,
        end=frames,
        captions=source.captions,
        subject=source.subject,
        label=source.label,
        heading_flips=flips,
    )


def splits_of(sources: Sequence[Source]) -> list[str]:
    """A split for each: its own, or else by a hash, so that more files later leave the earlier ones where they are.

    One in ten falls into val, and at least one does where two or more are free.
    """
    rank = [int.from_bytes(hashlib.sha256(one.id.encode()).digest()[:8]) / 2**64 for one in sources]
    splits = [one.split or ("val" if at < VALIDATION else "train") for one, at in zip(sources, rank, strict=True)]
    free = [row for row, one in enumerate(sources) if one.split is None]
    if "val" not in splits and free and splits.count("train") > 1:
        splits[min(free, key=rank.__getitem__)] = "val"
    return splits
