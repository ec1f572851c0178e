"""``kinetok quantize``: the report, the refusal, --force, and a directory that generates."""

import json

import pytest

from kinetok.runtime import quantize as gate


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    monkeypatch.setattr(gate, "TOKENS", 4)


def test_quantise_refuse_force_and_generate(kinetok, refused, model, tmp_path, monkeypatch) -> None:
    out = tmp_path / "small"
    monkeypatch.setattr(gate, "BOUNDS", gate.Bounds(agreement=0, logit_error=10, mpjpe_mm=1e4, jerk=10))
    result = kinetok("quantize", model, "--to", "int8", "-o", out, "--json")
    assert result.code == 0, result
    report = json.loads(result.out)
    assert report["positions"] == 12 and report["failed"] == []
    made = kinetok(
        "generate", "a person runs", "--model", out, "--seconds", "0.4", "--format", "npz", "-o", tmp_path / "o"
    )
    assert made.code == 0, made
    assert json.loads((out / "kinetok.json").read_text())["quantisation"] == {"kind": "int8", "group": 0}
    assert "quantised already" in refused("quantize", out, "--to", "int4", "-o", tmp_path / "x")

    monkeypatch.setattr(gate, "BOUNDS", gate.Bounds(logit_error=1e-9))
    result = kinetok("quantize", model, "--to", "int4", "-o", tmp_path / "worse")
    assert result.code == 2 and "logit error" in result.err and "--force" in result.err
    assert not (tmp_path / "worse").exists()
    result = kinetok("quantize", model, "--to", "int4", "-o", tmp_path / "worse", "--force")
    assert result.code == 0 and "wrote" in result.out
    assert json.loads((tmp_path / "worse" / "kinetok.json").read_text())["provenance"]["quantisation"]["failed"]


def test_a_folder_of_something_else_is_refused_before_the_comparison(refused, model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gate, "quantize", None)
    (tmp_path / "mine").write_text("")
    assert "holds other files" in refused("quantize", model, "--to", "int8", "-o", tmp_path)


def test_bad_input(refused, model, tmp_path) -> None:
    assert "int8, int4, fp8" in refused("quantize", model, "--to", "int2", "-o", tmp_path / "x")
    assert "group" in refused("quantize", model, "--to", "fp8", "--group", "64", "-o", tmp_path / "x")
    assert "unknown model" in refused("quantize", tmp_path / "none", "--to", "int8", "-o", tmp_path / "x")
