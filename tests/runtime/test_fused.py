"""The fused backend's weights, and its cache in float8: scales, who may ask for it, what it does to the model's tokens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import kinetok
from kinetok.errors import UserError
from kinetok.kernels.attention import op as attention
from kinetok.kernels.linear import op as linear
from kinetok.kernels.rotary import op as rotary
from kinetok.kernels.sampling import op as sampling
from kinetok.model.config import DecoderConfig
from kinetok.model.decode_step import FusedDecoderStep
from kinetok.model.decoder import MotionDecoder
from kinetok.model.packed import PackedLinear, Quantisation, quantise
from kinetok.model.text_minilm import PACKAGE
from kinetok.runtime.backends import open_backend
from kinetok.runtime.backends.fused import Drawn, FusedBackend, kv_scale_of, packed_step
from kinetok.runtime.backends.torch import TorchBackend
from kinetok.runtime.scheduler import Scheduler

PROMPTS = "a person walks forward", "a person dances happily while waving both arms", "someone sits down"


def test_scales_are_powers_of_two_with_room_above() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 7, 16) * torch.logspace(-6, 6, 40)[:, None, None]
    scale = kv_scale_of(x)
    assert (torch.frexp(scale).mantissa == 0.5).all()
    largest = x.abs().amax((1, 2)) / scale
    assert (largest >= 16).all() and (largest < 32).all()
    assert kv_scale_of(torch.zeros(2, 3, 4)).isfinite().all() and kv_scale_of(torch.ones(1, 1, 1) * 2).item() == 1 / 8


@pytest.fixture(scope="module")
def engine() -> kinetok.Engine:
    return kinetok.load(device="cpu", backend="fused", kv="fp8")


def test_weights_are_packed_once(engine) -> None:
    decoder = engine.model.decoder
    assert packed_step(decoder) is packed_step(decoder)
    backends = [open_backend("fused", engine.model, 1, 20, kv) for kv in ("auto", "fp8", "fp32")]
    assert [b.slab.dtype for b in backends] == [torch.float32, torch.float8_e4m3fn, torch.float32]
    assert all(b._step is packed_step(decoder) for b in backends)
    assert isinstance(decoder.blocks[0].qkv, PackedLinear)  # by load: there is no second copy
    assert backends[0]._step.layers[1].down.data is decoder.blocks[1].down.packed_words
    assert engine.describe()["parameters"] == kinetok.load(device="cpu").describe()["parameters"]


def test_a_model_loaded_for_the_fused_backend_writes_torchs_clip(engine) -> None:
    others = [kinetok.load(device="cpu", backend=name) for name in ("torch", "fused")]
    clips = [e.generate("a person walks forward", seconds=1.2, guidance=2.0, seed=5)[0].features for e in others]
    assert abs(clips[0] - clips[1]).max() < 1e-3


@pytest.mark.parametrize(("kind", "group"), [("int8", 0), ("int4", 64), ("fp8", 0)])
@pytest.mark.parametrize("tied", [False, True])
def test_quantised_words_are_used_as_they_lie(kind: str, group: int, tied: bool) -> None:
    torch.manual_seed(3)
    config = DecoderConfig(n_layer=2, n_head=2, n_embd=64, codebook=60, text_dim=8, block_size=64, tie_weights=tied)
    plain = MotionDecoder(config).eval()
    for name, value in plain.named_parameters():
        if name.endswith("scale"):
            torch.nn.init.uniform_(value, 0.5, 1.5)
    decoder = quantise(plain, Quantisation(kind=kind, group=group))
    wanted, fused = TorchBackend(decoder, 2, 30), FusedBackend(decoder, 2, 30)
    assert fused._step.layers[0].qkv is decoder.blocks[0].qkv.packed  # no second copy
    text = torch.randn(5, 8)
    torch.testing.assert_close(*(b.prefill(1, text, [3]) for b in (wanted, fused)), atol=1e-4, rtol=1e-4)
    for token in (7, 0, 59, 7):
        logits = [backend.decode([1], torch.tensor([token])) for backend in (wanted, fused)]
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("float8", [False, True])
def test_texts_prefilled_together_have_the_bits_of_texts_alone(small, float8: bool) -> None:
    decoder, texts = small
    together, alone = (FusedBackend(decoder, 4, 40, float8=float8) for _ in range(2))
    rows = [(2, texts[0], []), (0, texts[1], [5, 9, 7, 7, 1]), (3, texts[2], [4])]
    logits = together.prefill_all(rows)
    assert torch.equal(logits, torch.stack([alone.prefill(*row) for row in rows]))
    assert together.lengths == alone.lengths and torch.equal(together.slab.float(), alone.slab.float())
    wanted = TorchBackend(decoder, 4, 40)
    torch.testing.assert_close(logits, torch.stack([wanted.prefill(*row) for row in rows]), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="positions"):
        together.prefill_all([(1, texts[0], []), (0, texts[0], [1] * 36)])
    assert together.lengths == alone.lengths


def test_kv_is_refused_where_it_cannot_be(engine) -> None:
    for backend, kv, says in (("torch", "fp8", "fused"), ("fused", "bf16", "fp32"), ("fused", "int3", "auto, fp32")):
        with pytest.raises(UserError, match=f"kv: .*{says}"):
            open_backend(backend, engine.model, 1, 20, kv)
        with pytest.raises(UserError, match="kv: "):
            kinetok.Engine(engine.model, backend=backend, kv=kv).generate("walk", seconds=0.2)


@torch.inference_mode()
def test_tokens_of_the_default_model_with_a_float8_cache(engine, record_property) -> None:
    """Fed with fp32's greedy tokens: float8 chooses 97 of 100 too, and all where the best one leads by half a logit."""
    pytest.importorskip(PACKAGE, reason="prompts outside the bank need MiniLM, whose weights are not installed")
    config = engine.model.decoder.config
    backends = [FusedBackend(engine.model.decoder, 1, 80, float8=float8) for float8 in (False, True)]
    same, error, margins = [], [], []
    for prompt in PROMPTS:
        logits = [backend.prefill(0, engine._features(prompt)) for backend in backends]
        assert torch.equal(*logits)  # a text is read before it is rounded
        for _ in range(45):
            exact, near = (x[: config.codebook] for x in logits)
            best = exact.topk(2).values
            same.append(bool(near.argmax() == exact.argmax()))
            margins.append(float(best[0] - best[1]))
            error.append(float((near - exact).std() / exact.std()))
            logits = [backend.decode([0], exact.argmax()[None])[0] for backend in backends]
    agreement, worst = sum(same) / len(same), max(error)
    record_property("fp8_kv_greedy_agreement", agreement)
    record_property("fp8_kv_largest_relative_logit_error", worst)
    print(f"agreement {agreement:.3f} of {len(same)}, largest relative error of the logits {worst:.3f}")
    assert agreement >= 0.97 and 0 < worst < 0.1
    assert all(equal for equal, margin in zip(same, margins, strict=True) if margin > 0.5)


