"""What a decoder trains on, cached beside a clip store: each clip's tokens, and the features of each different caption.

tokens-<tokenizer>/     about.json, tokens.bin: int32, clip after clip, of each frames // frames_per_token
text/                   about.json, features.bin: fp16 [rows, dim], lengths.bin: int32, rows of each different caption,
                        captions.bin: int32, for every caption of every clip the number of the different one,
                        counts.bin: int32, captions of each clip

While one is written it is called ``NAME.writing``; what was interrupted there goes on, to the same bytes.
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
from kinetok.files import alone, whole_file
from kinetok.model.text import TextEncoder, text_encoder
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.train.data.registry import Registry
from kinetok.train.data.shards import ClipStore

TOKENS_FORMAT, TEXT_FORMAT = "kinetok-tokens-2", "kinetok-text-2"
ABOUT, PROGRESS, TOKENS, TEXT = "about.json", "progress.json", "tokens.bin", "text"
FEATURES, LENGTHS, CAPTIONS, COUNTS = "features.bin", "lengths.bin", "captions.bin", "counts.bin"
FIELDS: Mapping[str, Mapping[str, type]] = {
    TOKENS_FORMAT: {"store": str, "clips": int, "frames_per_token": int, "codebook": int},
    TEXT_FORMAT: {"store": str, "captions": int, "dim": int, "encoder": dict},
}
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
            raise ValueError(f"it is {str(about['format'])[:60]!r}")
        for name, kind in FIELDS[form].items():
            if type(about[name]) is not kind or (kind is int and about[name] < 1):
                raise ValueError(f"its {name} is {str(about[name])[:60]!r}")
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: make it with {redo}") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        detail = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: expected {form}, but {detail}; delete it, make it anew with {redo}") from error
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

    Clips of one length go through it together: a clip's tokens are those it has alone. Goes on where it was interrupted.
    Returns the folder, which is left as it is where it is there already. Raises ``UserError`` where the disk is full.
    """
    out = store.folder / tokens_name(path)
    unit = tokenizer.config.frames_per_token
    about = {"format": TOKENS_FORMAT, "store": store.digest, "clips": len(store), "frames_per_token": unit}
    about |= {"codebook": tokenizer.config.codebook}
    if (out / ABOUT).exists():
        _same_store(out, _about(out, TOKENS_FORMAT, "kinetok data tokens"), store)
        return out
    counts = store.frames // unit
    if int(counts.min()) < 1:
        raise UserError(f"{store.folder}: expected clips of at least {unit} frames, got {int(store.frames.min())}")
    offsets = np.concatenate(([0], np.cumsum(counts)))
    tokenizer = tokenizer.to(device).eval()
    mean, std = mean.to(device), std.to(device)
    here = _writing(out)
    try:
        with alone(here, "writing tokens there; wait for it"):
            # Another batch or device could round differently, and the bytes would depend on where it was interrupted.
            state = _state(here, {**about, "batch_frames": BATCH_FRAMES, "device": torch.device(device).type})
            passes = _passes(counts, unit)
            done = sum(map(len, passes[: state["passes"]]))
            with (here / TOKENS).open("r+b" if state["passes"] else "wb") as file:
                for number in range(state["passes"], len(passes)):
                    clips = passes[number]
                    frames = np.stack([store.read(int(clip))[: int(counts[clips[0]]) * unit] for clip in clips])
                    normal = (torch.from_numpy(frames).to(device).double() - mean) / std
                    found = tokenizer.encode(normal.float()).cpu().numpy().astype(np.int32)
                    for clip, row in zip(clips, found, strict=True):
                        file.seek(4 * int(offsets[clip]))
                        file.write(row.tobytes())
                    file.flush()
                    _save(here / PROGRESS, {**state, "passes": number + 1})
                    done += len(clips)
                    if progress is not None:
                        progress(done, len(store), "tokens")
            _finish(here, out, {**about, "tokens": int(offsets[-1])})
    except OSError as error:
        raise UserError(f"cannot write {here}: {error.strerror or error}; it goes on from there") from error
    return out


