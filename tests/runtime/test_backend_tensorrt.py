"""TensorRT's backend with a stand-in for the library: what goes where, which profile serves, what is refused.

What every backend promises is in test_backends.py. The real library is asked only to refuse, and, where there is a GPU that
it supports, to agree with torch.
"""

import importlib.util
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kinetok.errors import UserError
from kinetok.model.decoder import MotionDecoder
from kinetok.runtime import Engine
from kinetok.runtime.backends import BACKENDS, open_backend
from kinetok.runtime.backends.tensorrt import (
    BoundEngine,
    CompiledKernels,
    SideStream,
    TensorRTBackend,
    torch_dtype,
)
from kinetok.runtime.backends.torch import TorchBackend
from kinetok.runtime.engines import read_engines

CPU = torch.device("cpu")


def features(length: int) -> torch.Tensor:
    return torch.randn(length, 8, generator=torch.Generator().manual_seed(length))


@pytest.fixture(scope="module")
def engines(stand_in_engines, small_model):
    return stand_in_engines(small_model.decoder)


@pytest.fixture
def opened(stand_in, engines):
    """Makes a backend of (slots, capacity) whose stream has the handle 7."""

    def make(slots: int, capacity: int = 40, which=engines) -> TensorRTBackend:
        return TensorRTBackend(stand_in, which, slots, capacity, CPU, "sm_86", lambda enqueue: enqueue(7))

    return make


def the_engine(backend: TensorRTBackend, name: str) -> BoundEngine:
    return {"prefill": backend._bind_prefill, "decode": backend._step.bind}[name].__self__


def runs(engine: BoundEngine) -> dict[int, list[int]]:
    """Rows of each call, by profile."""
    return {index: [rows for rows, _ in made.context.runs] for index, made in sorted(engine.contexts.items())}


def test_calls_go_through_the_smallest_profile_that_takes_them(opened) -> None:
    backend = opened(6)
    backend._step.batched = True
    decode, prefill = the_engine(backend, "decode"), the_engine(backend, "prefill")
    for made in decode.contexts.values():
        made.context.runs.clear()
    for slot in range(6):
        backend.prefill(slot, features(slot + 1))
    assert runs(prefill) == {0: [1] * 6}
    backend.decode([3], torch.tensor([1]))
    backend.decode([4, 1, 0, 2], torch.tensor([1, 2, 3, 4]))
    assert runs(decode) == {0: [1, 1], 1: [3]}
    backend.decode([5, 4, 3, 2, 1, 0], torch.arange(6))  # at most four a call
    assert runs(decode) == {0: [1, 1], 1: [3, 4, 2]}
    assert {stream for made in decode.contexts.values() for _, stream in made.context.runs} == {7}


def test_tensors_are_bound_once(opened) -> None:
    backend = opened(4)
    backend._step.batched = True
    for slot in range(4):
        backend.prefill(slot, features(3))
    backend.decode([0, 1, 2, 3], torch.arange(4))
    context = the_engine(backend, "decode").contexts[1].context
    bindings = context.bindings
    for _ in range(5):
        backend.decode([2, 0, 1, 3], torch.arange(4))
    assert context.bindings == bindings
    backend.decode([0, 1], torch.arange(2))  # other rows: other places
    assert context.bindings > bindings


def test_shapes_that_no_profile_takes(opened) -> None:
    backend = opened(1)
    prefill = the_engine(backend, "prefill")
    cache = {name: (1, 2, 64, 96) for name in prefill.inputs if name.startswith("past")}
    assert prefill.profile({"text_features": (1, 9, 8), "text_lengths": (1,), **cache}) == 0
    assert (
        prefill.profile({"text_features": (4, 9, 8), "text_lengths": (4,), **{n: (4, 2, 64, 96) for n in cache}}) == 1
    )
    with pytest.raises(
        UserError, match=r"prefill: no profile takes text_features .* \[1, 64, 8\], the largest is \[4, 63, 8\]"
    ):
        prefill.profile({"text_features": (1, 64, 8), "text_lengths": (1,), **cache})
    with pytest.raises(UserError, match=r"no profile takes past_key_values\.0\.key .* --positions"):
        prefill.profile({"text_features": (1, 9, 8), "text_lengths": (1,), **{n: (1, 2, 32, 96) for n in cache}})


