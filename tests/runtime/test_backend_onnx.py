"""ONNX Runtime behind the same seam as torch: the same logits, slots apart, memory bound once."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="needs the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")

from kinetok.errors import UserError
from kinetok.export.bundle import export_bundle
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.pretrained import ModelBundle
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion.skeleton import CANONICAL_OFFSETS
from kinetok.runtime.backends import open_backend
from kinetok.runtime.backends.onnx import LiveOnnxBackend, OnnxBackend, OnnxDetokenizer
from kinetok.runtime.backends.torch import TorchBackend
from kinetok.runtime.bundle import read_bundle


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelBundle:
    torch.manual_seed(3)
    config = DecoderConfig(n_layer=2, n_head=2, n_embd=192, codebook=240, text_dim=8, block_size=64)
    tokenizer = TokenizerConfig(nb_code=256, code_dim=8, width=16, depth=2, patcher="none", causal=True)
    return ModelBundle(
        tokenizer=MotionTokenizer(tokenizer).eval(),
        decoder=MotionDecoder(config).eval(),
        mean=np.zeros(272),
        std=np.ones(272),
        offsets=np.array(CANONICAL_OFFSETS),
        text_encoder={"type": "none"},
        sampling={},
        provenance={},
        licence="none",
        bank=None,
        directory=tmp_path_factory.mktemp("none"),
    )


@pytest.fixture(scope="module", params=["fp32", "int8"])
def bundle(model, request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "bundle"
    return read_bundle(export_bundle(model, folder, dtype=request.param, check=False))


@pytest.fixture(scope="module")
def exact(model, tmp_path_factory):
    return read_bundle(export_bundle(model, tmp_path_factory.mktemp("exact") / "bundle", check=False))


def features(length: int) -> torch.Tensor:
    return torch.randn(length, 8, generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("given", [0, 3])
def test_logits_are_torchs(model, exact, given) -> None:
    ours, theirs = OnnxBackend(exact, 3, 40), TorchBackend(model.decoder, 3, 40)
    tokens = [7, 0, 239, 12, 12, 90, 4]
    results = [backend.prefill(1, features(5), tokens[:given]) for backend in (ours, theirs)]
    torch.testing.assert_close(*results, atol=1e-4, rtol=0)
    for token in tokens[given:]:
        results = [backend.decode([1], torch.tensor([token])) for backend in (ours, theirs)]
        torch.testing.assert_close(*results, atol=1e-4, rtol=0)


@pytest.mark.parametrize("crowd", [2, 5, 8])
def test_a_rows_bits_do_not_depend_on_the_others(bundle, crowd) -> None:
    alone, among = OnnxBackend(bundle, 1, 40), OnnxBackend(bundle, crowd, 40)
    own = crowd // 2
    for slot in range(crowd):
        logits = among.prefill(slot, features(5 if slot == own else slot + 1))
        if slot == own:
            assert torch.equal(logits, alone.prefill(0, features(5)))
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        tokens = torch.randint(240, (crowd,), generator=generator)
        order = torch.randperm(crowd, generator=generator).tolist()
        slots = [slot for slot in order if slot == own or (slot + step) % 3]
        logits = among.decode(slots, tokens[slots])[slots.index(own)]
        assert torch.equal(logits, alone.decode([0], tokens[own : own + 1])[0])


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


def test_a_slot_that_starts_anew_sees_nothing_of_its_past(exact) -> None:
    backend, fresh = OnnxBackend(exact, 1, 40), OnnxBackend(exact, 1, 40)
    backend.prefill(0, torch.full((30, 8), torch.nan))
    assert backend.slab.isnan().any()
    for step in range(3):
        logits = [
            b.prefill(0, features(4), [5, 6]) if not step else b.decode([0], torch.tensor([step]))
            for b in (backend, fresh)
        ]
        assert torch.equal(*logits)


def test_the_cache_is_written_where_it_lies(exact) -> None:
    backend = OnnxBackend(exact, 2, 40)
    place = backend.slab.data_ptr()
    backend.prefill(1, features(3))
    backend.decode([1], torch.tensor([9]))
    assert backend.slab.data_ptr() == place
    written = backend.slab.abs().sum(dim=(0, 1, 3, 5)) > 0  # [slots, capacity]
    assert written[1].nonzero().flatten().tolist() == [0, 1, 2, 3] and not written[0].any()


def test_a_copy_goes_its_own_way(exact) -> None:
    backend, same = OnnxBackend(exact, 3, 40), OnnxBackend(exact, 1, 40)
    backend.prefill(0, features(6), [1, 2])
    backend.copy(0, 2)
    first = backend.decode([0, 2], torch.tensor([3, 3]))
    assert torch.equal(first[0], first[1])
    backend.decode([2], torch.tensor([9]))
    same.prefill(0, features(6), [1, 2])
    same.decode([0], torch.tensor([3]))
    assert torch.equal(backend.decode([0], torch.tensor([4])), same.decode([0], torch.tensor([4])))


def test_full_slots_and_bad_sizes_are_refused_and_nothing_changes(exact) -> None:
    backend = OnnxBackend(exact, 2, 8)
    backend.prefill(0, features(3))
    backend.prefill(1, features(7))
    backend.decode([1], torch.tensor([1]))
    with pytest.raises(UserError, match="full"):
        backend.decode([0, 1], torch.tensor([1, 1]))
    assert backend.lengths == [3, 8]
    for text, tokens in ((features(9), []), (features(5), [1] * 4), (torch.zeros(0, 8), [1])):
        with pytest.raises(UserError, match="positions"):
            backend.prefill(0, text, tokens)
    for slots, capacity in ((0, 8), (1, 0), (1, 65)):
        with pytest.raises(UserError, match="positions"):
            OnnxBackend(exact, slots, capacity)


def test_the_detokenizer_whole_and_in_pieces(model, exact) -> None:
    detokenizer, tokens = OnnxDetokenizer(exact), [3, 239, 0, 17, 100]
    with torch.inference_mode():
        wanted = model.tokenizer.decode(torch.tensor([tokens]))[0].numpy()
    np.testing.assert_allclose(detokenizer.decode(tokens), wanted, atol=1e-5)
    stream = detokenizer.stream()
    np.testing.assert_allclose(np.concatenate([stream.push(tokens[:2]), stream.push(tokens[2:])]), wanted, atol=1e-5)
    for bad in ([], [-1], [240 + 200]):
        with pytest.raises(UserError, match="tokens from 0"):
            detokenizer.decode(bad)


def test_opening_by_name(model, exact) -> None:
    backend = open_backend(f"onnx:{exact.directory}", model, 1, 20)
    assert isinstance(backend, OnnxBackend)
    assert isinstance(open_backend("onnx", model, 1, 20), LiveOnnxBackend)
    half = replace(model, decoder=copy.deepcopy(model.decoder).half())
    with pytest.raises(UserError, match="kinetok export onnx"):
        open_backend("onnx", half, 1, 20)
    with pytest.raises(UserError, match="no bundle"):
        open_backend("onnx:/nowhere", model, 1, 20)
    other = MotionDecoder(replace(model.decoder.config, n_layer=1)).eval()
    with pytest.raises(UserError, match="another model"):
        open_backend(f"onnx:{exact.directory}", replace(model, decoder=other), 1, 20)
    with pytest.raises(UserError, match="CUDAExecutionProvider"):
        OnnxBackend(exact, 1, 20, "cuda")
