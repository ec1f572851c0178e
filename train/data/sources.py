"""Where a folder of somebody's motion files keeps captions and splits (``docs/fine-tuning.md``)."""

import csv
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kinetok.errors import UserError
from kinetok.model.text import check_prompt, parse_prompts, read_prompts
from kinetok.motion.io import READS
from kinetok.train.data.arrays import plain_bytes
from kinetok.train.data.store import SPLITS

TABLE = "captions.csv"
MOST_TEXT = 1_000_000  # bytes of the captions of one clip
MOTIONMILLION = ("motion_data/vector_272", "texts", "split/version1/t2m_60_300")  # section 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A motion file with what is said of it; ``id`` is its path below the folder without the suffix, ``split`` may be
    undecided."""

    id: str
    path: Path
    captions: tuple[str, ...]
    split: str | None = None
    label: str = ""
    subject: str = ""


@dataclass(slots=True)
class Found:
    """What a folder holds: ``sources`` to read, and ``refused`` files (paths below the folder) with the reason."""

    sources: list[Source] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def refuse(self, file: str, reason: object) -> None:
        self.refused.setdefault(file, str(reason))


def find_sources(folder: Path, *, without: Path) -> Found:
    """The motion files of a folder with their captions, in the order of their ids; files below ``without`` do not count.

    Raises ``UserError`` when there is no such folder, it is a motion set, or its captions or splits cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder of motion files and captions, but there is none")
    if any(folder.glob("clips_*.jsonl")):
        raise UserError(
            f"{folder}: expected motion files and captions, but it is a motion set already; train on it with --data, or "
            "make a clip store of it with kinetok data import --shards"
        )
    released = all((folder / name).is_dir() for name in MOTIONMILLION[:2])
    motions, texts = (folder / name if released else folder for name in MOTIONMILLION[:2])
    found = Found()
    files = _motion_files(motions, folder, without, found)
    table = folder / TABLE
    if table.is_file():
        _from_table(table, files, folder, found)
    else:
        _from_texts(texts, files, _splits(folder, found), folder, found)
    return found


def _walk(root: Path, without: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Paths below ``root`` with one of the suffixes, each after its id; hidden files and folders are left alone."""

    def unreadable(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror or error}") from error

    for here, folders, names in os.walk(root, onerror=unreadable):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and Path(here, name).resolve() != without.resolve()
        )
        for name in sorted(names):
            path = Path(here, name)
            if path.suffix.lower() in suffixes and not name.startswith("."):
                yield path.relative_to(root).with_suffix("").as_posix(), path


def _motion_files(root: Path, folder: Path, without: Path, found: Found) -> dict[str, Path]:
    files: dict[str, Path] = {}
    every = sorted(_walk(root, without, READS), key=lambda one: (one[0], READS.index(one[1].suffix.lower())))
    for name, path in every:
        file = path.relative_to(folder).as_posix()
        if not file.isprintable():
            found.refuse(ascii(file), "expected a file name of printable characters")
        elif not path.is_file():
            found.refuse(file, "expected a plain file")
        elif name in files:
            found.refuse(file, f"{files[name].name} is there too and has the same name")
        else:
            files[name] = path
    if not every:
        raise UserError(f"{root}: expected motion files ({', '.join(READS)}) with captions, found none")
    return files


def _splits(folder: Path, found: Found) -> Mapping[str, str] | None:
    """The split of each id in the lists ``train.txt``, ``val.txt`` and ``test.txt``; None where there are no lists."""
    places = [folder / name for name in (MOTIONMILLION[2], "split")]
    place = next((place for place in places if any((place / f"{split}.txt").is_file() for split in SPLITS)), None)
    if place is None:
        return None
    chosen: dict[str, str] = {}
    for split in SPLITS:
        for name in read_prompts(place / f"{split}.txt") if (place / f"{split}.txt").is_file() else ():
            if chosen.setdefault(name, split) != split:
                raise UserError(f"{place}: {name!r} is in {chosen[name]}.txt and in {split}.txt")
    return chosen


def _from_texts(
    texts: Path, files: Mapping[str, Path], splits: Mapping[str, str] | None, folder: Path, found: Found
) -> None:
    captions = dict(_walk(texts, folder / "split", (".txt",)))
    for name, path in files.items():
        file = path.relative_to(folder).as_posix()
        if name not in captions:
            wanted = (texts / f"{name}.txt").relative_to(folder).as_posix()
            found.refuse(file, f"no captions: expected {wanted}, one sentence a line")
        elif splits is not None and name not in splits:
            found.refuse(file, "in none of the lists in split")
        else:
            try:
                said = captions[name].relative_to(folder).as_posix()
                sentences = tuple(dict.fromkeys(parse_prompts(plain_bytes(captions[name], MOST_TEXT), said)))
            except UserError as error:
                found.refuse(file, error)
                continue
            split = None if splits is None else splits[name]
            found.sources.append(Source(id=name, path=path, captions=sentences, split=split, label=_folder(name)))
    for name, path in captions.items():
        if name not in files:
            found.refuse(path.relative_to(folder).as_posix(), "captions without a motion file of the same name")


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _from_table(table: Path, files: Mapping[str, Path], folder: Path, found: Found) -> None:
    at = {path.relative_to(folder).as_posix(): name for name, path in files.items()}
    rows: dict[str, list[dict[str, str]]] = {}
    for line, row in _rows(table):
        file = row["file"].replace("\\", "/").removeprefix("./")
        if file not in at:
            found.refuse(f"{TABLE}, line {line}", f"no motion file {file!r} in the folder")
            continue
        try:
            row["caption"] = check_prompt(row["caption"])
        except UserError as error:
            found.refuse(file, f"{TABLE}, line {line}: {error}")
        if row["split"] not in ("", *SPLITS):
            wanted = f"expected split to be one of {', '.join(SPLITS)}"
            found.refuse(file, f"{TABLE}, line {line}: {wanted}, got {row['split'][:60]!r}")
        rows.setdefault(file, []).append(row)
    for file, name in at.items():
        if file not in rows:
            found.refuse(file, f"no captions: no row of {TABLE} names it")
        if file in found.refused:
            continue
        said = {column: {row[column] for row in rows[file]} - {""} for column in ("split", "label", "subject")}
        several = [column for column, values in said.items() if len(values) > 1]
        if several:
            found.refuse(file, f"{TABLE}: its rows differ in {several[0]}: {', '.join(sorted(said[several[0]]))}")
            continue
        split, label, subject = (next(iter(values), "") for values in said.values())
        found.sources.append(
            Source(
                id=name,
                path=files[name],
                captions=tuple(dict.fromkeys(row["caption"] for row in rows[file])),
                split=split or None,
                label=label or _folder(name),
                subject=subject,
            )
        )


def _rows(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and rows with the columns file, caption, split, label and subject, stripped; "" where absent."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            if not {"file", "caption"} <= set(reader.fieldnames or ()):
                got = ", ".join(map(repr, reader.fieldnames or ()))[:120]
                raise UserError(f"{table}: expected the columns file and caption, separated by commas, got {got}")
            for row in reader:
                named = {name: row.get(name) or "" for name in ("file", "caption", "split", "label", "subject")}
                yield reader.line_num, {name: value.strip() for name, value in named.items()}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table}: expected a UTF-8 table with the columns file and caption, but {error}") from error
