"""The fixture that runs a launcher leaves torch as it found it."""

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch.utils import _device


@pytest.fixture
def first() -> Iterator[None]:
    """A process in which no device has been entered yet; afterwards, when the poison is gone, "meta" must hold."""
    _device._device_constructors.cache_clear()
    yield
    with torch.device("meta"):
        assert torch.empty(3).is_meta


def test_a_device_entered_first_among_poisoned_outputs(first: None, launcher: Callable[[str], ModuleType]) -> None:
    with torch.device("meta"):
        assert torch.zeros(3).is_meta
