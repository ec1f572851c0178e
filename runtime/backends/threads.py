"""Whose threads have the processor: torch's, or those of a backend's own library."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kinetok.runtime.backends import Backend


@contextmanager
def threads_for(backend: Backend) -> Iterator[None]:
    """Around the calls of a backend and what torch does between them.

    torch's threads spin for a while after each operator and hold up those of another library on the same cores. So where
    ``backend.own_threads``, torch works on one inside.
    """
    before = torch.get_num_threads()
    alone = getattr(backend, "own_threads", False) and before != 1
    if alone:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if alone:
            torch.set_num_threads(before)
