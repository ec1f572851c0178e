"""The small random model and the rules of the soak command, benchmarks/runtime/soak_crowd.py; folders of engines."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kinetok.model.config import DecoderConfig
from kinetok.runtime.bundle import file_digest
from kinetok.runtime.engines import ENGINES, FORMAT, VERSION


@pytest.fixture(scope="session")
def soak() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "runtime" / "soak_crowd.py"
    spec = importlib.util.spec_from_file_location("soak_crowd", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak_crowd"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def engine_folder() -> Callable[..., Path]:
    """Writes a folder in the form of exported engines, for sm_86 and sm_120 by TensorRT-RTX 1.0; keywords change its manifest.

    What the engines hold is the caller's business.
    """
    pytest.importorskip("onnx", reason="needs the extra 'onnx'")
    from kinetok.export.bundle import decoder_facts

    def write(folder: Path, config: DecoderConfig, engines: dict[str, bytes], **changes: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in engines.items():
            (folder / name).write_bytes(data)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "library": "tensorrt-rtx",
            "library_version": "1.0",
            "targets": ["sm_86", "sm_120"],
            "kv_dtype": "float32",
            "batches": [1, 4],
            "positions": config.block_size,
            "decoder": decoder_facts(config),
            "files": {
                name: dict(zip(("sha256", "bytes"), file_digest(folder / name), strict=True)) for name in engines
            },
            **changes,
        }
        (folder / ENGINES).write_text(json.dumps(manifest))
        return folder

    return write
