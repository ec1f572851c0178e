"""Somebody's motion as a clip store: clip after clip, resumable, in memory that does not grow with the data."""

import hashlib
import json
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinetok.errors import UserError
from kinetok.files import whole_file
from kinetok.model.text import check_prompt, read_prompts
from kinetok.motion.features import from_motion
from kinetok.motion.io.npz import DAMAGED
from kinetok.motion.skeleton import CANONICAL_OFFSETS, FPS
from kinetok.train.data.importing import VALIDATION, read_recording
from kinetok.train.data.recordings import FAR, between_t_poses, matrices
from kinetok.train.data.shards import (
    ABOUT,
    FEATURES,
    FORMAT,
    INDEX,
    REFUSED,
    SHARDS,
    ShardWriter,
    join_indices,
    need_pyarrow,
    write_index,
)
from kinetok.train.data.sources import MOTIONMILLION, find_sources
from kinetok.train.data.store import MIN_FRAMES, SPLITS, read_clips

CLIPS = 1000  # of a shard
PARTS, PROGRESS = "index", "progress.json"
SHOWN = 20  # refused files that a report names; all are in refused.jsonl


@dataclass(frozen=True, slots=True)
class Item:
    """One clip to import: ``load`` gives its features float32 ``[T, 272]`` or raises ``UserError``."""

    file: str
    id: str
    split: str
    captions: Callable[[], list[str]]
    load: Callable[[], NDArray[np.float32]]
    label: str = ""
    flips: int = 0


@dataclass(kw_only=True, slots=True)
class ShardReport:
    """What became of an import into shards; ``refused`` names the first files left out, ``left_out`` counts all.

    ``resumed`` is how many clips an earlier, interrupted import had already written.
    """

    out: Path
    splits: dict[str, int]
    seconds: float
    captions: int
    shards: int
    left_out: int
    reasons: dict[str, int]
    refused: dict[str, str]
    resumed: int


@dataclass(slots=True)
class _Progress:
    """How far an import is: what stands here is on the disk."""

    source: str
    consumed: int = 0
    clips: int = 0
    frames: int = 0
    captions: int = 0
    refused_bytes: int = 0
    left_out: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    shards: list[dict[str, Any]] = field(default_factory=list)


def import_shards(
    source: str | Path,
    out: str | Path,
    *,
    clips: int = CLIPS,
    progress: Callable[[int, int, str], None] | None = None,
) -> ShardReport:
    """Import a folder into the clip store ``out``, ``clips`` of them a shard.

    The folder: MotionMillion's layout (section 6), a motion set (``data/cmu``, or an import), or motion files with captions.
    ``out`` appears when all is written; until then it is ``out.importing``, with which an interrupted import goes on.
    What cannot be used is left out and named in ``refused.jsonl``. progress is told (done, of, file).
    Raises ``UserError`` when nothing can be used, splits are missing, or ``out`` is there already.
    """
    need_pyarrow()
    source, out = Path(source), Path(out)
    if out.exists():
        raise UserError(f"{out}: expected a new folder for the clip store, but it is there already")
    total, items = _items(source, out)
    here = out.with_name(f"{out.name}.importing")
    try:
        state = _begin(here, source, total, clips)
        resumed = state.clips
        _write(here, state, items, total, clips, progress)
        if not state.clips:
            first = "; ".join(f"{file}: {reason}" for file, reason in list(_refused(here).items())[:3])
            shutil.rmtree(here)
            raise UserError(f"{source}: expected motion with captions, but none of {total} can be used: {first}")
        report = ShardReport(
            out=out,
            splits=state.splits,
            seconds=state.frames / FPS,
            captions=state.captions,
            shards=len(state.shards),
            left_out=state.left_out,
            reasons=state.reasons,
            refused=_refused(here),
            resumed=resumed,
        )
        join_indices([here / PARTS / f"{number:06d}.parquet" for number in range(len(state.shards))], here / INDEX)
        about = {"format": FORMAT, "clips": state.clips, "frames": state.frames, "captions": state.captions}
        about |= {"splits": state.splits, "source": state.source, "shards": state.shards}
        with whole_file(here / ABOUT) as temporary:
            temporary.write_text(json.dumps(about) + "\n", encoding="utf-8")
        shutil.rmtree(here / PARTS)
        (here / PROGRESS).unlink()
        here.replace(out)
    except OSError as error:
        raise UserError(f"cannot write {here}: {error.strerror or error}; the import goes on from there") from error
    return report


