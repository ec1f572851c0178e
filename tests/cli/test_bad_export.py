"""Exported models that cannot be made or run, on the command line: one line that names the remedy, and nothing left behind."""

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnx", reason="needs the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")

from kinetok.export.bundle import decoder_facts, export_bundle
from kinetok.model.pretrained import load_pretrained
from kinetok.runtime.bundle import MANIFEST
from kinetok.runtime.engines import ENGINES, FORMAT, VERSION

HAS_RTX = "needs tensorrt-rtx-cu13 (Linux on x86-64), which is not installed"


@pytest.fixture(scope="module")
def made(model, tmp_path_factory) -> Path:
    loaded = load_pretrained(model, "cpu", "float32")
    return export_bundle(loaded, tmp_path_factory.mktemp("made") / "bundle", text=False, check=False)


@pytest.fixture
def bundle(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "bundle"))


@pytest.fixture
def engines(model, tmp_path) -> Callable[..., Path]:
    """A folder in the form of engines for sm_86; keywords change its manifest."""

    def write(**changes: object) -> Path:
        folder = tmp_path / "engines"
        folder.mkdir(exist_ok=True)
        (folder / "decode.engine").write_bytes(b"a decode step")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "library": "tensorrt-rtx",
            "library_version": "1.7",
            "targets": ["sm_86"],
            "decoder": decoder_facts(load_pretrained(model, "cpu", "float32").decoder.config),
            "files": {"decode.engine": {"sha256": hashlib.sha256(b"a decode step").hexdigest(), "bytes": 13}},
            **changes,
        }
        (folder / ENGINES).write_text(json.dumps(manifest))
        return folder

    return write


@pytest.fixture
def generate(refused, model, tmp_path) -> Callable[..., str]:
    """The line that generate refuses with, beside which no clip was written."""

    def call(backend: str, *options: str) -> str:
        out = tmp_path / "clips"
        line = refused("generate", "a person runs", "--model", model, "-o", out, "--backend", backend, *options)
        assert not list(out.glob("*"))
        return line

    return call


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_models_that_cannot_be_expressed(kinetok, refused, model, tmp_path, monkeypatch) -> None:
    packed = tmp_path / "packed"
    assert kinetok("quantize", model, "--to", "int8", "-o", packed, "--force").code == 0
    before = sorted(tmp_path.rglob("*"))
    for command in (("onnx",), ("tensorrt-rtx", "--targets", "sm_86"), ("tensorrt",)):
        line = refused("export", command[0], packed, "--out", tmp_path / "out", *command[1:])
        assert "is quantised already (int8): export the original" in line
    assert sorted(tmp_path.rglob("*")) == before


def test_widths_that_blocks_of_weights_do_not_divide(refused, model, tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx", reason=HAS_RTX)
    out = tmp_path / "out"
    line = refused("export", "tensorrt-rtx", model, "--out", out, "--targets", "sm_86", "--dtype", "int4")
    assert "4-bit weights need a width that is a multiple of 32, got 16" in line
    assert not list(tmp_path.iterdir())


def test_targets_that_the_library_does_not_know(refused, model, tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx", reason=HAS_RTX)
    for targets, why in (("sm_90,sm_86", "got 'sm_90'"), ("", "name the GPUs to build for"), ("86", "got '86'")):
        assert why in refused("export", "tensorrt-rtx", model, "--out", tmp_path / "out", "--targets", targets)
    assert not list(tmp_path.iterdir())


def test_an_opset_that_the_exporter_does_not_write(refused, model, tmp_path) -> None:
    for opset in ("17", "25", "0"):
        assert "opset: expected one of 23" in refused(
            "export", "onnx", model, "--out", tmp_path / "out", "--opset", opset
        )
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(refused, model, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for kind in ("onnx", "tensorrt-rtx"):
        if kind == "tensorrt-rtx":
            pytest.importorskip("tensorrt_rtx", reason=HAS_RTX)
        assert "other files" in refused(
            "export", kind, model, "--out", tmp_path, *(["--targets", "sm_86"] if kind != "onnx" else [])
        )
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_export_that_is_stopped_leaves_nothing(kinetok, model, tmp_path, monkeypatch, stop) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("kinetok.export.bundle.golden_cases", lambda *_: os.kill(os.getpid(), stop))
    try:
        assert kinetok("export", "onnx", model, "--out", tmp_path / "out", "--no-text").code == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.iterdir())


def test_a_checker_that_is_absent_is_named_before_anything_is_written(refused, model, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("kinetok.export.bundle._write", lambda *_: pytest.fail("it was begun"))
    assert "pip install 'kinetok[onnx]'" in refused("export", "onnx", model, "--out", tmp_path / "out", "--no-text")
    assert not list(tmp_path.iterdir())


def test_packages_that_are_absent(refused, generate, bundle, engines, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install 'kinetok[onnx]'" in generate(f"onnx:{bundle}")
    assert "pip install 'kinetok[onnx]'" in generate("onnx")
    assert "verifying a bundle needs the package onnxruntime" in refused("verify", bundle)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "verifying a bundle needs the package onnx," in refused("verify", bundle)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert "pip install 'kinetok[tensorrt-rtx]'" in generate(f"tensorrt:{engines()}", "--device", "cpu")


def test_a_newer_schema(refused, generate, bundle, engines) -> None:
    edit(bundle / MANIFEST, version=99)
    assert "version 99 is newer than this kinetok reads (1): update kinetok" in generate(f"onnx:{bundle}")
    assert "update kinetok" in refused("verify", bundle)
    newer = engines(version=99)
    assert "expected version 2, got 99: update kinetok" in generate(f"tensorrt:{newer}")
    assert "update kinetok" in refused("verify", newer)


def test_edited_files(refused, generate, bundle, engines) -> None:
    flip(bundle / "weights.bin")
    assert "weights.bin: not the file that was exported" in generate(f"onnx:{bundle}")
    edited = engines()
    flip(edited / "decode.engine")
    assert "decode.engine: not the file that was exported" in generate(f"tensorrt:{edited}")
    assert "export the model again, or fetch an intact copy" in refused("verify", edited)


def test_an_execution_provider_that_is_absent(refused, bundle) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine may have the provider")
    line = refused("verify", bundle, "--device", "cuda")
    assert "no CUDAExecutionProvider" in line and "install onnxruntime-gpu, or use the device cpu" in line


def test_a_device_that_onnxruntime_has_no_provider_for(refused, bundle) -> None:
    for device in ("mps", "tpu", ""):
        assert f"device: expected cpu or cuda, got {device!r}" in refused("verify", bundle, "--device", device)


def test_engines_of_another_gpu_or_of_none(refused, generate, engines, monkeypatch) -> None:
    folder = engines()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "need an NVIDIA GPU, and torch sees none" in generate(f"tensorrt:{folder}")
    assert "need an NVIDIA GPU, and torch sees none" in refused("verify", folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    remedy = "built for sm_86, but this GPU is sm_89: build them again with kinetok export tensorrt-rtx --targets sm_89"
    assert remedy in generate(f"tensorrt:{folder}", "--device", "cpu")
    assert remedy in refused("verify", folder)