def test_tensors_that_are_not_the_engines(opened) -> None:
    decode = the_engine(opened(1), "decode")
    tensors = {
        name: torch.zeros([size if isinstance(size, int) else 1 for size in value.shape], dtype=decode.dtypes[name])
        for name, value in decode.engine.values.items()
    }
    for output, source in decode.same.items():
        tensors[output] = tensors[source]
    decode.bind(tensors)()
    with pytest.raises(UserError, match=r"decode: input_ids is torch\.int64 in the engine, got torch\.int32"):
        decode.bind({**tensors, "input_ids": tensors["input_ids"].int()})
    for logits in (torch.zeros(1, 4000), torch.zeros(1, 1, 4376)):
        with pytest.raises(UserError, match=r"decode: logits is \[-1, 4376\] in the engine, and its manifest makes it"):
            decode.bind({**tensors, "logits": logits})
    for names in ({**tensors, "past_key_values.2.key": tensors["logits"]}, {**tensors, "logits": None}):
        with pytest.raises(UserError, match=r"decode: (logits|past_key_values\.2\.key) is not both in the engine"):
            decode.bind({name: value for name, value in names.items() if value is not None})
    apart = {**tensors, "present.1.value": tensors["present.1.value"].clone()}
    with pytest.raises(AssertionError):
        decode.bind(apart)


def test_a_call_that_fails_leaves_every_slot_as_it_was(opened) -> None:
    backend = opened(2)
    for slot in range(2):
        backend.prefill(slot, features(4))
    wanted = backend.decode([0, 1], torch.tensor([5, 6]))
    for slot in range(2):
        backend.prefill(slot, features(4))
    engine = the_engine(backend, "decode").engine
    engine.broken = True
    with pytest.raises(RuntimeError, match="engine decode did not run: out of luck"):
        backend.decode([0, 1], torch.tensor([5, 6]))
    engine.broken = False
    assert backend.lengths == [4, 4]
    assert torch.equal(backend.decode([0, 1], torch.tensor([5, 6])), wanted)


def test_what_was_compiled_is_kept_for_the_next_start(
    opened, stand_in_engines, small_model, stand_in, monkeypatch
) -> None:
    engines = stand_in_engines(small_model.decoder)
    path = engines.directory / "sm_86.runtime.cache"
    assert opened(1, which=engines).compiled.state == "sm_86.runtime.cache: new"
    assert path.read_bytes() == stand_in.KERNELS
    read_engines(engines.directory)  # still whole
    before = path.stat().st_mtime_ns
    assert opened(1, which=engines).compiled.state == f"sm_86.runtime.cache: {len(stand_in.KERNELS)} bytes reused"
    assert path.stat().st_mtime_ns == before
    path.write_bytes(b"of another driver")  # the library refuses it
    assert opened(1, which=engines).compiled.state == "sm_86.runtime.cache: new"
    assert path.read_bytes() == stand_in.KERNELS
    path.unlink()

    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    state = opened(1, which=engines).compiled.state
    assert state.startswith("sm_86.runtime.cache: new, not kept (cannot write") and not path.exists()


def test_tensorrt_itself_has_no_such_cache(tmp_path) -> None:
    compiled = CompiledKernels(SimpleNamespace(), tmp_path, "sm_90")
    assert compiled.context(SimpleNamespace(create_execution_context=lambda: "a context")) == "a context"
    compiled.save()
    assert compiled.state.startswith("none") and not list(tmp_path.iterdir())


def test_manifests_and_files_that_are_not_usable(opened, engines, stand_in_engines, small_model) -> None:
    for changes in (
        {"positions": None},
        {"positions": "64"},
        {"positions": -1},
        {"kv_dtype": "int8"},
        {"kv_dtype": ["float16"]},
    ):
        with pytest.raises(UserError, match="expected positions to be a whole number and kv_dtype one of"):
            opened(1, which=replace(engines, manifest={**engines.manifest, **changes}))
    with pytest.raises(UserError, match=r"hold 64 positions, and 65 are asked for: .* --positions 65"):
        opened(1, capacity=65)
    half = stand_in_engines(small_model.decoder, "fp16")
    with pytest.raises(UserError, match=r"past_key_values.* is torch\.float16 in the engine, got torch\.float32"):
        opened(1, which=replace(half, manifest={**half.manifest, "kv_dtype": "float32"}))
    damaged = stand_in_engines(small_model.decoder)
    damaged.engine("decode").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"decode\.engine: .* cannot load this engine: the magic tag does not match"):
        opened(1, which=damaged)


def test_types_of_the_library(stand_in) -> None:
    assert torch_dtype(stand_in, stand_in.DataType.BF16) is torch.bfloat16
    with pytest.raises(UserError, match="a tensor of type FP8"):
        torch_dtype(stand_in, "FP8")


def test_the_side_stream_keeps_to_the_current_streams_order(monkeypatch) -> None:
    order: list[tuple[str, ...]] = []

    class Stream:
        def __init__(self, device, name="side", handle=99):
            self.device, self.name, self.cuda_stream = device, name, handle

        def wait_stream(self, other):
            order.append((self.name, "waits for", other.name))

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(None, "current", 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(order.append(("on", str(device)))))
    launch = SideStream(torch.device("cuda:1"))
    assert not launch(lambda handle: order.append(("launched on", str(handle))))
    waits = [("side", "waits for", "current"), ("launched on", "99"), ("current", "waits for", "side")]
    assert order == [("on", "cuda:1"), *waits]