def test_clips_are_written_through_a_float8_cache(engine) -> None:
    pytest.importorskip(PACKAGE, reason="a prompt outside the bank needs MiniLM, whose weights are not installed")
    alone = engine.generate("a person walks forward", seconds=0.6, guidance=2.0, seed=3)[0]
    handle = engine.submit("a person walks forward", seconds=0.6, guidance=2.0, seed=3)
    other = engine.submit("someone sits down", seconds=0.4)
    while engine.step():
        pass
    assert len(engine.poll(other).motion) == 12
    assert abs(engine.poll(handle).motion.features - alone.features).max() < 1e-4


@pytest.fixture(scope="module")
def small() -> tuple[MotionDecoder, list[torch.Tensor]]:
    torch.manual_seed(3)
    config = DecoderConfig(n_layer=2, n_head=2, n_embd=32, codebook=60, text_dim=8, block_size=64)
    return MotionDecoder(config).eval(), [torch.randn(length, 8) for length in (5, 2, 9)]


def test_what_a_gpu_will_be_asked_holds_for_the_definitions(small, script) -> None:
    check = script("benchmarks/runtime/check_fused.py")
    found = list(check.checks(*small, steps=9))
    assert len(found) == 10 and all(finding.passed for finding in found), found
    assert check.random_events("cpu", 20).passed


def test_what_a_gpu_will_be_asked_can_be_answered_wrongly(small, script, monkeypatch) -> None:
    check = script("benchmarks/runtime/check_fused.py")
    logits = FusedDecoderStep.logits

    def leaks(self, tokens, *rest):
        """The first row sees how many others there are."""
        wrong = logits(self, tokens, *rest)
        wrong[0] += 0.5 * torch.arange(wrong.shape[1]).sin() * (len(tokens) - 1)
        return wrong

    monkeypatch.setattr(FusedDecoderStep, "logits", leaks)
    named = {finding.name: finding.passed for finding in check.checks(*small, steps=9)}
    assert not named["logits near torch's"] and not named["clips alone and in a crowd"]
    monkeypatch.undo()
    token = Drawn.token
    monkeypatch.setattr(Drawn, "token", lambda self, slot: (token(self, slot) + 1) % 60)
    assert not check.device_draws_as_the_host(*small, 9).passed


def test_a_gpus_way_through_the_registered_operators_gives_the_same_clips(small, script, monkeypatch) -> None:
    check = script("benchmarks/runtime/check_fused.py")
    decoder, texts = small

    def clips() -> list[list[int]]:
        made = check.jobs(texts, 9)
        crowd = Scheduler(FusedBackend(decoder, 8, 30, float8=True), decoder.config, len(made))
        return [character.tokens for character in check._run(crowd, made, every=1)]

    by_definition, called = clips(), set()
    for family in (rotary, attention, linear, sampling):
        monkeypatch.setattr(family, "takes_op", lambda *_, family=family: called.add(family) or True)
    assert clips() == by_definition and len(called) == 4


