"""Whose threads have the processor: torch's, or those of a backend's own library."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kinetok.runtime.backends import Backend


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch's operators of this thread on ``count`` threads inside."""
    before = torch.get_num_threads()
    if count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count != before:
            torch.set_num_threads(before)


@contextmanager
def threads_for(backend: Backend) -> Iterator[None]:
    """Around the steps of a backend and what torch does between them.

    torch's threads spin for a while after each operator and hold up those of another library on the same cores. So where
    ``backend.own_threads``, torch works on one inside.
    """
    with torch_threads(1 if getattr(backend, "own_threads", False) else torch.get_num_threads()):
        yield
