"""What a decoder trains on, cached beside a clip store: each clip's tokens, and the features of each different caption.

tokens-<tokenizer>/     about.json, tokens.bin: int32, clip after clip, of each frames // frames_per_token
text/                   about.json, features.bin: fp16 [rows, dim], lengths.bin: int32, rows of each different caption,
                        captions.npy: int32, for every caption of every clip the number of the different one
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinetok.errors import UserError
from kinetok.files import whole_directory, whole_file
from kinetok.model.text import TextEncoder, text_encoder
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.train.data.shards import ClipStore, need_pyarrow

TOKENS_FORMAT, TEXT_FORMAT = "kinetok-tokens-1", "kinetok-text-1"
ABOUT, TEXT, CAPTIONS = "about.json", "text", "captions.npy"
TEXT_FILES = ("features.bin", "lengths.bin")
BATCH_FRAMES = 20_000  # frames of one pass of the tokenizer
Progress = Callable[[int, int, str], None]


def tokens_name(tokenizer: str | Path) -> str:
    """The folder of a trained tokenizer's tokens, named by its bytes."""
    try:
        return f"tokens-{hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest()[:12]}"
    except OSError as error:
        raise UserError(f"{tokenizer}: expected a trained tokenizer, but {error.strerror or error}") from error


def _about(path: Path, form: str, redo: str) -> dict[str, Any]:
    try:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        if about["format"] != form:
            raise UserError(f"{path}: expected {form}, got {str(about['format'])[:60]!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not there: make it with {redo}") from error
    return about


