"""ONNX Runtime alone: calls of neighbouring slots, its detokenizer, bundles by name (test_backends.py has the rest)."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="needs the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")

from kinetok.errors import UserError
from kinetok.export.bundle import export_bundle
from kinetok.model.decoder import MotionDecoder
from kinetok.runtime.backends import graphs, onnx, open_backend
from kinetok.runtime.backends.graphs import SlotSteps
from kinetok.runtime.backends.onnx import LiveOnnxBackend, OnnxBackend, OnnxDetokenizer
from kinetok.runtime.bundle import read_bundle


@pytest.fixture(scope="module")
def exact(small_model, tmp_path_factory):
    return read_bundle(export_bundle(small_model, tmp_path_factory.mktemp("exact") / "bundle", check=False))


def features(length: int) -> torch.Tensor:
    return torch.randn(length, 8, generator=torch.Generator().manual_seed(length))


def test_rows_that_do_not_agree_are_run_one_by_one(exact) -> None:
    together, apart = OnnxBackend(exact, 3, 40), OnnxBackend(exact, 3, 40)
    for backend in (together, apart):
        backend._step.batched = backend is together
        for slot in range(3):
            backend.prefill(slot, features(slot + 1))
        backend._step.calls.clear()
    results = [backend.decode([2, 0, 1], torch.tensor([4, 5, 6])) for backend in (together, apart)]
    assert torch.equal(*results)
    assert list(together._step.calls) == [(0, 3)] and list(apart._step.calls) == [(0, 1), (1, 2), (2, 3)]


def test_texts_and_steps_go_through_one_session(small_model, monkeypatch) -> None:
    """A second one would pack the weights once more; of torch's decoder only the text's projection is used."""
    decoder = copy.deepcopy(small_model.decoder)
    backend = LiveOnnxBackend(decoder, 2, 40)
    assert len(onnx._SESSIONS[decoder]) == 1
    with monkeypatch.context() as patch:
        for name in ("blocks", "norm", "head", "embed"):
            patch.delitem(decoder._modules, name)
        first = backend.prefill(0, features(6), [1, 2, 3])
    for token in ([], [1], [2], [3]):
        again = backend.decode([1], torch.tensor(token))[0] if token else backend.prefill(1, features(6))
    torch.testing.assert_close(first, again, atol=2e-5, rtol=1e-5)
    assert len(onnx._SESSIONS[decoder]) == 1


@pytest.mark.parametrize(
    ("slots", "together", "calls"),
    [
        ([], True, []),
        ([3], True, [(3, 4)]),
        ([2, 0, 1], True, [(0, 3)]),
        ([2, 0, 1], False, [(0, 1), (1, 2), (2, 3)]),
        ([6, 0, 5, 3, 2, 7, 4], True, [(0, 1), (2, 6), (6, 8)]),
        (list(range(9)), True, [(0, 4), (4, 8), (8, 9)]),
    ],
)
def test_which_slots_share_a_call(slots, together, calls) -> None:
    """At most four neighbours a call here."""
    steps = SlotSteps.__new__(SlotSteps)
    steps.most, steps.batched = 4, together
    assert steps.neighbours(slots) == calls


def test_only_so_many_calls_stay_bound(exact, monkeypatch) -> None:
    monkeypatch.setattr(graphs, "BOUND", 3)
    backend = OnnxBackend(exact, 3, 40)
    backend._step.batched = True
    for slot in range(3):
        backend.prefill(slot, features(4))
    for slots in ([0], [1], [2], [0, 1], [1, 2], [0, 1, 2], [0]):
        backend.decode(slots, torch.arange(len(slots)))
        assert len(backend._step.calls) <= 3
    assert backend.lengths == [8, 8, 7]


def test_the_detokenizer_whole_and_in_pieces(small_model, exact) -> None:
    detokenizer, tokens = OnnxDetokenizer(exact), [3, 239, 0, 17, 100]
    with torch.inference_mode():
        wanted = small_model.tokenizer.decode(torch.tensor([tokens]))[0].numpy()
    np.testing.assert_allclose(detokenizer.decode(tokens), wanted, atol=1e-5)
    stream = detokenizer.stream()
    np.testing.assert_allclose(np.concatenate([stream.push(tokens[:2]), stream.push(tokens[2:])]), wanted, atol=1e-5)
    for bad in ([], [-1], [4375]):
        with pytest.raises(UserError, match="tokens from 0"):
            detokenizer.decode(bad)


def test_opening_by_name(small_model, exact) -> None:
    backend = open_backend(f"onnx:{exact.directory}", small_model, 1, 20)
    assert isinstance(backend, OnnxBackend)
    assert isinstance(open_backend("onnx", small_model, 1, 20), LiveOnnxBackend)
    half = replace(small_model, decoder=copy.deepcopy(small_model.decoder).half())
    with pytest.raises(UserError, match="kinetok export onnx"):
        open_backend("onnx", half, 1, 20)
    with pytest.raises(UserError, match="no bundle"):
        open_backend("onnx:/nowhere", small_model, 1, 20)
    other = MotionDecoder(replace(small_model.decoder.config, n_layer=1)).eval()
    with pytest.raises(UserError, match="another model"):
        open_backend(f"onnx:{exact.directory}", replace(small_model, decoder=other), 1, 20)
    with pytest.raises(UserError, match="CUDAExecutionProvider"):
        OnnxBackend(exact, 1, 20, "cuda")


def test_a_gpu_takes_no_step_that_attends_on_the_cpu(small_model, tmp_path) -> None:
    """int8 with an fp32 cache; with an fp16 one every operator is CUDA's too, and only the provider is missing here."""
    cases = {None: "GroupQueryAttention.*--kv fp16", "fp16": "CUDAExecutionProvider"}
    for kv, said in cases.items():
        bundle = read_bundle(export_bundle(small_model, tmp_path / str(kv), dtype="int8", kv=kv))
        assert OnnxBackend(bundle, 1, 20).lengths == [0]
        with pytest.raises(UserError, match=said):
            onnx.open_session(bundle, "decode", torch.device("cuda"))


def test_no_session_waits_for_its_next_call_on_a_core(small_model, exact) -> None:
    live = onnx.live_session(small_model.decoder, "decoder_graph")
    for session in (live, *(onnx.open_session(exact, name, torch.device("cpu")) for name in ("prefill", "decode"))):
        assert session.get_session_options().get_session_config_entry("session.force_spinning_stop") == "1"


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("Unsupported model IR version: 11, max supported IR version: 10", "--opset 18"),
        ("Opset 24 is under development and support for this is limited. The schemas may change", "--opset 18"),
        ("nbits_ == 4 was false. Only 4b quantization is supported for MatMulNBits op", "--dtype fp32 or fp16"),
    ],
)
def test_an_onnxruntime_too_old_for_a_graph(small_model, exact, monkeypatch, words, remedy) -> None:
    """Its own words stand behind a signature in C++ that is longer than a line."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(f"Load model from FILE failed:{'model.cc:181 ' * 40}\n{words}")

    monkeypatch.setattr(onnx.runtime_library(), "InferenceSession", refuse)
    monkeypatch.setattr(onnx.runtime_library(), "__version__", "old")
    with pytest.raises(UserError, match=f"onnxruntime old is too old for it: install a newer one.*{remedy}") as error:
        onnx.open_session(exact, "decode", torch.device("cpu"))
    assert "\n" not in str(error.value)
    fresh = copy.deepcopy(small_model.decoder)
    with pytest.raises(UserError, match="onnxruntime old is too old") as error:
        LiveOnnxBackend(fresh, 1, 20)
    assert "export" not in str(error.value)  # there is no bundle
