"""Which clips come at which step, and threads that prepare the steps ahead.

A step is a function of its number and the seed alone, so a run that goes on at step N draws what it would have drawn,
whatever the number of workers; nothing of a loader needs to be kept in a checkpoint.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from kinetok.errors import UserError

Batch = TypeVar("Batch")
WORKERS = 3  # more than a GPU needs but for the smallest recipes (benchmarks/results/train_import.json)


class Order:
    """Clips epoch after epoch, each once an epoch, every epoch in an order of its own; a step takes the next ``batch``."""

    def __init__(self, clips: NDArray[np.int64], batch: int, seed: int) -> None:
        if not len(clips) or batch < 1:
            raise UserError(f"expected clips and a batch above 0, got {len(clips)} and {batch}")
        self.clips, self.batch, self.seed = clips, batch, seed
        self._last = (-1, clips)

    def step(self, number: int) -> NDArray[np.int64]:
        """The clips ``[batch]`` of a step, over all processes: process r of R takes ``[r::R]``."""
        places = np.arange(number * self.batch, (number + 1) * self.batch)
        epochs, places = np.divmod(places, len(self.clips))
        return np.concatenate([self._epoch(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)])

    def rng(self, number: int) -> np.random.Generator:
        """For what else a step draws."""
        return np.random.default_rng((self.seed, 1, number))

    def _epoch(self, number: int) -> NDArray[np.int64]:
        last = self._last  # one assignment: workers share it
        if last[0] != number:
            self._last = last = number, np.random.default_rng((self.seed, 0, number)).permutation(self.clips)
        return last[1]


def load(make: Callable[[int], Batch], start: int, stop: int, workers: int = WORKERS) -> Iterator[Batch]:
    """``make(step)`` of the steps from ``start`` on, in order. ``workers`` threads prepare a step each ahead, which hides
    the reading: it runs while others compute. An error is raised where its step would have come."""
    if workers == 0:
        yield from map(make, range(start, stop))
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="steps") as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            steps = iter(range(start, stop))
            waiting.extend(pool.submit(make, step) for step in islice(steps, workers))
            while waiting:
                made = waiting.popleft().result()
                waiting.extend(pool.submit(make, step) for step in islice(steps, 1))
                yield made
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class Steps(Generic[Batch]):
    """``load`` for who asks for one step after another, and may begin anywhere."""

    def __init__(self, make: Callable[[int], Batch], stop: int) -> None:
        self.make, self.stop = make, stop
        self._next = -1
        self._made: Iterator[Batch] = iter(())

    def __call__(self, step: int) -> Batch:
        if step != self._next:
            self._next, self._made = step, load(self.make, step, self.stop)
        self._next += 1
        return next(self._made)
