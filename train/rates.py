"""What a loader brings on this machine, to stand beside what a recipe takes."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinetok.errors import UserError
from kinetok.train.data.loading import WORKERS, load
from kinetok.train.data.sequences import Sequences
from kinetok.train.data.shards import ClipStore, is_store
from kinetok.train.feed import Feed
from kinetok.train.scale_recipes import ScaleRecipe
from kinetok.train.scale_tokenizer import StoreTokenizerRecipe, Windows

SECONDS = 1.0
NO_STORE = "loader: not measured; give --data STORE"


def rates_of(steps: Iterator[Any], samples: int, seconds: float) -> tuple[float, float]:
    """Samples a second, and a second of processor time of all threads, of steps of ``samples``; the first five do not
    count."""
    for _ in range(5):
        next(steps)
    count, began, began_cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        next(steps)
        count += samples
    return count / (time.perf_counter() - began), count / (time.process_time() - began_cpu)


def sequences_line(recipe: ScaleRecipe, data: Path, tokenizer: Path, *, processes: int, pass_positions: int) -> str:
    """What one worker of a process brings of a decoder's steps, for people; or why that is not measured."""
    if not is_store(data):
        return NO_STORE
    try:
        found = Sequences(data, tokenizer=tokenizer)
        train = _some(np.flatnonzero(recipe.fits(found.lengths) & (found.splits == "train")))
    except UserError as error:
        return f"loader: not measured ({error})"
    chosen = replace(recipe, model=replace(recipe.model, codebook=found.codebook, text_dim=found.text_dim))
    feed = Feed(chosen, found, train, pass_positions=pass_positions, world=processes)
    return _line(feed.step, -(-recipe.batch // processes), "clips")


def windows_line(recipe: StoreTokenizerRecipe, store: ClipStore | None, *, processes: int) -> str:
    """``sequences_line`` of a tokenizer's steps; in place of mean and deviation, which do not change the speed, 0 and 1."""
    if store is None:
        return NO_STORE
    try:
        train = _some(np.flatnonzero((store.frames >= recipe.frames) & (store.splits == "train")))
    except UserError as error:
        return f"loader: not measured ({error})"
    windows = Windows(recipe, store, train, np.zeros(()), np.ones(()), world=processes)
    return _line(windows.step, -(-recipe.batch // processes), "windows")


def _some(clips: NDArray[np.int64]) -> NDArray[np.int64]:
    if not len(clips):
        raise UserError("no clip of the split train has the recipe's length")
    return clips


def _line(make: Callable[[int], Any], samples: int, what: str) -> str:
    rate, _ = rates_of(load(make, 0, 10**9, workers=1), samples, SECONDS)
    return f"loader: {rate:,.0f} {what}/s of one worker, measured now for {SECONDS:g} s; a process has {WORKERS}"