@torch.no_grad()
def write_tokens(
    store: ClipStore,
    path: str | Path,
    tokenizer: MotionTokenizer,
    mean: Tensor,
    std: Tensor,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """Tokens of every clip with the trained tokenizer of ``path``, whole clips cut to a multiple of its unit (section 6).

    Clips of one length go through it together: a clip's tokens are those it has alone. Returns the folder, which is left
    as it is where it is there already.
    """
    out = store.folder / tokens_name(path)
    if (out / ABOUT).exists():
        return out
    unit = tokenizer.config.frames_per_token
    counts = store.frames // unit
    if int(counts.min()) < 1:
        raise UserError(f"{store.folder}: expected clips of at least {unit} frames, got {int(store.frames.min())}")
    offsets = np.concatenate(([0], np.cumsum(counts)))
    tokenizer = tokenizer.to(device).eval()
    mean, std = mean.to(device), std.to(device)
    done = 0
    with whole_directory(out, lambda _: False, "no folder") as folder:
        tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="w+", shape=(int(offsets[-1]),))
        order = np.argsort(counts, kind="stable")
        for count, start in zip(*np.unique(counts[order], return_index=True), strict=True):
            group = order[start : start + int((counts == count).sum())]
            for clips in np.array_split(group, max(1, len(group) * int(count) * unit // BATCH_FRAMES)):
                frames = np.stack([store.read(int(clip))[: int(count) * unit] for clip in clips])
                normal = (torch.from_numpy(frames).to(device).double() - mean) / std
                found = tokenizer.encode(normal.float()).cpu().numpy()
                for clip, row in zip(clips, found, strict=True):
                    tokens[offsets[clip] : offsets[clip + 1]] = row
                done += len(clips)
                if progress is not None:
                    progress(done, len(store), "tokens")
        tokens.flush()
        about = {"format": TOKENS_FORMAT, "clips": len(store), "tokens": int(offsets[-1]), "frames_per_token": unit}
        (folder / ABOUT).write_text(json.dumps({**about, "codebook": tokenizer.config.codebook}), encoding="utf-8")
    return out


def _different(store: ClipStore) -> tuple[Any, NDArray[np.int32]]:
    """The different captions, and for every caption of every clip its number among them."""
    arrow = need_pyarrow()
    coded = arrow.chunked_array([chunk.flatten() for chunk in store.index.column("captions").chunks])
    coded = coded.combine_chunks().dictionary_encode()
    if isinstance(coded, arrow.ChunkedArray):
        coded = coded.combine_chunks()
    return coded.dictionary, coded.indices.to_numpy().astype(np.int32)


def write_text(store: ClipStore, spec: Mapping[str, Any], *, progress: Progress | None = None) -> Path:
    """Features of every different caption by the encoder that ``spec`` names (``model/text.py``), each encoded once.

    Goes on where it was interrupted. Raises ``UserError`` where features of another encoder are there.
    """
    out, here = store.folder / TEXT, store.folder / f"{TEXT}.writing"
    if (out / ABOUT).exists():
        there = _about(out, TEXT_FORMAT, "kinetok data text")["encoder"]
        if there != dict(spec):
            raise UserError(
                f"{out}: the features of {there} are there, expected {dict(spec)}; delete that folder first"
            )
        return out
    texts, numbers = _different(store)
    encoder: TextEncoder = text_encoder(spec)
    here.mkdir(exist_ok=True)
    note = here / "encoder.json"
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != dict(spec):
        raise UserError(f"{here}: features of another encoder were being written there; delete that folder first")
    note.write_text(json.dumps(dict(spec)), encoding="utf-8")
    try:
        lengths = _resume(here, encoder.dim)
        with (here / TEXT_FILES[0]).open("ab") as rows, (here / TEXT_FILES[1]).open("ab") as sizes:
            for number in range(len(lengths), len(texts)):
                features = encoder.encode([texts[number].as_py()])[0].half().cpu().numpy()
                rows.write(features.tobytes())
                sizes.write(np.int32(len(features)).tobytes())
                if progress is not None:
                    progress(number + 1, len(texts), "captions")
        np.save(here / CAPTIONS, numbers)
        about = {"format": TEXT_FORMAT, "captions": len(texts), "dim": encoder.dim, "encoder": dict(spec)}
        with whole_file(here / ABOUT) as temporary:
            temporary.write_text(json.dumps(about), encoding="utf-8")
        note.unlink()
        here.replace(out)
    except OSError as error:
        raise UserError(f"cannot write {here}: {error.strerror or error}") from error
    return out


def _resume(here: Path, dim: int) -> NDArray[np.int32]:
    """The lengths that an interrupted run left with their rows; both files are cut to them."""
    rows, sizes = (here / name for name in TEXT_FILES)
    if not rows.exists() or not sizes.exists():
        for path in (rows, sizes):
            path.write_bytes(b"")
        return np.zeros(0, np.int32)
    lengths = np.fromfile(sizes, np.int32, count=sizes.stat().st_size // 4)
    ends = np.cumsum(lengths, dtype=np.int64) * dim * 2
    lengths = lengths[: int((ends <= rows.stat().st_size).sum())]
    os.truncate(sizes, 4 * len(lengths))
    os.truncate(rows, int(lengths.sum(dtype=np.int64)) * dim * 2)
    return lengths


class Sequences:
    """The clips of a store as tokens with text features; both stay on the disk and are mapped.

    ``lengths`` int64 ``[clips]`` in tokens, ``splits`` ``[clips]``, ``text_lengths`` int64 of each different caption.
    Raises ``UserError`` where tokens or features are missing or do not belong to the store.
    """

    def __init__(self, folder: str | Path, *, tokenizer: str | Path) -> None:
        self.store = ClipStore(folder)
        self.folder = self.store.folder
        tokens = self.folder / tokens_name(tokenizer)
        about = _about(tokens, TOKENS_FORMAT, f"kinetok data tokens {folder} --tokenizer {tokenizer}")
        text = _about(self.folder / TEXT, TEXT_FORMAT, f"kinetok data text {folder}")
        self.text_dim, self.text_encoder = int(text["dim"]), dict(text["encoder"])
        self.identity = [tokens.name, about["clips"], text["captions"]]
        self.splits = self.store.splits
        self.lengths = self.store.frames // int(about["frames_per_token"])
        self._offsets = np.concatenate(([0], np.cumsum(self.lengths)))
        self.text_lengths = np.fromfile(self.folder / TEXT / TEXT_FILES[1], np.int32).astype(np.int64)
        self._rows = np.concatenate(([0], np.cumsum(self.text_lengths)))
        self._numbers = np.load(self.folder / TEXT / CAPTIONS, allow_pickle=False)
        captions = self.store.index.column("captions")
        counts = need_pyarrow().compute.list_value_length(captions).to_numpy().astype(np.int64)
        self._counts, self._starts = counts, np.cumsum(counts) - counts
        for path, size in (
            (tokens / "tokens.bin", 4 * int(self._offsets[-1])),
            (self.folder / TEXT / TEXT_FILES[0], 2 * self.text_dim * int(self._rows[-1])),
        ):
            if not path.exists() or path.stat().st_size != size or about["clips"] != len(self.store):
                raise UserError(
                    f"{path}: expected {size} bytes for the clips of this store; delete its folder, make it anew"
                )
        if len(self._numbers) != counts.sum() or len(self.text_lengths) != text["captions"]:
            raise UserError(
                f"{self.folder / TEXT}: does not belong to the clips of this store; delete it, make it anew"
            )
        self._tokens = np.memmap(tokens / "tokens.bin", np.int32, "r")
        self._text = np.memmap(self.folder / TEXT / TEXT_FILES[0], np.float16, "r").reshape(-1, self.text_dim)

    def tokens(self, clip: int) -> Tensor:
        """int64 ``[lengths[clip]]``."""
        return torch.from_numpy(self._tokens[self._offsets[clip] : self._offsets[clip + 1]].astype(np.int64))

    def caption(self, clips: NDArray[np.int64], chance: NDArray[np.float64]) -> NDArray[np.int64]:
        """For clips and numbers in [0, 1): which of the different captions stands at that place of each clip's own."""
        return self._numbers[self._starts[clips] + (chance * self._counts[clips]).astype(np.int64)].astype(np.int64)

    def text(self, caption: int) -> Tensor:
        """Features fp32 ``[L, text_dim]`` of one of the different captions."""
        return torch.from_numpy(self._text[self._rows[caption] : self._rows[caption + 1]].astype(np.float32))

    def caption_text(self, caption: int) -> str:
        at = int(np.flatnonzero(self._numbers == caption)[0])
        clip = int(np.searchsorted(self._starts, at, side="right")) - 1
        return self.store.captions(clip)[at - int(self._starts[clip])]


def mean_lengths(folder: str | Path, most_text: int, least: int, most: int) -> tuple[float, float] | None:
    """Mean text features and tokens of a draw from a store's training clips of ``least`` to ``most`` tokens.

    None where the store has no text features yet; tokens are counted at 15 a second.
    """
    store = ClipStore(folder)
    lengths = store.frames // 2
    clips = np.flatnonzero((store.splits == "train") & (lengths >= least) & (lengths <= most))
    if not (store.folder / TEXT / ABOUT).exists() or not len(clips):
        return None
    sizes = np.fromfile(store.folder / TEXT / TEXT_FILES[1], np.int32)
    numbers = np.load(store.folder / TEXT / CAPTIONS, allow_pickle=False)
    return float(np.minimum(sizes[numbers], most_text).mean()), float(lengths[clips].mean())
