"""``kinetok.runtime.bench``: peers write the decoder's tokens, wrong ones get no speed, files compare."""

import copy
import json
from pathlib import Path

import pytest
import torch

from kinetok.errors import UserError
from kinetok.model.config import DecoderConfig
from kinetok.runtime import generate_tokens
from kinetok.runtime.bench import decode, record, routes
from kinetok.runtime.bench.clock import spread

CPU = torch.device("cpu")
CONFIG = {"n_layer": 2, "n_head": 2, "n_embd": 64, "codebook": 500, "text_dim": 8, "block_size": 64}


@pytest.fixture(autouse=True)
def limits(monkeypatch) -> None:
    """Limits that need no measuring."""
    for module in (decode, record):
        monkeypatch.setattr(module, "copy_bandwidth", lambda device: 2e10)
        monkeypatch.setattr(module, "read_bandwidth", lambda device: 1e10)
        monkeypatch.setattr(module, "matmul_rate", lambda device, dtype: 1e11)


@pytest.fixture
def tiny(monkeypatch):
    """The decoder that every measurement loads."""
    decoder = routes.random_decoder(DecoderConfig(**CONFIG), CPU, torch.float32, 3)
    monkeypatch.setattr(decode, "load", lambda *_: (decoder, decode.TokenizerConfig()))
    return decoder


def settings(**changes) -> decode.DecodeSettings:
    return decode.DecodeSettings(**{"device": CPU, "tokens": (6,), "text": 4, **changes})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("peer", ["uncached", "graph", "hf"])
def test_every_peer_writes_our_tokens(peer: str, tied: bool) -> None:
    decoder = routes.random_decoder(DecoderConfig(**CONFIG, tie_weights=tied), CPU, torch.float32, 3)
    features = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    marks: list[int] = []
    route = {
        "uncached": lambda: routes.Uncached(decoder),
        "graph": lambda: routes.Graph(decoder, 3, 24, capture=False),
        "hf": lambda: routes.HuggingFace(decoder),
    }[peer]()
    found = route.run(features, 12, lambda: marks.append(0))
    ours = routes.Backended.ours(decoder, 3, 24).run(features, 12, lambda: None)
    assert found.tolist() == ours.tolist() and len(marks) == 12
    if not tied:
        assert len(ours.unique()) > 15
        assert ours[0].tolist() == generate_tokens(decoder, features[0], 12)


def test_a_report_has_every_figure_and_is_json(tiny) -> None:
    said: list[str] = []
    report = decode.measure(settings(batch=(1, 2), peers=("uncached", "graph", "ort"), note="quiet"), said.append)
    assert [(row["batch"], row["route"]) for row in report["rows"]] == [
        (1, "ours"),
        (1, "uncached"),
        (2, "ours"),
        (2, "uncached"),
    ]
    assert {found["route"]: found["reason"] for found in report["cannot_run"]} == {
        "graph": "a CUDA graph needs a CUDA device",
        "ort": "there is no ONNX export of these weights: kinetok export onnx, then --onnx DIR",
    }
    for row in report["rows"]:
        assert len(row["seconds"]) == 5 and len(row["itl_ms_by_position"]) == 5
        assert row["mbu_read"] == pytest.approx(2 * row["mbu"])
        step = row["median_itl_ms"] / 1e3
        assert row["gb_per_s"] * 1e9 * step == pytest.approx(decode.step_bytes(tiny, row["batch"], 7))
        assert row["check"]["passed"] and row["check"]["distinct_tokens"] > 3
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] >= row["steady_memory_bytes"] // 2
    assert report["rows"][0]["ours_is_faster"] == 1
    assert set(report["characters_in_real_time"]) == {"16.6_ms", "66.7_ms"}
    assert json.loads(json.dumps(report, allow_nan=False))["note"] == "quiet"
    assert len(said) == 8


def test_a_peer_with_other_tokens_gets_no_speed(tiny, monkeypatch) -> None:
    other = routes.Uncached(routes.random_decoder(DecoderConfig(**CONFIG), CPU, torch.float32, 4))
    monkeypatch.setattr(decode, "Uncached", lambda decoder: other)
    report = decode.measure(settings(peers=("uncached",)), lambda line: None)
    assert [row["route"] for row in report["rows"]] == ["ours"]
    assert "other tokens" in report["cannot_run"][0]["reason"]


