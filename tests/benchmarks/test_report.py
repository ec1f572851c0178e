"""The page of results: every figure from a file, goals empty where nobody measured, plots that are pictures."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

import goals
import plots
import pytest
import report
import torch

from kinetok.errors import UserError
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.runtime.bench import decode, figures, live, record, step, subject, tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def results(monkeypatch, tmp_path) -> Path:
    """Real reports of a tiny model, one of each kind."""
    for module in (figures, record, tokenizer):
        for name in ("copy_bandwidth", "read_bandwidth", "matmul_rate"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *_: 1e10)
    tiny = DecoderConfig(n_layer=1, n_head=2, n_embd=16, codebook=240, text_dim=8, block_size=64)
    monkeypatch.setattr(subject, "decoder_preset", lambda name: tiny)
    sizes = {"nb_code": 256, "code_dim": 8, "width": 8, "depth": 1}
    monkeypatch.setattr(subject, "TokenizerConfig", partial(TokenizerConfig, **sizes))
    folder = tmp_path / "results"
    folder.mkdir()

    def measured(name: str, measure, asked) -> None:
        record.write(folder / f"{name}_tiny.json", measure(asked, lambda line: None))

    asked = decode.DecodeSettings(device=CPU, tokens=(30,), batch=(1, 2), text=3, peers=("graph",), note="A note.")
    measured("decode", decode.measure, asked)
    measured("step", step.measure, step.StepSettings(device=CPU, positions=(9, 40), text=3, repeats=5))
    alive = live.LiveSettings(device=CPU, seconds=0.4, characters=(1, 2))
    measured("stream", live.stream, alive)
    measured("crowd", live.crowd, alive)
    whole = tokenizer.TokenizerSettings(preset="default", device=CPU, tokens=(2,), repeats=5)
    measured("tokenizer", tokenizer.measure, whole)
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
    assert text.count("### ") == 5
    for found in goals.table(report.reports(results)):
        assert f"| {' | '.join(found)} |" in text
    assert text.count("graph did not run: a CUDA graph needs a CUDA device.") == 1
    images = sorted((out.parent / "images" / "benchmarks").iterdir())
    assert [path.stem for path in images] == ["latency_by_position", "roofline", "throughput_by_batch"]
    for path in images:
        picture = ElementTree.fromstring(path.read_text())
        assert picture.tag.endswith("svg") and f"images/benchmarks/{path.name}" in text


def test_no_results_are_no_figures(tmp_path) -> None:
    text = report.page({}, tmp_path)
    assert text.count(f"| {goals.NOTHING} |  |") == len(goals.GOALS) and list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="above zero"):
        plots.line_plot("t", "x", "y", {"a": [(0, 1)]})


def a_report(device: str, *rows: dict, gpu: bool = True) -> dict:
    machine = {"device": device, **({"compute_capability": "9.0"} if gpu else {})}
    return {"machine": machine, "rows": [{"batch": 1, "route": "ours", **row} for row in rows]}


def line(what: str, *found: dict) -> tuple[str, str]:
    lines = [row for row in goals.table(dict(enumerate(found))) if what in row[1]]
    assert len(lines) == 1
    return lines[0][3:]


SEVEN = {"kind": "decode", "model": "7B", "dtype": "bf16", "tokens": 150, "output_throughput": 190.0}


def test_goals_by_hand() -> None:
    what = "share of measured copy"
    assert line(what, a_report("NVIDIA H100", {**SEVEN, "mbu": 0.95})) == ("0.95 / 190 tok/s", "yes")
    assert line(what, a_report("NVIDIA H100", {**SEVEN, "mbu": 0.9})) == ("0.90 / 190 tok/s", "no")
    # Another card, another size, another dtype: none of the goal's business.
    assert line(what, a_report("NVIDIA A100", {**SEVEN, "mbu": 0.95})) == (goals.NOTHING, "")
    assert line(what, a_report("NVIDIA H100", {**SEVEN, "mbu": 0.95, "dtype": "fp16"})) == (goals.NOTHING, "")
    # Half a goal is not met.
    half = a_report("NVIDIA H100", {**SEVEN, "dtype": "int8", "mbu": 0.9})
    assert line("int8 / int4", half) == (f"0.90 / {goals.NOTHING}", "")
    crowd = {"kind": "step", "model": "7B", "dtype": "bf16", "kv": "bf16", "context": 170}
    steps = [{**crowd, "batch": batch, "p99_itl_ms": batch / 8} for batch in (256, 512, 768)]
    assert line("resident", a_report("NVIDIA H100", *steps)) == (f"512 / {goals.NOTHING}", "")
    small = {"kind": "decode", "model": "111M", "dtype": "fp32", "route": "uncached"}
    both = [{**small, "tokens": 50, "ours_is_faster": 8.0}, {**small, "tokens": 150, "ours_is_faster": 9.0}]
    assert line("uncached at 50", a_report("EPYC", *both, gpu=False)) == ("8.00x / 9.00x", "no")
    assert line("uncached at 50", a_report("EPYC", *both)) == (goals.NOTHING, "")
    late = {"kind": "step", "model": "111M", "dtype": "fp32", "context": 300, "cost_over_first": 1.1}
    assert line("position 300", a_report("EPYC", late, gpu=False)) == ("1.100", "yes")
    assert line("position 300", a_report("NVIDIA H100", late)) == ("1.100", "yes")
