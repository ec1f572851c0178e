"""The 7B's export at a small size: every step of it runs, and a wrong weight in the file is noticed."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("onnx", reason="needs the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")

from kinetok.model.presets import decoder_preset

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "export" / "full_7b.py"


@pytest.fixture
def full_7b(monkeypatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("full_7b", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = decoder_preset("7B", n_layer=3, n_head=2, n_embd=256, codebook=240, text_dim=32)
    monkeypatch.setattr(module, "decoder_preset", lambda name, n_layer=3: replace(small, n_layer=n_layer))
    return module


def call(module: ModuleType, monkeypatch, tmp_path: Path) -> tuple[int, dict]:
    monkeypatch.setattr(
        sys, "argv", ["full_7b.py", "--folder", str(tmp_path / "out"), "--json", str(tmp_path / "result.json")]
    )
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert not (tmp_path / "out").exists()
    return int(ended.value.code or 0), json.loads((tmp_path / "result.json").read_text())


def test_all_of_it(full_7b, monkeypatch, tmp_path) -> None:
    code, result = call(full_7b, monkeypatch, tmp_path)
    assert code == 0 and result["passed"] and result["export"]["layers"] == 3
    assert result["export"]["weights_bytes"] >= 2 * result["export"]["parameters"]
    assert result["export"]["private_bytes"]["largest"] > 0 and result["checker"]["passed"]


def test_a_wrong_weight(full_7b, monkeypatch, tmp_path) -> None:
    real = full_7b.WeightFile.put

    def put(self, name, make, *rest):
        return real(self, name, (lambda: make() * 1.5) if name == "blocks.1.down.weight" else make, *rest)

    monkeypatch.setattr(full_7b.WeightFile, "put", put)
    code, result = call(full_7b, monkeypatch, tmp_path)
    assert code == 1 and not result["passed"]
