"""``kinetok bench`` end to end on a tiny model."""

import json

import pytest
import torch

from kinetok.model.config import DecoderConfig
from kinetok.runtime import steps
from kinetok.runtime.bench import clock, decode, figures, live, record, subject, tokenizer

CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(autouse=True)
def limits(monkeypatch) -> None:
    for module in (figures, record, tokenizer):
        for name in ("copy_bandwidth", "read_bandwidth", "matmul_rate"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *_: 1e10)
    monkeypatch.setattr(clock, "CPU_FLUSH", 4096)


def test_decode_then_compare(kinetok, refused, model, tmp_path) -> None:
    arguments = "bench", "decode", "--model", model, "--tokens", "4,6", "--text", "3", "--peers", "uncached"
    first = kinetok(*arguments, "--json", tmp_path / "a.json", "--note", "a test")
    assert first.code == 0 and "tok/s" in first.out, first
    found = json.loads((tmp_path / "a.json").read_text())
    assert {row["model"] for row in found["rows"]} == {model.name}
    assert found["note"] == "a test" and [(row["tokens"], row["route"]) for row in found["rows"]] == [
        (6, "ours"),
        (6, "uncached"),
        (4, "ours"),
        (4, "uncached"),
    ]
    assert {"device", "torch", "commit", "load_average"} <= set(found["machine"])
    for row in found["rows"]:
        row["seconds"] = [1.0, 1.1, 0.9, 1.0, 1.0]
    (tmp_path / "a.json").write_text(json.dumps(found))
    same = kinetok("bench", "compare", tmp_path / "a.json", tmp_path / "a.json")
    assert same.code == 0 and same.out.count("within noise") == 4
    for row in found["rows"]:
        row["seconds"] = [9 * value for value in row["seconds"]]
    (tmp_path / "b.json").write_text(json.dumps(found))
    faster = kinetok("bench", "compare", tmp_path / "b.json", tmp_path / "a.json")
    assert faster.code == 0 and faster.out.count(" faster") == 4
    slower = kinetok("bench", "compare", tmp_path / "a.json", tmp_path / "b.json")
    assert slower.code == 1 and "SLOWER" in slower.out
    assert "cannot read" in refused("bench", "compare", tmp_path / "a.json", tmp_path / "c.json")
    checked = kinetok("bench", "check", tmp_path / "a.json", tmp_path / "b.json")
    assert checked.code == 0 and checked.out.count("4 rows, schema 2") == 2
    del found["rows"][2]["mbu"]
    (tmp_path / "b.json").write_text(json.dumps(found))
    assert "rows, number 3 lacks mbu" in refused("bench", "check", tmp_path / "b.json")


def test_wrong_tokens_of_ours_are_exit_code_1(kinetok, model, monkeypatch, tmp_path) -> None:
    other = decode.Uncached(
        subject.random_decoder(subject.load("", str(model), CPU, "fp32").plain.config, CPU, FP32, 9)
    )
    monkeypatch.setattr(decode.Backended, "ours", lambda *_: other)
    outcome = kinetok("bench", "decode", "--model", model, "--tokens", "6", "--json", tmp_path / "w.json")
    assert outcome.code == 1 and "other tokens" in outcome.out
    assert record.read(tmp_path / "w.json")["cannot_run"][0]["route"] == "ours"
    monkeypatch.setattr(tokenizer, "check_of", lambda *_: {"passed": False, "margin": 0.5})
    outcome = kinetok("bench", "tokenizer", "--model", model, "--tokens", "2", "--repeats", "5")
    assert outcome.code == 1 and "is wrong by 0.5" in outcome.out


def test_step(kinetok, refused, model, tmp_path) -> None:
    arguments = "bench", "step", "--model", model, "--positions", "30,60", "--batch", "1,2", "--repeats", "5"
    outcome = kinetok(*arguments, "--json", tmp_path / "p.json")
    assert outcome.code == 0 and outcome.out.count("times the first position's") == 4, outcome
    rows = record.read(tmp_path / "p.json")["rows"]
    assert [(row["batch"], row["context"]) for row in rows] == [(1, 30), (1, 60), (2, 30), (2, 60)]
    assert "need at least 22" in refused("bench", "step", "--positions", "10")


