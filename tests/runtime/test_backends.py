"""What every backend promises: the decoder's logits, rows that do not know of each other, slots that start anew."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch

from kinetok.errors import UserError
from kinetok.model.config import DecoderConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.runtime.backends import open_backend
from kinetok.runtime.backends.fused import FusedBackend
from kinetok.runtime.backends.onnx import LiveOnnxBackend
from kinetok.runtime.backends.torch import TorchBackend


@pytest.fixture(scope="module")
def decoder() -> MotionDecoder:
    torch.manual_seed(3)
    config = DecoderConfig(n_layer=2, n_head=2, n_embd=192, codebook=4000, text_dim=8, block_size=64)
    return MotionDecoder(config).eval()


FLOAT8 = partial(FusedBackend, float8=True)


@pytest.fixture(
    params=[TorchBackend, FusedBackend, FLOAT8, LiveOnnxBackend], ids=["torch", "fused", "fused fp8", "onnx"]
)
def kind(request: pytest.FixtureRequest) -> Callable[..., TorchBackend]:
    return request.param


def features(length: int) -> torch.Tensor:
    return torch.randn(length, 8, generator=torch.Generator().manual_seed(length))


@torch.inference_mode()
def whole(decoder: MotionDecoder, text: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Logits after the last position, by the training layout."""
    row = torch.tensor([[decoder.config.pad_id] * len(text) + tokens])
    return decoder(row, text[None], torch.ones(1, len(text)))[0, -1]


@pytest.mark.parametrize("given", [0, 1, 7])
def test_logits_are_those_of_the_whole_sequence(decoder, kind, given: int) -> None:
    backend = kind(decoder, 3, 40)
    text, tokens = features(5), [7, 0, 3999, 12, 12, 90, 4]
    logits = backend.prefill(1, text, tokens[:given])
    torch.testing.assert_close(logits, whole(decoder, text, tokens[:given]), atol=2e-5, rtol=1e-5)
    if kind is FLOAT8:
        near = {"atol": 0.1, "rtol": 0}  # e4m3 rounds to a sixteenth; the logits' standard deviation is 1
    else:
        near = {"atol": 2e-5, "rtol": 1e-5}
    for at in range(given, len(tokens)):
        logits = backend.decode([1], torch.tensor(tokens[at : at + 1]))[0]
        torch.testing.assert_close(logits, whole(decoder, text, tokens[: at + 1]), **near)


@pytest.mark.parametrize("crowd", [2, 3, 5, 8, 17])
def test_a_rows_bits_do_not_depend_on_the_others(decoder, kind, crowd: int) -> None:
    alone, among = kind(decoder, 1, 40), kind(decoder, crowd, 40)
    own = crowd // 2
    expected = [alone.prefill(0, features(5))]
    for slot in range(crowd):
        logits = among.prefill(slot, features(5 if slot == own else slot + 1))
        if slot == own:
            torch.testing.assert_close(logits, expected[0], atol=0, rtol=0)
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        tokens = torch.randint(4000, (crowd,), generator=generator)
        order = torch.randperm(crowd, generator=generator).tolist()
        slots = [slot for slot in order if slot == own or (slot + step) % 3]
        logits = among.decode(slots, tokens[slots])[slots.index(own)]
        assert torch.equal(logits, alone.decode([0], tokens[own : own + 1])[0])


def test_a_slot_that_starts_anew_sees_nothing_of_its_past(decoder, kind) -> None:
    backend, fresh = kind(decoder, 1, 40), kind(decoder, 1, 40)
    backend.prefill(0, torch.full((30, 8), torch.nan))
    assert backend.slab.float().isnan().any()
    for step in range(3):
        logits = [
            b.prefill(0, features(4), [5, 6]) if not step else b.decode([0], torch.tensor([step]))
            for b in (backend, fresh)
        ]
        assert torch.equal(*logits)


def test_a_copy_goes_its_own_way(decoder, kind) -> None:
    backend = kind(decoder, 3, 40)
    backend.prefill(0, features(6), [1, 2])
    backend.copy(0, 2)
    first = backend.decode([0, 2], torch.tensor([3, 3]))
    assert torch.equal(first[0], first[1])
    backend.decode([2], torch.tensor([9]))
    same = kind(decoder, 1, 40)
    same.prefill(0, features(6), [1, 2])
    same.decode([0], torch.tensor([3]))
    assert torch.equal(backend.decode([0], torch.tensor([4])), same.decode([0], torch.tensor([4])))


def test_full_slots_and_bad_sizes_are_refused_and_nothing_changes(decoder, kind) -> None:
    backend = kind(decoder, 2, 8)
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
            kind(decoder, slots, capacity)
    with pytest.raises(UserError, match="plain weights"):
        FusedBackend(copy.deepcopy(decoder).double(), 1, 8)
    with pytest.raises(UserError, match="torch"):
        open_backend("abacus", None, 1, 1)
