"""Memory: the plan by hand, a full machine gives one line and a plan, before and during an allocation."""

import pytest
import torch

import kinetok
from kinetok.errors import UserError
from kinetok.model.config import DecoderConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.presets import decoder_preset
from kinetok.model.pretrained import load_pretrained, own_tensors, weight_bytes
from kinetok.runtime import memory
from kinetok.runtime.backends.torch import TorchBackend

CPU = torch.device("cpu")


@pytest.fixture
def free(monkeypatch):
    """A machine with so many bytes free."""
    return lambda count: monkeypatch.setattr(memory, "bytes_available", lambda device: count)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", ["44M", "111M"])
def test_decoder_bytes_are_those_of_the_modules(size: str, tied: bool) -> None:
    config = decoder_preset(size, tie_weights=tied)
    with torch.device("meta"):
        decoder = MotionDecoder(config)
    count = sum(value.numel() for value in own_tensors(decoder).values())
    assert memory.decoder_bytes(config, "fp32") == 4 * count and memory.decoder_bytes(config, "bf16") == 2 * count
    assert memory.decoder_bytes(config, "int4") < memory.decoder_bytes(config, "int8") < 2 * count


def test_the_default_is_the_one_that_ships() -> None:
    bundle = load_pretrained(None, "cpu")
    assert bundle.decoder.config == memory.DEFAULT
    held = sum(p.numel() * 4 for net in (bundle.tokenizer, bundle.decoder) for p in net.parameters())
    assert weight_bytes(None, "cpu") == held
    half = sum(p.numel() * 2 for p in bundle.decoder.parameters())
    assert weight_bytes(None, "cpu", "bfloat16") == held - half


def test_cache_bytes_are_those_of_the_slab() -> None:
    config = DecoderConfig(n_layer=2, n_head=2, n_embd=20, codebook=30, text_dim=6, block_size=24)
    backend = TorchBackend(MotionDecoder(config).eval(), 3, 11)
    assert memory.cache_bytes(config, 3, 11, 4) == backend.slab.nbytes


def test_the_plan_degrades() -> None:
    assert [one.size for one in memory.plan(80 * 10**9)] == ["7B", "3B", "default"]
    assert [one.precision for one in memory.plan(80 * 10**9)] == ["fp32", "fp32", "fp32"]
    assert [(one.size, one.precision) for one in memory.plan(6 * 10**9)] == [
        ("7B", "int4"),
        ("3B", "int8"),
        ("default", "fp32"),
    ]
    assert [one.size for one in memory.plan(10**9)] == ["default"]
    assert memory.plan(10**6) == []
    assert len(memory.plan(30 * 10**9, 64)) < len(memory.plan(30 * 10**9, 1)) or (
        memory.plan(30 * 10**9, 64)[0].need > memory.plan(30 * 10**9, 1)[0].need
    )
    for budget in range(10**9, 40 * 10**9, 10**9):
        assert all(one.need <= budget for one in memory.plan(budget, 8))


def test_a_model_that_does_not_fit_is_refused_with_a_plan(free) -> None:
    free(10**7)
    with pytest.raises(UserError, match=r"out of memory: the model default needs 0.0.* GB, but cpu has 0.01 GB free"):
        kinetok.load(device="cpu")
    free(None)  # nobody can say: it is tried
    kinetok.load(device="cpu")


def test_a_crowd_that_does_not_fit_is_refused_at_submit(free) -> None:
    engine = kinetok.load(device="cpu", characters=4000)
    free(4 * 10**9)
    with pytest.raises(UserError, match=r"out of memory: a cache of 8000 rows.* 2162 rows fit.*what fits: 3B in int4"):
        engine.submit("a person walks forward")
    free(10**12)
    assert len(engine.generate("a person walks forward", seconds=0.4)[0]) == 12  # the engine stays usable


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_an_allocation_that_fails_is_one_line_with_a_plan(free, error) -> None:
    free(3 * 10**9)
    line = r"out of memory: it did not fit on cpu; what fits: .*default in fp32"
    with pytest.raises(UserError, match=line), memory.within_memory("it", 1, CPU):
        raise error


def test_other_errors_are_no_matter_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory.within_memory("it", 1, CPU):
        raise RuntimeError("shape mismatch")
    assert "smaller model" in memory.advice(None) and "smaller model" in memory.advice(0)


def gives_up(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14.00 GiB.")


@pytest.mark.parametrize(
    ("where", "backend", "what"),
    [
        ("kinetok.runtime.engine.load_pretrained", "torch", "the model default"),
        ("kinetok.runtime.backends.torch.torch.zeros", "torch", "a cache of 32 rows of 301 positions"),
        ("kinetok.runtime.backends.fused.FusedDecoderStep", "fused", "a packed copy of the decoder's weights"),
        ("kinetok.model.streaming.StreamingDetokenizer", "torch", "a crowd of 16 characters with 301 positions each"),
    ],
)
def test_an_allocator_that_gives_up_at_load_or_submit_is_one_line_with_a_plan(
    free, monkeypatch, where: str, backend: str, what: str
) -> None:
    free(3 * 10**9)

    def begin() -> None:
        engine = kinetok.load(device="cpu", backend=backend)
        job = engine._job("walk", kinetok.SamplingParams().resolve(engine.model.sampling), 0)
        monkeypatch.setattr(where, gives_up)
        engine._start().submit(job, "walk")

    if where.endswith("load_pretrained"):
        monkeypatch.setattr(where, gives_up)
    with pytest.raises(UserError) as caught:
        begin()
    line = str(caught.value)
    assert line.startswith(f"out of memory: {what} did not fit on cpu; what fits: ") and "default in fp32" in line
    assert "\n" not in line and "Tried" not in line


@pytest.mark.parametrize(("backend", "step"), [("torch", "decode"), ("fused", "decode_and_draw")])
def test_memory_that_runs_out_in_a_step_is_one_line_and_the_crowd_goes_on(
    soak, free, monkeypatch, backend: str, step: str
) -> None:
    free(3 * 10**9)
    engine = soak.small_engine(backend=backend)
    handle = engine.submit("walk", seconds=0.4)
    engine.step()
    crowd = engine._start().scheduler.backend
    healthy = getattr(crowd, step)
    monkeypatch.setattr(crowd, step, gives_up)
    with pytest.raises(UserError, match=r"out of memory: a step of 1 .* did not fit on cpu; what fits"):
        engine.step()
    monkeypatch.setattr(crowd, step, healthy)
    while engine.step():
        pass
    clip = engine.generate("walk", seconds=0.4)[0]
    assert abs(engine.poll(handle).motion.features - clip.features).max() < 1e-5


def test_a_crowd_that_cannot_be_made_for_another_reason_says_that_reason(soak, monkeypatch) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("no such tokenizer")

    monkeypatch.setattr("kinetok.model.streaming.StreamingDetokenizer", breaks)
    with pytest.raises(RuntimeError, match="no such tokenizer"):
        soak.small_engine(backend="torch").submit("walk")


def test_bytes_available_here() -> None:
    found = memory.bytes_available(CPU)
    assert found is None or 10**7 < found < 10**14
