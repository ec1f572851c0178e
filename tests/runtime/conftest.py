"""The small random model and the rules of the soak command, benchmarks/runtime/soak_crowd.py."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def soak() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "runtime" / "soak_crowd.py"
    spec = importlib.util.spec_from_file_location("soak_crowd", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak_crowd"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