def test_near_ties_are_told_from_other_tokens(tiny) -> None:
    features = torch.randn(1, 4, 8)
    ours = routes.Backended.ours(tiny, 1, 24).run(features, 8, lambda: None)
    assert decode.agree(tiny, features, ours, ours) == {
        "passed": True,
        "near_ties": 0,
        "margin": 0.0,
        "distinct_tokens": len(ours.unique()),
    }
    theirs = ours.clone()
    theirs[0, 5] = (theirs[0, 5] + 1) % 500
    found = decode.agree(tiny, features, ours, theirs)
    assert not found["passed"] and found["near_ties"] == 1 and found["margin"] > 1e-3
    with torch.no_grad():  # two equal rows of the head: which of the two wins is rounding
        tiny.head.weight[int(theirs[0, 5])] = tiny.head.weight[int(ours[0, 5])]
    assert decode.agree(tiny, features, ours, theirs)["passed"]
    assert not decode.agree(tiny, features, ours, theirs[:, :-1])["passed"]


def test_step_bytes_and_work_by_hand(tiny) -> None:
    products = 2 * (64 * 192 + 64 * 64 + 64 * 2 * 256 + 256 * 64 + 2 * 64) + 501 * 64
    assert decode.step_bytes(tiny, 3, 10) == 4 * (products + 64 + 3 * 64 * (1 + 2 * 2 * 10))
    assert decode.step_work(tiny, 3, 10) == 2 * 3 * (products + 2 * 2 * 64 * 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peers": ("tgi",)}, "unknown peers"),
        ({"dtype": "fp64"}, "dtype"),
        ({"repeats": 4}, "at least 5"),
        ({"batch": (0,)}, "batch"),
        ({"tokens": (1,)}, "2 tokens"),
    ],
)
def test_bad_settings(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(**changes)


def test_a_clip_that_does_not_fit_is_refused(tiny) -> None:
    with pytest.raises(UserError, match="this model has 64"):
        decode.measure(settings(tokens=(62,)), lambda line: None)


def test_spread_by_hand() -> None:
    values = [float(i) for i in range(101)]
    found = spread("itl", values)
    assert found["mean_itl_ms"] == found["median_itl_ms"] == 50
    assert found["p95_itl_ms"] == 95 and found["p99_itl_ms"] == 99
    assert spread("itl", [2.0])["p99_itl_ms"] == 2.0


ROW = {"kind": "decode", "model": "111M", "dtype": "fp32", "batch": 1, "tokens": 50, "route": "ours", "threads": 1}


def report(*seconds: float) -> dict:
    return {"format": "kinetok-bench", "schema": 1, "rows": [{**ROW, "seconds": list(seconds)}]}


@pytest.mark.parametrize(
    ("before", "after", "regression"),
    [
        ((1, 1, 1, 1, 1), (1.02, 1.02, 1.02, 1.02, 1.02), False),  # within the least noise
        ((1, 1, 1, 1, 1), (1.1, 1.1, 1.1, 1.1, 1.1), True),
        ((1, 1, 1, 1, 1), (0.5, 0.5, 0.5, 0.5, 0.5), False),
        ((0.9, 0.95, 1, 1.05, 1.2), (1.0, 1.0, 1.1, 1.1, 1.2), False),  # within what the repeats vary
        ((1, 1, 1, 1, 9), (1.2, 1.2, 1.2, 1.2, 9), True),  # one slow repeat is not noise enough
    ],
)
def test_compare(before: tuple, after: tuple, regression: bool) -> None:
    (found,) = record.compare(report(*before), report(*after))
    assert found["regression"] is regression and found["ratio"] == pytest.approx(sorted(before)[2] / sorted(after)[2])


def test_compare_needs_a_row_in_common() -> None:
    other = copy.deepcopy(report(1, 1))
    other["rows"][0]["tokens"] = 150
    with pytest.raises(UserError, match="no row in common"):
        record.compare(report(1, 1), other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: "{", "no JSON"),
        (lambda found: "[" * 100_000, "no JSON"),
        (lambda found: json.dumps([found]), "expected a result file"),
        (lambda found: json.dumps({**found, "schema": 2}), "schema 1"),
        (lambda found: json.dumps({**found, "rows": [{}]}), "lacks"),
        (lambda found: json.dumps({**found, "rows": [{**ROW, "seconds": [1.0]}]}), "lacks"),
        (lambda found: json.dumps({**found, "rows": [{**ROW, "seconds": [0, 1]}]}), "lacks"),
    ],
)
def test_bad_files(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(change(report(1, 1)))
    with pytest.raises(UserError, match=message):
        record.read(path)
    record.write(path, report(1, 2))
    assert record.read(path) == report(1, 2)
    with pytest.raises(UserError, match="cannot read"):
        record.read(tmp_path / "none.json")