def _begin(here: Path, source: Path, total: int, clips: int) -> _Progress:
    """The state of an earlier import of the same source, or a new one."""
    name = f"{source.resolve()}: {total} clips in shards of {clips}"
    path = here / PROGRESS
    if not path.exists():
        if here.exists() and any(one.name not in (SHARDS, PARTS, REFUSED) for one in here.iterdir()):
            raise UserError(f"{here}: expected a new folder or an interrupted import, but it holds other files")
        for folder in (SHARDS, PARTS):
            (here / folder).mkdir(parents=True, exist_ok=True)
        (here / REFUSED).write_bytes(b"")
        return _Progress(source=name)
    try:
        state = _Progress(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: expected the progress of an import, but {error}; delete {here}") from error
    if state.source != name:
        raise UserError(f"{here}: an interrupted import of {state.source!r} is there; finish that one, or delete it")
    os.truncate(here / REFUSED, state.refused_bytes)
    return state


def _write(
    here: Path,
    state: _Progress,
    items: Iterator[Item | tuple[str, str]],
    total: int,
    per_shard: int,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    writer: ShardWriter | None = None
    skip = state.consumed
    with (here / REFUSED).open("ab") as refused:

        def close() -> None:
            nonlocal writer
            if writer is not None:
                name = f"{writer.number:06d}"
                size = writer.close()
                write_index(here / PARTS / f"{name}.parquet", writer.rows)
                state.shards.append({"name": f"{name}.tar", "bytes": size, "clips": len(writer.rows)})
                writer = None
            refused.flush()
            state.refused_bytes = refused.tell()
            with whole_file(here / PROGRESS) as temporary:
                temporary.write_text(json.dumps({name: getattr(state, name) for name in _Progress.__slots__}))

        for number, item in enumerate(items):
            if number < skip:
                continue
            state.consumed = number + 1
            file = item.file if isinstance(item, Item) else item[0]
            if progress is not None:
                progress(number, total, file)
            try:
                if not isinstance(item, Item):
                    raise UserError(item[1])
                captions = list(dict.fromkeys(map(check_prompt, item.captions())))
                features = item.load()
            except UserError as error:
                reason = " ".join(str(error).split())
                refused.write((json.dumps({"file": file, "reason": reason}, ensure_ascii=False) + "\n").encode())
                state.left_out += 1
                kind = reason.partition(",")[0][:80] if len(state.reasons) < SHOWN else "other reasons"
                state.reasons[kind] = state.reasons.get(kind, 0) + 1
                continue
            if writer is None:
                shard = len(state.shards)
                writer = ShardWriter(here / SHARDS / f"{shard:06d}.tar", shard)
            said = {"id": item.id, "split": item.split, "label": item.label, "captions": captions, "flips": item.flips}
            writer.add(state.clips, features, said)
            state.clips += 1
            state.frames += len(features)
            state.captions += len(captions)
            state.splits[item.split] = state.splits.get(item.split, 0) + 1
            if len(writer.rows) == per_shard:
                close()
        close()


def _refused(here: Path) -> dict[str, str]:
    with (here / REFUSED).open(encoding="utf-8") as lines:
        first = [json.loads(line) for _, line in zip(range(SHOWN), lines, strict=False)]
    return {one["file"]: one["reason"] for one in first}


def _items(source: Path, out: Path) -> tuple[int, Iterator[Item | tuple[str, str]]]:
    """How many there are, and each in an order that stays; (file, reason) where one is refused from the start."""
    if not source.is_dir():
        raise UserError(f"{source}: expected a folder of motion and captions, but there is none")
    if all((source / name).is_dir() for name in MOTIONMILLION[:2]):
        return _motionmillion(source)
    if any(source.glob("clips_*.jsonl")):
        clips = read_clips(source)
        return len(clips), (
            Item(
                file=clip.id,
                id=clip.id,
                split=clip.split,
                captions=lambda clip=clip: list(clip.captions),  # type: ignore[misc]
                load=lambda clip=clip: clip.features,  # type: ignore[misc]
                label=clip.label,
                flips=clip.heading_flips,
            )
            for clip in clips
        )
    found = find_sources(source, without=out)

    def files() -> Iterator[Item | tuple[str, str]]:
        for one in found.sources:
            rank = int.from_bytes(hashlib.sha256(one.id.encode()).digest()[:8]) / 2**64
            yield Item(
                file=one.path.relative_to(source).as_posix(),
                id=one.id,
                split=one.split or ("val" if rank < VALIDATION else "train"),
                captions=lambda one=one: list(one.captions),  # type: ignore[misc]
                load=lambda one=one: _features_of_file(one.path),  # type: ignore[misc]
                label=one.label,
            )
        yield from found.refused.items()

    return len(found.sources) + len(found.refused), files()


def _features_of_file(path: Path) -> NDArray[np.float32]:
    recording, _ = read_recording(path)
    keep = between_t_poses(recording.vectors)
    vectors, root = (one[keep] for one in recording.on_canonical_skeleton())
    return from_motion(matrices(vectors), root, np.array(CANONICAL_OFFSETS)).astype(np.float32)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            yield from (line.strip() for line in lines if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a list of clips in UTF-8, one a line, but {error}") from error


def _motionmillion(source: Path) -> tuple[int, Iterator[Item | tuple[str, str]]]:
    """The clips of the split lists, which are read as they are needed; of each only 8 bytes of a hash are kept."""
    motions, texts, lists = (source / name for name in MOTIONMILLION)
    given = [(split, lists / f"{split}.txt") for split in SPLITS if (lists / f"{split}.txt").is_file()]
    missing = [split for split in ("train", "val") if split not in dict(given)]
    if missing:
        raise UserError(f"{lists}: expected train.txt and val.txt, one clip a line; missing: {', '.join(missing)}.txt")
    hashes = array("Q", (_hash(name) for _, path in given for name in _lines(path)))
    if not hashes:
        raise UserError(f"{lists}: expected clips in train.txt and val.txt, but they are empty")
    values, counts = np.unique(np.asarray(hashes), return_counts=True)
    twice = set(values[counts > 1].tolist())

    def clips() -> Iterator[Item | tuple[str, str]]:
        seen: set[str] = set()
        for split, path in given:
            for name in _lines(path):
                file = f"{MOTIONMILLION[0]}/{name}.npy"
                parts = Path(name).parts
                if name.startswith("/") or ".." in parts or not name.isprintable():
                    yield ascii(name), f"expected the name of a clip in {path.name}"
                    continue
                if _hash(name) in twice:
                    if name in seen:
                        yield file, f"it is in the lists twice, again in {path.name}"
                        continue
                    seen.add(name)
                yield Item(
                    file=file,
                    id=name,
                    split=split,
                    captions=lambda name=name: _captions(texts / f"{name}.txt"),  # type: ignore[misc]
                    load=lambda name=name: _features(motions / f"{name}.npy"),  # type: ignore[misc]
                    label=name.rpartition("/")[0],
                )

    return len(hashes), clips()


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _captions(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"no captions: expected texts/{path.name}, one sentence a line")
    return read_prompts(path)


def _features(path: Path) -> NDArray[np.float32]:
    """The features of a ``.npy``; mapped, so that a header which promises more than there is costs nothing."""
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        shape, kind = mapped.shape, mapped.dtype.kind
        if kind != "f" or len(shape) != 2 or shape[1] != FEATURES:
            raise UserError(f"expected features [T, {FEATURES}], got {mapped.dtype} {list(shape)}")
        if shape[0] < MIN_FRAMES:
            raise UserError(f"expected at least {MIN_FRAMES} frames, got {shape[0]}")
        features = np.array(mapped, dtype=np.float32)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError("it is in a list, but there is no such file") from error
    except (*DAMAGED, AttributeError) as error:
        raise UserError(f"cannot be read, {' '.join(str(error).split())[:80]}") from error
    if not np.abs(features).max() <= FAR:  # false for NaN as well
        raise UserError(f"expected finite numbers up to {FAR:g}, got {features.flat[np.abs(features).argmax()]:g}")
    return features


def summary(report: ShardReport) -> dict[str, Any]:
    """The report as plain values."""
    values = {name: getattr(report, name) for name in ShardReport.__slots__}
    return {**values, "out": str(report.out), "clips": Counter(report.splits).total()}