@pytest.mark.usefixtures("interpreted_loops")
@pytest.mark.parametrize("float8", [False, True])
def test_the_kernels_write_the_clips_of_their_definitions(small, script, monkeypatch, float8: bool) -> None:
    """Crowds through the launchers: on a GPU compiled, elsewhere under the interpreter; views, holes and reach included."""
    check = script("benchmarks/runtime/check_fused.py")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    decoder = MotionDecoder(replace(small[0].config, n_layer=1)).eval().to(device)
    texts = [text.to(device) for text in small[1]]

    def clips() -> list[list[int]]:
        made = check.jobs(texts, 5)[:3]  # the interpreter takes a millisecond a program
        crowd = Scheduler(FusedBackend(decoder, 5, 30, float8=float8), decoder.config, len(made))
        return [character.tokens for character in check._run(crowd, made, every=1)]

    def counted(name: str, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: launched.add(name) or kernel(*args)  # type: ignore[func-returns-value]

    launched: set[str] = set()
    by_definition = clips()
    for family, name in (
        (rotary, "apply_rotary"),
        (rotary, "rotary_kv_write"),
        (attention, "prefix_attention"),
        (attention, "decode_attention"),
        (linear, "packed_linear"),
        (sampling, "sample_step"),
        (sampling, "greedy_step"),
    ):
        kernels = pytest.importorskip(f"{family.__name__.rpartition('.')[0]}.triton", reason="triton is not installed")
        monkeypatch.setattr(family, "takes_op", lambda *_: True)
        monkeypatch.setattr(family, f"_{name}", counted(name, getattr(kernels, name)))
    assert clips() == by_definition and len(launched) == 7


class StandInGraph:
    """A graph as CUDA's: what is captured does not run, and each replay runs it on the tensors of the capture."""

    pending: Callable[[], Tensor]  # what is about to be captured
    call: Callable[[], Tensor]


@contextmanager
def unseen(backend: FusedBackend) -> Iterator[None]:
    """What runs inside leaves no trace in a backend."""
    state = backend._state
    held = [backend._tokens, backend._at, backend.slab, *(getattr(state, field.name) for field in fields(state))]
    before = [x.clone() for x in held]
    yield
    for x, old in zip(held, before, strict=True):
        x.copy_(old)


@pytest.mark.parametrize(("float8", "warm"), [(False, False), (True, False), (False, True)])
def test_captured_and_replayed_steps_write_the_same_clips(small, script, monkeypatch, float8: bool, warm: bool) -> None:
    """The order of warm-up, capture and replay, with a stand-in for CUDA's graphs and streams. warm: all are captured before
    the first step, and none in the middle of the crowd."""
    check = script("benchmarks/runtime/check_fused.py")
    decoder, texts = small
    monkeypatch.setattr("kinetok.runtime.backends.fused.LEAST_REACH", 8)

    def clips(backend: FusedBackend) -> list[list[int]]:
        made = check.jobs(texts, 9)
        return [c.tokens for c in check._run(Scheduler(backend, decoder.config, len(made)), made, every=1)]

    by_calls, captured = (FusedBackend(decoder, 9, 30, float8=float8) for _ in range(2))
    of_key, graphs = captured._captured, []

    def told(key: object, call: Callable[[], Tensor]) -> Tensor:
        StandInGraph.pending = staticmethod(call)
        return of_key(key, call)

    def capture(graph: StandInGraph, **_: object) -> object:
        graph.call = graph.pending
        graphs.append(graph)
        return unseen(captured)

    class Cuda:
        CUDAGraph, graph = StandInGraph, staticmethod(capture)
        stream = staticmethod(nullcontext)
        Stream = current_stream = staticmethod(lambda *_: SimpleNamespace(wait_stream=lambda *_: None))

    class Torch:
        cuda = Cuda

        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

    monkeypatch.setattr("kinetok.runtime.backends.fused.torch", Torch())
    monkeypatch.setattr(captured, "_pool", object())
    monkeypatch.setattr(captured, "_sent", lambda numbers: torch.tensor(numbers, dtype=torch.int64))
    monkeypatch.setattr(captured, "_captured", told)
    replays = []

    def replay(graph: StandInGraph) -> None:
        replays.append(graph)
        result = next(result for one, result in captured._graphs.values() if one is graph)
        with torch.inference_mode():
            result.copy_(graph.call())

    monkeypatch.setattr(StandInGraph, "replay", replay, raising=False)
    by_calls.warm_up()
    if warm:
        captured.warm_up()
    before = set(captured._graphs)
    assert clips(captured) == clips(by_calls) and not by_calls._graphs
    assert {key[0] for key in captured._graphs} >= {"greedy", "plain", "guided"}
    assert len(graphs) == len(captured._graphs) and len(set(map(id, replays))) <= len(graphs) and replays
    if warm:
        sizes = {(rows, reach) for rows in (1, 2, 4, 8, 9) for reach in (8, 16, 30)}
        unguided = {(kind, *size) for kind in ("greedy", "plain") for size in sizes}
        assert before == unguided | {("guided", *size) for size in sizes if size[0] > 1} == set(captured._graphs)
