"""What every backend promises: the decoder's logits, rows that do not know of each other, slots that start anew."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch

from kinetok.errors import UserError
from kinetok.model.decoder import MotionDecoder
from kinetok.runtime.backends import Backend, open_backend
from kinetok.runtime.backends.fused import FusedBackend
from kinetok.runtime.backends.tensorrt import TensorRTBackend
from kinetok.runtime.backends.torch import TorchBackend

Kind = Callable[[int, int], Backend]

FLOAT8 = "fused fp8"
EXACT = {"atol": 2e-5, "rtol": 1e-5}
NEAR = {  # the logits' standard deviation is 1
    FLOAT8: {"atol": 0.1, "rtol": 0},  # e4m3 rounds to a sixteenth
    "onnx int8": {"atol": 0.1, "rtol": 0},
    "tensorrt fp16": {"atol": 5e-3, "rtol": 0},
}


@pytest.fixture(scope="module")
def decoder(small_model) -> MotionDecoder:
    return small_model.decoder


@pytest.fixture(
    scope="module",
    params=["torch", "fused", FLOAT8, "onnx", "onnx fp32", "onnx int8", "tensorrt fp32", "tensorrt fp16"],
)
def kind(request: pytest.FixtureRequest, small_model, tmp_path_factory) -> tuple[str, Kind]:
    """A backend's name, and what makes one of (slots, capacity): onnx with a precision is a bundle, TensorRT's library a
    stand-in on a CPU."""
    name, decoder = request.param, small_model.decoder
    if name == "torch":
        return name, partial(TorchBackend, decoder)
    if name in ("fused", FLOAT8):
        return name, partial(FusedBackend, decoder, float8=name == FLOAT8)
    pytest.importorskip("onnx", reason="needs the extra 'onnx'")
    pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    if name == "onnx":
        return name, partial(open_backend, "onnx", small_model)
    library, dtype = name.split()
    if library == "onnx":
        from kinetok.export.bundle import export_bundle

        bundle = export_bundle(small_model, tmp_path_factory.mktemp("bundle") / "out", dtype=dtype, check=False)
        return name, partial(open_backend, f"onnx:{bundle}", small_model)
    engines = request.getfixturevalue("stand_in_engines")(decoder, dtype)
    trt = request.getfixturevalue("stand_in")

    def stand_in(slots: int, capacity: int) -> Backend:
        device = torch.device("cpu")
        return TensorRTBackend(trt, engines, slots, capacity, device, "sm_86", lambda enqueue: enqueue(0))

    return name, stand_in


def features(length: int) -> torch.Tensor:
    return torch.randn(length, 8, generator=torch.Generator().manual_seed(length))


@torch.inference_mode()
def whole(decoder: MotionDecoder, text: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Logits after the last position, by the training layout."""
    row = torch.tensor([[decoder.config.pad_id] * len(text) + tokens])
    return decoder(row, text[None], torch.ones(1, len(text)))[0, -1]


@pytest.mark.parametrize("given", [0, 1, 7])
def test_logits_are_those_of_the_whole_sequence(decoder, kind, given: int) -> None:
    name, make = kind
    backend, near = make(3, 40), NEAR.get(name, EXACT)
    text, tokens = features(5), [7, 0, 3999, 12, 12, 90, 4]
    logits = backend.prefill(1, text, tokens[:given])
    # The fused backend's prefill is torch's.
    first = EXACT if name == FLOAT8 else near
    torch.testing.assert_close(logits, whole(decoder, text, tokens[:given]), **first)
    for at in range(given, len(tokens)):
        logits = backend.decode([1], torch.tensor(tokens[at : at + 1]))[0]
        torch.testing.assert_close(logits, whole(decoder, text, tokens[: at + 1]), **near)


@pytest.mark.parametrize(("length", "given"), [(1, 0), (1, 1), (3, 37), (40, 0)])
def test_a_prefill_of_the_smallest_and_the_largest_size(decoder, kind, length: int, given: int) -> None:
    name, make = kind
    backend, tokens = make(2, 40), [(31 * at) % 4000 for at in range(given)]
    logits = backend.prefill(1, features(length), tokens)
    near = EXACT if name == FLOAT8 else NEAR.get(name, EXACT)
    torch.testing.assert_close(logits, whole(decoder, features(length), tokens), **near)
    assert backend.lengths == [0, length + given]


@pytest.mark.parametrize("crowd", [2, 3, 5, 8, 17])
def test_a_rows_bits_do_not_depend_on_the_others(kind, crowd: int) -> None:
    alone, among = kind[1](1, 40), kind[1](crowd, 40)
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


def test_a_slot_that_starts_anew_sees_nothing_of_its_past(kind) -> None:
    backend, fresh = kind[1](1, 40), kind[1](1, 40)
    backend.prefill(0, torch.full((30, 8), torch.nan))
    assert backend.slab.float().isnan().any()
    for step in range(3):
        logits = [
            b.prefill(0, features(4), [5, 6]) if not step else b.decode([0], torch.tensor([step]))
            for b in (backend, fresh)
        ]
        assert torch.equal(*logits)


def test_the_cache_is_written_where_it_lies(kind) -> None:
    backend = kind[1](2, 40)
    place = backend.slab.data_ptr()
    backend.prefill(1, features(3))
    backend.decode([1], torch.tensor([9]))
    assert backend.slab.data_ptr() == place
    written = backend.slab.float().abs().sum(dim=(0, 1, 3, 5)) > 0  # [slots, capacity]
    assert written[1].nonzero().flatten().tolist() == [0, 1, 2, 3]
    # A fused step writes what is never read into slots that are not in the call.
    assert kind[0].startswith("fused") or not written[0].any()


def test_a_copy_goes_its_own_way(kind) -> None:
    backend = kind[1](3, 40)
    backend.prefill(0, features(6), [1, 2])
    backend.copy(0, 2)
    first = backend.decode([0, 2], torch.tensor([3, 3]))
    assert torch.equal(first[0], first[1])
    backend.decode([2], torch.tensor([9]))
    same = kind[1](1, 40)
    same.prefill(0, features(6), [1, 2])
    same.decode([0], torch.tensor([3]))
    assert torch.equal(backend.decode([0], torch.tensor([4])), same.decode([0], torch.tensor([4])))


def test_full_slots_and_bad_sizes_are_refused_and_nothing_changes(decoder, kind) -> None:
    backend = kind[1](2, 8)
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
            kind[1](slots, capacity)
    with pytest.raises(UserError, match="plain weights"):
        FusedBackend(copy.deepcopy(decoder).double(), 1, 8)
    with pytest.raises(UserError, match="torch"):
        open_backend("abacus", None, 1, 1)
