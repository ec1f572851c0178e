"""``kinetok bench`` end to end on a tiny model."""

import json

import pytest

from kinetok.runtime.bench import clock, decode, record, tokenizer


@pytest.fixture(autouse=True)
def limits(monkeypatch) -> None:
    for module in (decode, record, tokenizer):
        for name in ("copy_bandwidth", "read_bandwidth", "matmul_rate"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *_: 1e10)
    monkeypatch.setattr(clock, "CPU_FLUSH", 4096)


def test_decode_then_compare(kinetok, refused, model, tmp_path) -> None:
    arguments = "bench", "decode", "--model", model, "--tokens", "4,6", "--text", "3", "--peers", "uncached"
    first = kinetok(*arguments, "--json", tmp_path / "a.json", "--note", "a test")
    assert first.code == 0 and "tok/s" in first.out, first
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["note"] == "a test" and [(row["tokens"], row["route"]) for row in found["rows"]] == [
        (4, "ours"),
        (4, "uncached"),
        (6, "ours"),
        (6, "uncached"),
    ]
    assert {"device", "torch", "commit", "load_average"} <= set(found["machine"])
    same = kinetok("bench", "compare", tmp_path / "a.json", tmp_path / "a.json")
    assert same.code == 0 and same.out.count("within noise") == 4
    for row in found["rows"]:
        row["seconds"] = [9 * value for value in row["seconds"]]
    (tmp_path / "b.json").write_text(json.dumps(found))
    slower = kinetok("bench", "compare", tmp_path / "a.json", tmp_path / "b.json")
    assert slower.code == 1 and "SLOWER" in slower.out
    assert "cannot read" in refused("bench", "compare", tmp_path / "a.json", tmp_path / "c.json")


def test_tokenizer(kinetok, model, tmp_path) -> None:
    arguments = "--model", model, "--tokens", "1,5", "--batch", "1,2", "--repeats", "5", "--json", tmp_path / "t.json"
    outcome = kinetok("bench", "tokenizer", *arguments)
    assert outcome.code == 0, outcome
    rows = record.read(tmp_path / "t.json")["rows"]
    assert len(rows) == 8 and all(row["mfu"] > 0 and len(row["seconds"]) == 5 for row in rows)
    assert rows[0]["frames_per_s"] == pytest.approx(2 * rows[0]["output_throughput"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("decode", "--preset", "2B"), "unknown decoder size"),
        (("decode", "--tokens", "fifty"), "whole numbers"),
        (("decode", "--batch", "0"), "whole numbers"),
        (("decode", "--peers", "vllm"), "unknown peers"),
        (("decode", "--device", "tpu"), "device"),
        (("tokenizer", "--preset", "111M"), "released or default"),
    ],
)
def test_bad_input(refused, arguments, expected) -> None:
    assert expected in refused("bench", *arguments)
