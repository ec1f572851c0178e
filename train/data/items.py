"""What there is to import: the clips of a folder one after another, in an order that stays."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kinetok.errors import UserError
from kinetok.model.text import parse_prompts
from kinetok.motion.features import from_motion
from kinetok.motion.skeleton import CANONICAL_OFFSETS
from kinetok.train.data.arrays import MOST_BYTES, plain_bytes, read_features
from kinetok.train.data.importing import read_recording, splits_of
from kinetok.train.data.recordings import between_t_poses, matrices
from kinetok.train.data.registry import Registry
from kinetok.train.data.sources import MOST_TEXT, MOTIONMILLION, Source, find_sources
from kinetok.train.data.store import MIN_FRAMES, SPLITS, Entry, MotionSet, set_lines


@dataclass(frozen=True, slots=True)
class Item:
    """One clip to import: ``load`` gives its captions and features ``[T, 272]``, or raises ``UserError``."""

    file: str
    id: str
    split: str
    load: Callable[[], tuple[list[str], NDArray]]
    label: str = ""
    flips: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """A file, or a line of one, that is refused before anything is read."""

    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class Listing:
    """What a folder holds: ``total`` items; ``digest`` of what makes them these, which tells an interrupted import whether
    they still are; ``items`` of a registry for names that occur twice."""

    total: int
    digest: str
    items: Callable[[Registry], Iterator[Item | Refused]]


def list_items(source: Path, *, without: Path) -> Listing:
    """The clips of MotionMillion's layout (section 6), of a motion set, or of motion files with captions.

    Raises ``UserError`` where ``source`` is none of these, and where its lists cannot be read or miss a split.
    """
    if not source.is_dir():
        raise UserError(f"{source}: expected a folder of motion and captions, but there is none")
    if all((source / name).is_dir() for name in MOTIONMILLION[:2]):
        return _motionmillion(source)
    if any(source.glob("clips_*.jsonl")):
        return _motion_set(source)
    return _files(source, without)


def _digest(parts: Iterator[str]) -> tuple[int, str]:
    """How many there are, and what they are."""
    count, digest = 0, hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
        count += 1
    return count, digest.hexdigest()


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            yield from (line.strip() for line in lines if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a list of clips in UTF-8, one a line, but {error}") from error


def _motionmillion(source: Path) -> Listing:
    """The clips of the split lists, which are read as they are needed."""
    motions, texts, lists = (source / name for name in MOTIONMILLION)
    given = [(split, lists / f"{split}.txt") for split in SPLITS if (lists / f"{split}.txt").is_file()]
    missing = [f"{split}.txt" for split in ("train", "val") if split not in dict(given)]
    if missing:
        raise UserError(f"{lists}: expected train.txt and val.txt, one clip a line; missing: {', '.join(missing)}")
    total, digest = _digest(f"{split}:{name}" for split, path in given for name in _lines(path))
    for split, path in given:
        if split in ("train", "val") and next(_lines(path), None) is None:
            raise UserError(f"{path}: expected clips, one a line, but it is empty")

    def load(name: str) -> tuple[list[str], NDArray]:
        captions, file = f"{MOTIONMILLION[1]}/{name}.txt", motions / f"{name}.npy"
        try:
            text = plain_bytes(texts / f"{name}.txt", MOST_TEXT)
        except UserError as error:
            raise UserError(f"no captions: expected {captions}, one sentence a line, but {error}") from error
        return parse_prompts(text, captions), read_features(plain_bytes(file, MOST_BYTES))

    def clips(names: Registry) -> Iterator[Item | Refused]:
        for split, path in given:
            for name in _lines(path):
                if name.startswith("/") or ".." in name.split("/") or not name.isprintable():
                    yield Refused(ascii(name), f"expected the name of a clip in {path.name}")
                elif not names.number(name)[1]:
                    yield Refused(f"{MOTIONMILLION[0]}/{name}.npy", f"it is in the lists twice, again in {path.name}")
                else:
                    yield Item(
                        file=f"{MOTIONMILLION[0]}/{name}.npy",
                        id=name,
                        split=split,
                        load=lambda name=name: load(name),  # type: ignore[misc]
                        label=name.rpartition("/")[0],
                    )

    return Listing(total, digest, clips)


def _motion_set(source: Path) -> Listing:
    """The lines of a motion set. Long recordings, whose windows are lines of their own, are refused."""

    def parts() -> Iterator[str]:
        for path, number, line in set_lines(source):
            yield f"{path.name}:{number}:{line}"

    total, digest = _digest(parts())
    files = sorted(path for path in source.glob("motions_*.npz") if path.is_file())
    sizes = [f"{path.name}:{path.stat().st_size}" for path in files]

    def features(motions: MotionSet, entry: Entry) -> tuple[list[str], NDArray]:
        if entry.kind == "long":
            raise UserError("a long recording, of which the windows are clips of their own")
        vectors, root = motions.motion(entry)
        return list(entry.captions), _features(vectors, root)

    def clips(names: Registry) -> Iterator[Item | Refused]:
        motions = MotionSet()
        for path, number, line in set_lines(source):
            motions.open(path)
            try:
                entry = motions.entry(line)
            except UserError as error:
                yield Refused(f"{path.name}, line {number}", str(error))
                continue
            yield Item(
                file=entry.id,
                id=entry.id,
                split=entry.split,
                load=lambda entry=entry: features(motions, entry),  # type: ignore[misc]
                label=entry.label,
                flips=entry.heading_flips,
            )

    return Listing(total, _digest(iter([digest, *sizes]))[1], clips)


def _files(source: Path, without: Path) -> Listing:
    """Motion files with captions, whose names and captions are in memory."""
    found = find_sources(source, without=without)

    def load(one: Source) -> tuple[list[str], NDArray]:
        recording, _ = read_recording(one.path)
        keep = between_t_poses(recording.vectors)
        vectors, root = (array[keep] for array in recording.on_canonical_skeleton())
        return list(one.captions), _features(vectors, root)

    def clips(names: Registry) -> Iterator[Item | Refused]:
        for one, split in zip(found.sources, splits_of(found.sources), strict=True):
            yield Item(
                file=one.path.relative_to(source).as_posix(),
                id=one.id,
                split=split,
                load=lambda one=one: load(one),  # type: ignore[misc]
                label=one.label,
            )
        for file, reason in found.refused.items():
            yield Refused(file, reason)

    parts = (repr((one.id, one.captions, one.split, one.label)) for one in found.sources)
    _, digest = _digest(parts)
    _, digest = _digest(iter([digest, *map(repr, found.refused.items())]))
    return Listing(len(found.sources) + len(found.refused), digest, clips)


def _features(vectors: NDArray, root: NDArray) -> NDArray:
    if len(root) < MIN_FRAMES:
        raise UserError(f"expected at least {MIN_FRAMES} frames without T-poses, got {len(root)}")
    return from_motion(matrices(vectors), root, np.array(CANONICAL_OFFSETS))