def _passes(counts: NDArray[np.int64], unit: int) -> list[NDArray[np.int64]]:
    """The clips of every pass: of one length, at most about ``BATCH_FRAMES`` frames."""
    order = np.argsort(counts, kind="stable")
    lengths, starts = np.unique(counts[order], return_index=True)
    passes = []
    for length, group in zip(lengths, np.split(order, starts[1:]), strict=True):
        passes += np.array_split(group, max(1, len(group) * int(length) * unit // BATCH_FRAMES))
    return passes


def _writing(out: Path) -> Path:
    here = out.with_name(f"{out.name}.writing")
    try:
        here.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {here}: {error.strerror or error}") from error
    return here


def _state(here: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """How far an interrupted run of the same work is. ``UserError`` where it was another's."""
    path = here / PROGRESS
    if not path.exists():
        _save(path, {"about": about, "passes": 0})
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if state["about"] != json.loads(json.dumps(about)):
            names = [name for name in about if state["about"].get(name) != about[name]]
            raise UserError(
                f"{here}: something else was being written there (it differs in {', '.join(names)}); delete that folder"
            )
        state["passes"] = int(state["passes"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: expected the progress of an interrupted run, but {error}; delete {here}") from error
    return state


def _save(path: Path, value: Any) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")


def _finish(here: Path, out: Path, about: Mapping[str, Any]) -> None:
    """A folder that is whole takes its name; what only writing it needed goes."""
    _save(here / ABOUT, about)
    for one in here.iterdir():
        if one.name == PROGRESS or one.name.startswith("."):
            one.unlink()
    here.replace(out)


def write_text(
    store: ClipStore, spec: Mapping[str, Any], *, device: str = "cpu", progress: Progress | None = None
) -> Path:
    """Features of every different caption by the encoder that ``spec`` names (``model/text.py``), each encoded once.

    Goes on where it was interrupted; which captions are different is found out on the disk. Raises ``UserError`` where
    features of another encoder are there, and where the disk is full.
    """
    out = store.folder / TEXT
    about = {"format": TEXT_FORMAT, "store": store.digest, "encoder": dict(spec)}
    if (out / ABOUT).exists():
        there = _about(out, TEXT_FORMAT, "kinetok data text")
        _same_store(out, there, store)
        if there["encoder"] != dict(spec):
            raise UserError(
                f"{out}: the features of {there['encoder']} are there, expected {dict(spec)}; delete that folder first"
            )
        return out
    here = _writing(out)
    try:
        with alone(here, "writing text features there; wait for it"):
            _state(here, {**about, "device": device})
            with Registry(here / "captions.sqlite") as texts:
                with (here / CAPTIONS).open("wb") as numbers, (here / COUNTS).open("wb") as counts:
                    for captions in store.all_captions():
                        numbers.write(np.array([texts.number(one)[0] for one in captions], np.int32).tobytes())
                        counts.write(np.int32(len(captions)).tobytes())
                encoder: TextEncoder = text_encoder(spec, device)
                done = _resume(here, encoder.dim)
                with (here / FEATURES).open("ab") as rows, (here / LENGTHS).open("ab") as sizes:
                    for number, text in enumerate(texts.texts(done), start=done):
                        features = encoder.encode([text])[0].half().cpu().numpy()
                        if not np.isfinite(features).all():
                            raise UserError(f"the encoder's features of {text[:60]!r} are not finite in 16 bits")
                        rows.write(features.tobytes())
                        sizes.write(np.int32(len(features)).tobytes())
                        if progress is not None:
                            progress(number + 1, len(texts), "captions")
                different = len(texts)
            _finish(here, out, {**about, "captions": different, "dim": encoder.dim})
    except OSError as error:
        raise UserError(f"cannot write {here}: {error.strerror or error}; it goes on from there") from error
    return out


def _resume(here: Path, dim: int) -> int:
    """How many captions an interrupted run left whole; both files are cut to them."""
    rows, sizes = (here / name for name in (FEATURES, LENGTHS))
    for path in (rows, sizes):
        path.touch()
    lengths = np.fromfile(sizes, np.int32, count=sizes.stat().st_size // 4)
    ends = np.cumsum(lengths, dtype=np.int64) * dim * 2
    lengths = lengths[: int((ends <= rows.stat().st_size).sum())]
    os.truncate(sizes, 4 * len(lengths))
    os.truncate(rows, int(lengths.sum(dtype=np.int64)) * dim * 2)
    return len(lengths)


def _same_store(folder: Path, about: Mapping[str, Any], store: ClipStore) -> None:
    if about.get("store") != store.digest:
        raise UserError(f"{folder}: does not belong to the clips of this store; delete it, make it anew")


def _captions(store: ClipStore) -> tuple[dict[str, Any], NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """What is said of a store's text features; captions of each clip, the length of each different one, and which it is
    of the captions of clip after clip. ``UserError`` where they are missing or those of other clips."""
    folder = store.folder / TEXT
    about = _about(folder, TEXT_FORMAT, f"kinetok data text {store.folder}")
    _same_store(folder, about, store)
    counts = _mapped(folder / COUNTS, np.int32, len(store)).astype(np.int64)
    lengths = _mapped(folder / LENGTHS, np.int32, int(about["captions"])).astype(np.int64)
    numbers = _mapped(folder / CAPTIONS, np.int32, int(counts.sum()))
    if not 0 <= numbers.min() <= numbers.max() < len(lengths) or counts.min() < 1 or lengths.min() < 1:
        raise UserError(f"{folder}: its captions are none of this store; delete it, make it anew")
    return about, counts, lengths, numbers


class Sequences:
    """The clips of a store as tokens with text features; both stay on the disk and are mapped.

    ``lengths`` int64 ``[clips]`` in tokens, which are below ``codebook``, ``splits`` ``[clips]``, ``text_lengths`` int64 of
    each different caption.
    Raises ``UserError`` where tokens or features are missing or do not belong to the store.
    """

    def __init__(self, folder: str | Path, *, tokenizer: str | Path) -> None:
        self.store = ClipStore(folder)
        self.folder = self.store.folder
        tokens = self.folder / tokens_name(tokenizer)
        about = _about(tokens, TOKENS_FORMAT, f"kinetok data tokens {folder} --tokenizer {tokenizer}")
        _same_store(tokens, about, self.store)
        text, self._counts, self.text_lengths, self._numbers = _captions(self.store)
        self.text_dim, self.text_encoder = int(text["dim"]), dict(text["encoder"])
        self.identity = [tokens.name, self.store.digest]
        self.splits = self.store.splits
        self.lengths = self.store.frames // int(about["frames_per_token"])
        self._offsets = np.concatenate(([0], np.cumsum(self.lengths)))
        self._starts = np.cumsum(self._counts) - self._counts
        self._rows = np.concatenate(([0], np.cumsum(self.text_lengths)))
        self._tokens = _mapped(tokens / TOKENS, np.int32, int(self._offsets[-1]))
        self.codebook, self._file = int(about["codebook"]), tokens / TOKENS
        rows = _mapped(self.folder / TEXT / FEATURES, np.float16, self.text_dim * int(self._rows[-1]))
        self._text = rows.reshape(-1, self.text_dim)

    def tokens(self, clip: int) -> Tensor:
        """int64 ``[lengths[clip]]``."""
        return torch.from_numpy(self._tokens[self._offsets[clip] : self._offsets[clip + 1]].astype(np.int64))

    def caption(self, clips: NDArray[np.int64], chance: NDArray[np.float64]) -> NDArray[np.int64]:
        """For clips and numbers in [0, 1): which of the different captions stands at that place of each clip's own."""
        return self._numbers[self._starts[clips] + (chance * self._counts[clips]).astype(np.int64)].astype(np.int64)

    def text(self, caption: int) -> Tensor:
        """Features fp32 ``[L, text_dim]`` of one of the different captions."""
        return torch.from_numpy(self._text[self._rows[caption] : self._rows[caption + 1]].astype(np.float32))

    def rows(
        self,
        captions: NDArray[np.int64],
        text_lengths: NDArray[np.int64],
        clips: NDArray[np.int64],
        first: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> tuple[Tensor, Tensor]:
        """The first ``text_lengths`` features of captions, one after another, in the 16 bits in which they are stored:
        fp16 ``[M, text_dim]``; and ``counts`` tokens of clips from the token ``first`` on, int64 ``[K]``."""
        text = self._text[_stretches(self._rows[captions], text_lengths)]
        tokens = self._tokens[_stretches(self._offsets[clips] + first, counts)]
        if not _finite(text):  # a training would only say that its loss is NaN
            raise UserError(
                f"{self.folder / TEXT / FEATURES}: expected finite text features; delete its folder, make it anew"
            )
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.codebook:  # a GPU would only say "assert"
            raise UserError(
                f"{self._file}: expected tokens from 0 to {self.codebook - 1}; delete its folder, make it anew"
            )
        return torch.from_numpy(text), torch.from_numpy(tokens.astype(np.int64))

    def caption_text(self, caption: int) -> str:
        at = int(np.flatnonzero(self._numbers == caption)[0])
        clip = int(np.searchsorted(self._starts, at, side="right")) - 1
        return self.store.captions(clip)[at - int(self._starts[clip])]


def _stretches(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers of ``counts`` rows from each start on, one stretch after another."""
    return np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())


def _finite(values: NDArray[np.float16]) -> bool:
    """Whether no number is infinite or NaN, which as bits are the largest of their sign; far faster than isfinite."""
    infinite = 0x7C00
    return bool(
        values.view(np.int16).max(initial=0) < infinite and values.view(np.uint16).max(initial=0) < 0x8000 + infinite
    )


def _mapped(path: Path, dtype: Any, count: int) -> NDArray:
    """An array of a file that must hold exactly that many numbers."""
    size = np.dtype(dtype).itemsize * count
    if not path.is_file() or path.stat().st_size != size or not count:
        raise UserError(f"{path}: expected {size} bytes for the clips of this store; delete its folder, make it anew")
    return np.memmap(path, dtype, "r")


def mean_lengths(folder: str | Path, most_text: int, least: int, most: int) -> tuple[float, float] | None:
    """Mean text features and tokens of a draw from a store's training clips of ``least`` to ``most`` tokens.

    None where the store has no text features yet; tokens are counted at 15 a second. ``UserError`` for features of other
    clips.
    """
    store = ClipStore(folder)
    lengths = store.frames // 2
    clips = np.flatnonzero((store.splits == "train") & (lengths >= least) & (lengths <= most))
    if not (store.folder / TEXT / ABOUT).exists() or not len(clips):
        return None
    _, counts, sizes, numbers = _captions(store)
    text = np.add.reduceat(np.minimum(sizes, most_text)[numbers], np.cumsum(counts) - counts) / counts
    return float(text[clips].mean()), float(lengths[clips].mean())
