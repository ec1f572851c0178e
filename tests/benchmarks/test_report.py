"""The page of results: every figure from a file, GPU rows empty without one, plots that are pictures."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import report
import torch

from kinetok.errors import UserError
from kinetok.model.config import DecoderConfig
from kinetok.runtime.bench import decode, record, routes, tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def results(monkeypatch, tmp_path) -> Path:
    """Real reports of a tiny model."""
    for module in (decode, record, tokenizer):
        for name in ("copy_bandwidth", "read_bandwidth", "matmul_rate"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *_: 1e10)
    tiny = DecoderConfig(n_layer=1, n_head=2, n_embd=16, codebook=60, text_dim=8, block_size=64)
    decoder = routes.random_decoder(tiny, CPU, torch.float32)
    monkeypatch.setattr(decode, "load", lambda *_: (decoder, decode.TokenizerConfig()))
    settings = decode.DecodeSettings(device=CPU, tokens=(30,), batch=(1, 2), text=3, peers=("graph",), note="A note.")
    folder = tmp_path / "results"
    folder.mkdir()
    record.write(folder / "decode_tiny.json", decode.measure(settings, lambda line: None))
    whole = tokenizer.TokenizerSettings(preset="default", device=CPU, tokens=(2,), repeats=5)
    record.write(folder / "tokenizer_tiny.json", tokenizer.measure(whole, lambda line: None))
    (folder / "other.json").write_text("{}")
    return folder


def test_page_and_plots(results, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "docs" / "benchmarks.md"
    out.parent.mkdir()
    monkeypatch.setattr(sys, "argv", ["report.py", "--results", str(results), "--out", str(out)])
    report.main()
    text = out.read_text()
    row = json.loads((results / "decode_tiny.json").read_text())["rows"][0]
    assert f"| {row['output_throughput']:.1f} |" in text and "A note." in text
    assert text.count("not measured") == len(report.GPU_GOALS)
    assert "graph did not run: a CUDA graph needs a CUDA device." in text
    images = sorted((out.parent / "images" / "benchmarks").iterdir())
    assert [path.stem for path in images] == ["latency_by_position", "roofline", "throughput_by_batch"]
    for path in images:
        picture = ElementTree.fromstring(path.read_text())
        assert picture.tag.endswith("svg") and f"images/benchmarks/{path.name}" in text


def test_no_results_are_no_figures(tmp_path) -> None:
    text = report.page({}, tmp_path)
    assert text.count("not measured") == len(report.GPU_GOALS) + 3 and list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="above zero"):
        report.line_plot("t", "x", "y", {"a": [(0, 1)]})
