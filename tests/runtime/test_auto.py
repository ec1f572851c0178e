"""Which backend a model gets when nobody says, and the reason that goes with it."""

import sys
from types import SimpleNamespace

import pytest
import torch

from kinetok.model.config import DecoderConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.runtime import memory
from kinetok.runtime.backends import auto
from kinetok.runtime.backends.auto import choose_backend
from kinetok.runtime.backends.onnx import LiveOnnxBackend
from kinetok.runtime.backends.threads import threads_for
from kinetok.runtime.backends.torch import TorchBackend


@pytest.fixture
def decoder() -> MotionDecoder:
    return MotionDecoder(DecoderConfig(n_layer=1, n_head=2, n_embd=64, codebook=20, text_dim=8, block_size=16))


def test_a_cpu_runs_onnx_runtime_where_it_can(decoder, monkeypatch) -> None:
    assert choose_backend(decoder).name == "onnx"
    monkeypatch.setattr(auto, "bytes_available", lambda device: 1000)
    name, reason = choose_backend(decoder)
    assert name == "torch" and "free" in reason
    monkeypatch.setattr(auto, "bytes_available", memory.bytes_available)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    name, reason = choose_backend(decoder)
    assert name == "torch" and "onnxruntime is not installed" in reason and "kinetok[onnx]" in reason


def test_an_onnx_runtime_that_is_broken_is_none(decoder, monkeypatch, tmp_path) -> None:
    package = tmp_path / "onnxruntime"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libcrypt.so.1: cannot open\\nshared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    name, reason = choose_backend(decoder)
    assert name == "torch" and "cannot be imported (libcrypt.so.1: cannot open shared object file)" in reason


def test_what_the_live_graph_cannot_hold_is_torchs(decoder) -> None:
    assert choose_backend(decoder.bfloat16()) == (
        "torch",
        "ONNX Runtime's live graph is fp32, and these weights are torch.bfloat16",
    )
    decoder.float().blocks[0].qkv = torch.nn.Identity()
    assert choose_backend(decoder).name == "torch"


def test_torch_has_one_thread_while_another_library_works(decoder) -> None:
    before = torch.get_num_threads()
    stand = SimpleNamespace(own_threads=True)
    seen = []
    try:
        torch.set_num_threads(2)
        for stand.own_threads in (True, False):
            with threads_for(stand):
                seen.append(torch.get_num_threads())
            seen.append(torch.get_num_threads())
        with pytest.raises(KeyError), threads_for(SimpleNamespace(own_threads=True)):
            raise KeyError
        seen.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2, 2, 2, 2]
    assert LiveOnnxBackend(decoder.eval(), 1, 8).own_threads and not hasattr(TorchBackend(decoder, 1, 8), "own_threads")