def test_opening_by_name(stand_in_engines, stand_in, small_model, monkeypatch) -> None:
    engines = stand_in_engines(small_model.decoder)
    name = f"tensorrt:{engines.directory}"
    with pytest.raises(UserError, match="make them with kinetok export tensorrt-rtx"):
        open_backend("tensorrt", small_model, 1, 20)
    with pytest.raises(UserError, match="holds no engines"):
        open_backend("tensorrt:/nowhere", small_model, 1, 20)
    other = MotionDecoder(replace(small_model.decoder.config, n_layer=1)).eval()
    with pytest.raises(UserError, match="another model"):
        open_backend(name, replace(small_model, decoder=other), 1, 20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="need an NVIDIA GPU, and torch sees none"):
        open_backend(name, small_model, 1, 20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with pytest.raises(UserError, match=r"built for sm_86, sm_120, but this GPU is sm_90"):
        open_backend(name, small_model, 1, 20)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", stand_in)
    with pytest.raises(UserError, match="the model is on cpu: load it with the device cuda"):
        open_backend(name, small_model, 1, 20)
    monkeypatch.setattr(stand_in, "__version__", "1.1")
    with pytest.raises(UserError, match=r"built by tensorrt-rtx 1\.0, but 1\.1 is installed"):
        open_backend(name, small_model, 1, 20)


def test_an_engine_generates_the_clips_of_torch(opened, small_model, monkeypatch) -> None:
    monkeypatch.setitem(BACKENDS, "tensorrt", lambda model, slots, capacity, folder: opened(slots, capacity))
    clips = []
    for backend in ("torch", "tensorrt:engines"):
        engine = Engine(small_model, backend=backend)
        monkeypatch.setattr(engine, "_features", lambda text: features(max(1, len(text.split()))))
        clips.append(engine.generate("a person walks", seconds=4, guidance=2.0, temperature=1.0))
    for ours, theirs in zip(*clips, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours.root), torch.from_numpy(theirs.root), atol=1e-5, rtol=0)
        assert len(ours.root) == len(theirs.root)


def test_engines_shorter_than_the_model(stand_in_engines, small_model, opened, monkeypatch) -> None:
    short = stand_in_engines(small_model.decoder, positions=30)
    monkeypatch.setitem(BACKENDS, "tensorrt", lambda model, slots, capacity, folder: opened(slots, capacity, short))
    whole = Engine(small_model, backend="tensorrt:short")
    monkeypatch.setattr(Engine, "_features", lambda self, text: features(5))
    with pytest.raises(UserError, match="hold 30 positions, and 64 are asked for"):
        whole.generate("a person walks")
    engine = Engine(small_model, backend="tensorrt:short", positions=30)
    (clip,) = engine.generate("a person walks", seconds=600)
    assert len(clip.root) > 4 * 25  # longer than the cache: the window goes on by the newest tokens


def gpu_kind() -> str:
    """The library that could run engines here; skips, saying why, where none can."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, and torch sees none")
    found = [kind for kind in ("tensorrt-rtx", "tensorrt") if importlib.util.find_spec(kind.replace("-", "_"))]
    if not found:
        pytest.skip("needs the package tensorrt-rtx-cu13 or tensorrt")
    return found[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("fp16", 2e-2)])
def test_a_gpus_engines_agree_with_torch(small_model, tmp_path, dtype, tolerance) -> None:
    kind = gpu_kind()
    pytest.importorskip("onnx", reason="needs the extra 'onnx'")
    from kinetok.export.tensorrt import export_engines

    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    options = {"targets": [target]} if kind == "tensorrt-rtx" else {}
    export_engines(small_model, tmp_path / "out", kind=kind, dtype=dtype, batches=[1, 4], **options)
    on_gpu = replace(small_model, decoder=MotionDecoder(small_model.decoder.config).eval().cuda())
    on_gpu.decoder.load_state_dict(small_model.decoder.state_dict())
    ours, theirs = open_backend(f"tensorrt:{tmp_path / 'out'}", on_gpu, 6, 40), TorchBackend(on_gpu.decoder, 6, 40)
    for slot in range(6):
        texts = [backend.prefill(slot, features(slot + 1)) for backend in (ours, theirs)]
        torch.testing.assert_close(*texts, atol=tolerance, rtol=0)
    for slots in ([3], [0, 1, 2, 3, 4, 5], [5, 2]):
        tokens = torch.tensor(slots, device="cuda") * 7
        torch.testing.assert_close(ours.decode(slots, tokens), theirs.decode(slots, tokens), atol=tolerance, rtol=0)
    again = open_backend(f"tensorrt:{tmp_path / 'out'}", on_gpu, 6, 40)
    assert kind == "tensorrt" or "reused" in again.compiled.state
    fresh = again.prefill(0, features(1))
    ours.prefill(5, features(1))
    assert torch.equal(fresh, ours.prefill(0, features(1)))
