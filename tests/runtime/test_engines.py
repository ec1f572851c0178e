"""Folders of engines: which are refused, each in one line that names the remedy."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("onnx", reason="needs the extra 'onnx'")

from kinetok.errors import UserError
from kinetok.model.config import DecoderConfig
from kinetok.runtime.engines import ENGINES, check_here, deserialize, library, read_engines

CONFIG = DecoderConfig(n_layer=2, n_head=2, n_embd=64, codebook=240, text_dim=8, block_size=64)
FILES = {"prefill.engine": b"a prefill", "decode.engine": b"a decode step"}


@pytest.fixture
def folder(engine_folder, tmp_path):
    return lambda **changes: engine_folder(tmp_path / "engines", CONFIG, FILES, **changes)


def test_whole_engines_are_read(folder) -> None:
    engines = read_engines(folder())
    assert engines.kind == "tensorrt-rtx" and engines.engine("decode").read_bytes() == FILES["decode.engine"]
    engines.check_decoder(CONFIG)
    with pytest.raises(UserError, match=r"kinetok_engines\.json: 'text\.engine' is not among its files"):
        engines.engine("text")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": 1}, "expected version 2, got 1: build the engines again with this kinetok"),
        ({"version": 9}, "expected version 2, got 9: update kinetok, or build the engines again"),
        ({"version": "2"}, "expected the format 'kinetok-engines'"),
        ({"format": "zip"}, "expected the format 'kinetok-engines', got 'zip'"),
        ({"files": []}, "'files' to be an object"),
        ({"files": {"../decode.engine": {}}}, "not the name of one of its files"),
    ],
)
def test_manifests_that_cannot_be_read(folder, changes, why) -> None:
    with pytest.raises(UserError, match=why) as caught:
        read_engines(folder(**changes))
    assert "\n" not in str(caught.value)


def test_no_engines_and_damaged_ones(folder, tmp_path) -> None:
    with pytest.raises(UserError, match=r"holds no engines: .* kinetok export tensorrt-rtx or tensorrt"):
        read_engines(tmp_path)
    out = folder()
    (out / "decode.engine").write_bytes(b"a decode steq")
    with pytest.raises(UserError, match=r"decode\.engine: not the file that was exported"):
        read_engines(out)
    (out / "decode.engine").unlink()
    with pytest.raises(UserError, match=r"cannot read .*decode\.engine: .* export the model again"):
        read_engines(out)
    (out / ENGINES).write_bytes(b"{")
    with pytest.raises(UserError, match=r"kinetok_engines\.json: expected JSON.* export the model again"):
        read_engines(out)


def test_engines_of_another_gpu(folder) -> None:
    engines = read_engines(folder())
    engines.check_gpu((8, 6))
    with pytest.raises(
        UserError, match=r"built for sm_86, sm_120, but this GPU is sm_89: .* tensorrt-rtx --targets sm_89"
    ):
        engines.check_gpu((8, 9))
    with pytest.raises(UserError, match=r"need an NVIDIA GPU, and torch sees none: use the backend onnx or torch"):
        engines.check_gpu(None)
    plain = read_engines(folder(library="tensorrt", targets=["sm_90"]))
    with pytest.raises(
        UserError, match=r"built for sm_90, but this GPU is sm_89: build them again with kinetok export tensorrt$"
    ):
        plain.check_gpu((8, 9))
    for targets in (None, "sm_89", 7):
        with pytest.raises(UserError, match="no GPU that it names"):
            read_engines(folder(targets=targets)).check_gpu((8, 9))
    with pytest.raises(UserError, match="expected the library to be one of tensorrt, tensorrt-rtx, got 'trt'"):
        _ = read_engines(folder(library="trt")).kind


def test_engines_of_another_version_of_the_library(folder, monkeypatch) -> None:
    engines = read_engines(folder())
    engines.check_library(SimpleNamespace(__version__="1.0"))
    with pytest.raises(UserError, match=r"built by tensorrt-rtx 1\.0, but 1\.1 is installed: build them again"):
        engines.check_library(SimpleNamespace(__version__="1.1"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (12, 0))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.0", Builder=None))
    assert check_here(engines, "a test").__version__ == "1.0"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(UserError, match="a test needs the package tensorrt-rtx"):
        check_here(engines, "a test")


def test_engines_of_another_model(folder) -> None:
    other = json.loads((folder() / ENGINES).read_text())["decoder"] | {"layers": 3}
    with pytest.raises(UserError, match=r"another model \(layers 3, the model has 2\)"):
        read_engines(folder(decoder=other)).check_decoder(CONFIG)


def test_an_engine_that_the_library_cannot_load(folder) -> None:
    """The real library, where there is no GPU or the file is none of its engines: its own words, in one line."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13 (Linux on x86-64), which is not installed")
    rtx = library("tensorrt-rtx", "a test")
    with pytest.raises(UserError, match=r"decode\.engine: tensorrt_rtx .* cannot load this engine: .+Error") as caught:
        deserialize(rtx, read_engines(folder()).engine("decode"), [])
    assert "\n" not in str(caught.value)
