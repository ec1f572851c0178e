"""Fixtures shared by all tests."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton, which decides then how its kernels run
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "tests" / "golden"
NOT_SHIPPED = ROOT.parent / "shared" / "reference" / "golden"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """Path of a golden file by name; skips, saying why, where only the development machines have it."""

    def find(name: str) -> Path:
        for folder in (SHIPPED, NOT_SHIPPED):
            if (folder / name).exists():
                return folder / name
        pytest.skip(f"{name} is not in tests/golden: its arrays derive from a body model that may not be redistributed")

    return find