def test_tokenizer(kinetok, model, tmp_path) -> None:
    arguments = "--model", model, "--tokens", "1,5", "--batch", "1,2", "--repeats", "5", "--json", tmp_path / "t.json"
    outcome = kinetok("bench", "tokenizer", *arguments)
    assert outcome.code == 0, outcome
    rows = record.read(tmp_path / "t.json")["rows"]
    assert len(rows) == 8 and all(row["mfu"] > 0 and len(row["seconds"]) == 5 for row in rows)
    assert rows[0]["frames_per_s"] == pytest.approx(2 * rows[0]["output_throughput"])


@pytest.mark.parametrize(("kind", "rows"), [("stream", [1]), ("crowd", [1, 3])])
def test_stream_and_crowd(kinetok, model, tmp_path, kind, rows) -> None:
    more = ("--characters", "1,3") if kind == "crowd" else ()
    arguments = "bench", kind, "--model", model, "--seconds", "0.4", "--json", tmp_path / "s.json", *more
    outcome = kinetok(*arguments)
    assert outcome.code == 0 and "times real time" in outcome.out, outcome
    found = record.read(tmp_path / "s.json")
    assert [row["batch"] for row in found["rows"]] == rows
    for row in found["rows"]:
        assert row["tokens"] == 6 and row["p99_itl_ms" if kind == "crowd" else "p99_block_ms"] > 0
        assert row["output_throughput"] == pytest.approx(row["batch"] * 6 / sorted(row["seconds"])[2])
    if kind == "crowd":
        assert found["characters_in_real_time"]["66.7_ms"] in (0, 1, 3)


def test_steps_in_which_some_are_still_to_join_are_measured_apart(kinetok, model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(steps, "PREFILLED_AT_ONCE", 1)  # one a step
    arguments = "bench", "crowd", "--model", model, "--backend", "torch", "--json", tmp_path / "r.json"
    spent: dict[str, list[float]] = {}
    monkeypatch.setattr(live, "spread", lambda name, times: spent.update({name: times}) or clock.spread(name, times))
    assert kinetok(*arguments, "--seconds", "0.6", "--characters", "4").code == 0
    # Nine tokens each, the last one joins in the fourth step, the first one has its last token in the ninth.
    assert {name: len(times) for name, times in spent.items()} == {"ttft": 5, "ramp": 5 * 4, "itl": 5 * 5}
    assert kinetok(*arguments, "--seconds", "0.4", "--characters", "6").code == 1
    refused = record.read(tmp_path / "r.json")["cannot_run"]
    assert "before all have joined" in refused[0]["reason"]


def test_random_weights_stream_too(monkeypatch) -> None:
    small = DecoderConfig(n_layer=1, n_head=2, n_embd=16, text_dim=8)
    monkeypatch.setattr(subject, "decoder_preset", lambda name: small)
    for causal in (False, True):
        settings = live.LiveSettings(preset="111M", device=CPU, seconds=1.2, causal=causal, text=3)
        (row,) = live.stream(settings, lambda line: None)["rows"]
        assert row["tokens"] == 18 and row["text"] == 3
        assert row["model"] == ("111M, causal tokenizer" if causal else "111M")
        assert subject.load("111M", None, CPU, "fp32", causal=causal).model.tokenizer.config.causal is causal


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("decode", "--preset", "2B"), "preset: expected default or one of 44M, "),
        (("crowd", "--preset", "nope"), "preset: expected default or one of 44M, "),
        (("decode", "--tokens", "fifty"), "whole numbers"),
        (("decode", "--batch", "0"), "whole numbers"),
        (("decode", "--peers", "vllm"), "unknown peers"),
        (("decode", "--device", "tpu"), "device"),
        (("stream", "--seconds", "60"), "0.4 to 10"),
        (("crowd", "--characters", "0"), "whole numbers"),
        (("crowd", "--dtype", "int2"), "dtype"),
        (("decode", "--preset", "44M", "--backend", "vulkan"), "backend"),
        (("step", "--kv", "int3"), "kv: expected one of"),
        (("crowd", "--kv", "fp8", "--backend", "torch"), "kv: fp8 is for the backend fused alone"),
        (("stream", "--kv", "fp8", "--backend", "onnx:."), "kv: expected auto"),
        (("tokenizer", "--preset", "111M"), "released or default"),
    ],
)
def test_bad_input(refused, arguments, expected) -> None:
    assert expected in refused("bench", *arguments)


def test_a_report_that_cannot_be_written_is_refused_before_the_measurement(refused, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(live, "crowd", None)
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "a.json"):
        assert "cannot write" in refused("bench", "crowd", "--json", path)
