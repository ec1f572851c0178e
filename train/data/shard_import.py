"""Somebody's motion as a clip store: clip after clip, resumable, in memory that does not grow with the data.

Until the store is whole there is beside it

    OUT.importing/progress.json     how far it is: all that is named there is on the disk
    OUT.importing/index/            the index of each whole shard
    OUT.importing/store/            the store so far
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinetok.errors import UserError
from kinetok.files import alone, whole_file
from kinetok.model.text import check_prompt
from kinetok.motion.skeleton import FPS
from kinetok.train.data.arrays import check_features
from kinetok.train.data.items import Item, Listing, list_items
from kinetok.train.data.registry import Registry
from kinetok.train.data.shards import (
    ABOUT,
    FORMAT,
    INDEX,
    REFUSED,
    SHARDS,
    ShardWriter,
    file_digest,
    join_indices,
    need_pyarrow,
    shard_name,
    write_index,
)
from kinetok.train.data.store import MIN_FRAMES

CLIPS = 1000  # of a shard
PARTS, PROGRESS, STORE, NAMES = "index", "progress.json", "store", "names.sqlite"
SHOWN = 20  # refused files that a report names, and different reasons; all are in refused.jsonl


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
    digest: str
    consumed: int = 0
    clips: int = 0
    frames: int = 0
    captions: int = 0
    refused_bytes: int = 0
    left_out: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    shards: list[dict[str, Any]] = field(default_factory=list)

    def save(self, here: Path) -> None:
        with whole_file(here / PROGRESS) as temporary:
            temporary.write_text(json.dumps({name: getattr(self, name) for name in _Progress.__slots__}))


def import_shards(
    source: str | Path,
    out: str | Path,
    *,
    clips: int = CLIPS,
    progress: Callable[[int, int, str], None] | None = None,
) -> ShardReport:
    """Import a folder into the clip store ``out``, ``clips`` of them a shard.

    The folder: MotionMillion's layout (section 6), a motion set (``data/cmu``, or an import), or motion files with captions.
    ``out`` appears when all is written; until then it is ``out.importing``, with which an interrupted import goes on, to the
    same bytes. What cannot be used is left out and named in ``refused.jsonl``. progress is told (done, of, file).
    Raises ``UserError`` when nothing can be used, splits are missing, ``out`` is there already, another import writes it, or
    the disk is full.
    """
    need_pyarrow()
    source, out = Path(source), Path(out)
    here = out.parent / f"{out.name}.importing"
    if out.exists():
        if here.exists() and not (here / STORE).exists():  # killed when all was done but for this
            shutil.rmtree(here, ignore_errors=True)
        raise UserError(f"{out}: expected a new folder for the clip store, but it is there already")
    listing = list_items(source, without=out)
    try:
        if here.exists() and not (here / PROGRESS).exists() and any(one.name[0] != "." for one in here.iterdir()):
            raise UserError(f"{here}: expected a new folder or an interrupted import, but it holds other files")
        here.mkdir(parents=True, exist_ok=True)
        with alone(here, "importing there; wait for it"):
            state = _begin(here, f"{source.resolve()}, {clips} clips a shard", listing)
            return _import(source, here, out, state, listing, clips, progress)
    except OSError as error:
        raise UserError(f"cannot write {here}: {error.strerror or error}; the import goes on from there") from error


def _begin(here: Path, source: str, listing: Listing) -> _Progress:
    """The state of an earlier import of the same source, or a new one; what that state does not name is removed."""
    path = here / PROGRESS
    state = _Progress(source=source, digest=listing.digest)
    if path.exists():
        try:
            state = _Progress(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: expected the progress of an import, but {error}; delete {here}") from error
        if state.source != source:
            raise UserError(
                f"{here}: an interrupted import of {state.source!r} is there; finish that one, or delete it"
            )
        if state.digest != listing.digest:
            raise UserError(f"{here}: the data has changed since the import was interrupted; delete that folder")
        for number, one in enumerate(state.shards):
            shard, part = here / STORE / SHARDS / shard_name(number), here / PARTS / f"{number:06d}.parquet"
            if not part.is_file() or not shard.is_file() or shard.stat().st_size != one["bytes"]:
                raise UserError(f"{here}: {shard.name} is not as it was written there; delete that folder")
    else:
        state.save(here)
    for folder in (here / STORE / SHARDS, here / PARTS):
        folder.mkdir(parents=True, exist_ok=True)
    numbers = range(len(state.shards))
    for folder, known in (
        (here / STORE, {SHARDS, REFUSED}),
        (here / STORE / SHARDS, {shard_name(number) for number in numbers}),
        (here / PARTS, {f"{number:06d}.parquet" for number in numbers}),
    ):
        for path in folder.iterdir():
            if path.name not in known:
                path.unlink()
    with (here / STORE / REFUSED).open("ab") as file:
        file.truncate(state.refused_bytes)
    return state


def _import(
    source: Path,
    here: Path,
    out: Path,
    state: _Progress,
    listing: Listing,
    clips: int,
    progress: Callable[[int, int, str], None] | None,
) -> ShardReport:
    resumed, store = state.clips, here / STORE
    _write(here, state, listing, clips, progress)
    if not state.clips:
        first = "; ".join(f"{file}: {reason}" for file, reason in list(_refused(store).items())[:3])
        shutil.rmtree(here)
        raise UserError(f"{source}: expected motion with captions, but none of {listing.total} can be used: {first}")
    join_indices([here / PARTS / f"{number:06d}.parquet" for number in range(len(state.shards))], store / INDEX)
    about = {"format": FORMAT, "clips": state.clips, "frames": state.frames, "captions": state.captions}
    about |= {"splits": state.splits, "source": state.source, "index": file_digest(store / INDEX)}
    with whole_file(store / ABOUT) as temporary:
        temporary.write_text(json.dumps({**about, "shards": state.shards}) + "\n", encoding="utf-8")
    store.replace(out)
    shutil.rmtree(here)
    return ShardReport(
        out=out,
        splits=state.splits,
        seconds=state.frames / FPS,
        captions=state.captions,
        shards=len(state.shards),
        left_out=state.left_out,
        reasons=state.reasons,
        refused=_refused(out),
        resumed=resumed,
    )


def _write(
    here: Path,
    state: _Progress,
    listing: Listing,
    per_shard: int,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    writer: ShardWriter | None = None
    skip = state.consumed
    with (here / STORE / REFUSED).open("ab") as refused, Registry(here / NAMES) as names:

        def close() -> None:
            nonlocal writer
            if writer is not None:
                size = writer.close()
                write_index(here / PARTS / f"{writer.number:06d}.parquet", writer.rows)
                name = shard_name(writer.number)
                state.shards.append({"name": name, "bytes": size, "clips": len(writer.rows)})
                writer = None
            refused.flush()
            state.refused_bytes = refused.tell()
            state.save(here)

        for number, item in enumerate(listing.items(names)):
            if number < skip:
                continue
            state.consumed = number + 1
            if progress is not None:
                progress(number, listing.total, item.file)
            try:
                if not isinstance(item, Item):
                    raise UserError(item.reason)
                if not f"{item.id}{item.label}".isprintable():
                    raise UserError("expected an id and a label of printable characters")
                captions, features = item.load()
                captions = list(dict.fromkeys(map(check_prompt, captions)))
                features = check_features(features, MIN_FRAMES)
            except UserError as error:
                reason = " ".join(str(error).split())
                refused.write((json.dumps({"file": item.file, "reason": reason}) + "\n").encode())
                state.left_out += 1
                kind = reason.partition(",")[0][:80]
                kind = kind if kind in state.reasons or len(state.reasons) < SHOWN else "other reasons"
                state.reasons[kind] = state.reasons.get(kind, 0) + 1
                continue
            if writer is None:
                writer = ShardWriter(here / STORE / SHARDS, len(state.shards))
            said = {"id": item.id, "split": item.split, "label": item.label, "captions": captions, "flips": item.flips}
            writer.add(state.clips, features, said)
            state.clips += 1
            state.frames += len(features)
            state.captions += len(captions)
            state.splits[item.split] = state.splits.get(item.split, 0) + 1
            if len(writer.rows) == per_shard:
                close()
        close()


def _refused(store: Path) -> dict[str, str]:
    with (store / REFUSED).open(encoding="utf-8") as lines:
        first = [json.loads(line) for _, line in zip(range(SHOWN), lines, strict=False)]
    return {one["file"]: one["reason"] for one in first}


def summary(report: ShardReport) -> dict[str, Any]:
    """The report as plain values."""
    values = {name: getattr(report, name) for name in ShardReport.__slots__}
    return {**values, "out": str(report.out), "clips": Counter(report.splits).total()}
