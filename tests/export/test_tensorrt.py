"""Engines: TensorRT-RTX really builds them here, without a GPU; what plain TensorRT shares with it; what is refused.

Running them needs a GPU that the library supports, so nothing here says that their numbers are right; that the graphs they
are built from compute the decoder is shown by ONNX Runtime.
"""

import dataclasses
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from kinetok.errors import UserError
from kinetok.export import tensorrt as module
from kinetok.export.engine_builder import EngineBuilder, Sizes
from kinetok.export.tensorrt import OPSET, TIMINGS, check_targets, export_engines, write_graphs
from kinetok.model.config import DecoderConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.graphs.builder import BFLOAT16, WeightFile, check_model
from kinetok.model.graphs.decoder import DecoderExport, module_tensors
from kinetok.model.graphs.precision import TENSORRT_PRECISIONS, Precision, dequantize, quantize
from kinetok.model.pretrained import load_pretrained
from kinetok.runtime.engines import LIBRARIES, library, log_into, read_engines

SIZES = Sizes(axes={"text": (1, 16, 150), "tokens": (1, 150, 301), "step": (1, 1, 16)})


@pytest.fixture(scope="module")
def rtx():
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13 (Linux on x86-64), which is not installed")
    return library("tensorrt-rtx", "this test")


def builder(rtx, target: str, *batches: int) -> EngineBuilder:
    capabilities = list(check_targets(rtx, "tensorrt-rtx", [target]).values())
    return EngineBuilder(trt=rtx, sizes=SIZES, batches=batches, capabilities=capabilities)


def test_engines_of_the_default_model(rtx, tmp_path) -> None:
    model = load_pretrained(None, "cpu", "float32")
    told = []
    export_engines(
        model,
        tmp_path / "out",
        kind="tensorrt-rtx",
        targets=["sm_86", "sm_120", "sm_86"],
        batches=[8],
        progress=lambda *about: told.append(about),
    )
    assert told[0] == (0, 4, "building prefill") and told[-1] == (3, 4, "building detokenize_stream")
    engines = read_engines(tmp_path / "out")
    manifest = engines.manifest
    assert set(manifest["files"]) == {
        f"{name}.engine" for name in ("prefill", "decode", "detokenize", "detokenize_stream")
    }
    assert manifest["targets"] == ["sm_86", "sm_120"] and manifest["library_version"] == rtx.__version__
    assert manifest["positions"] == 301 and manifest["kv_dtype"] == "float16" and manifest["timing_cache"] is None
    # An engine holds the weights: 3.5 million halves of the decoder.
    assert manifest["files"]["decode.engine"]["bytes"] > 6e6
    engines.check_library(rtx)
    engines.check_gpu((8, 6))
    engines.check_decoder(model.decoder.config)
    # The library itself takes the file for one of its engines (and reads no further without a GPU).
    runtime = rtx.Runtime(log_into(rtx, []))
    malformed = int(rtx.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
    for data, whole in ((engines.engine("decode").read_bytes()[:4096], True), (b"\1" * 4096, False)):
        assert bool(runtime.get_engine_validity(data)[1] & malformed) != whole


def test_an_engine_of_two_layers_at_the_7bs_width(rtx, tmp_path) -> None:
    config = DecoderConfig(n_layer=2, n_head=32, n_embd=4096, codebook=510)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in MotionDecoder(config).state_dict().items()}
    half = Precision(name="fp16", target="tensorrt")
    export = DecoderExport(
        config=config,
        tensors=lambda name: torch.full(shapes[name], 0.01, dtype=torch.float16),
        precision=half,
        kv_dtype=half.activations,
        opset=OPSET,
        capacity=301,
    )
    with (tmp_path / "weights.bin").open("wb") as file:
        graph = export.decode(WeightFile(file, "weights.bin"))
    (tmp_path / "decode.onnx").write_bytes(graph.model().SerializeToString())
    engine = builder(rtx, "sm_120", 8).build(tmp_path / "decode.onnx")
    # Both layers hold the same numbers, which the library keeps once.
    assert len(engine) > 2 * sum(shape.numel() for name, shape in shapes.items() if name.startswith("blocks.0."))


def decoder_graphs(decoder: MotionDecoder, dtype: str, folder: Path, capacity: int = 32) -> None:
    precision = Precision(name=dtype, target="tensorrt")
    export = DecoderExport(
        config=decoder.config,
        tensors=module_tensors(decoder),
        precision=precision,
        kv_dtype=precision.activations,
        opset=OPSET,
        capacity=capacity,
    )
    with (folder / "weights.bin").open("wb") as file:
        weights = WeightFile(file, "weights.bin")
        for graph in (export.prefill(weights), export.decode(weights)):
            (folder / f"{graph.name}.onnx").write_bytes(graph.model().SerializeToString())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
def test_prefill_and_decode_build_in_every_precision(rtx, decoder_of, tmp_path, dtype) -> None:
    decoder_graphs(decoder_of(n_layer=1), dtype, tmp_path)
    one = builder(rtx, "sm_89", 1)
    for name in ("prefill", "decode"):
        assert one.build(tmp_path / f"{name}.onnx")


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("fp16", 4e-3), ("int8", 1e-2), ("int4", 1e-2)])
def test_the_graphs_compute_the_decoder(decoder_of, tmp_path, dtype, tolerance) -> None:
    """ONNX Runtime on TensorRT's graphs: two texts of unequal length, then two tokens each, into a cache of fixed length."""
    import onnxruntime

    decoder = decoder_of()
    config = decoder.config
    bits = Precision(name=dtype, target="tensorrt").bits
    for name, weight in decoder.named_parameters() if bits else ():
        # As they will be stored, so that what is left to differ is the arithmetic; a head keeps 8 bits.
        if (name.startswith("blocks") and weight.ndim == 2) or name == "head.weight":
            stored = quantize(weight, bits if name.startswith("blocks") else 8, positive=True)
            weight.copy_(dequantize(*stored, weight.shape[1]))
    decoder_graphs(decoder, dtype, tmp_path)
    lengths, tokens = [5, 3], [[7, 239], [0, 100]]
    text = torch.randn(2, 5, config.text_dim, generator=torch.Generator().manual_seed(0))
    kind = Precision(name=dtype, target="tensorrt").activations
    shape = (2, config.n_head, 32, config.head_dim)
    cache = {
        f"past_key_values.{i}.{part}": np.zeros(shape, kind) for i in range(config.n_layer) for part in ("key", "value")
    }
    feeds = {"text_features": text.numpy(), "text_lengths": np.array(lengths)}
    for step in range(3):
        path = tmp_path / ("decode.onnx" if step else "prefill.onnx")
        graph = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [value.name for value in graph.get_outputs()]
        results = dict(zip(names, graph.run(names, {**feeds, **cache}), strict=True))
        for row, length in enumerate(lengths):
            ids = torch.tensor([[config.pad_id] * length + tokens[row][:step]])
            wanted = decoder(ids, text[row : row + 1, :length], torch.ones(1, length))[0, -1].numpy()
            scale = np.abs(wanted).max()
            np.testing.assert_allclose(results["logits"][row], wanted, atol=tolerance * scale, rtol=0)
        cache = {name: results[name.replace("past_key_values", "present")] for name in cache}
        feeds = {
            "input_ids": np.array([[row[min(step, 1)]] for row in tokens]),
            "position_ids": np.array([[length + step] for length in lengths]),
        }


@pytest.mark.parametrize("dtype", TENSORRT_PRECISIONS)
def test_graphs_for_tensorrt_are_standard_onnx_with_one_output_attention(model_of, tmp_path, dtype) -> None:
    import onnx

    precision = Precision(name=dtype, target="tensorrt")
    for name in write_graphs(model_of(n_embd=64), tmp_path, precision, 24):
        check_model(tmp_path / f"{name}.onnx")
        graph = onnx.load(str(tmp_path / f"{name}.onnx"), load_external_data=False).graph
        assert all(len(node.output) == 1 for node in graph.node if node.op_type == "Attention")
        kinds = {node.op_type for node in graph.node}
        if name in ("prefill", "decode"):
            assert ("DequantizeLinear" in kinds) == (dtype in ("int8", "int4"))
            assert ("Attention" in kinds) == (dtype != "fp32")
            assert "TensorScatter" in kinds and "ScatterND" not in kinds
            past = next(value for value in graph.input if value.name == "past_key_values.0.key")
            assert past.type.tensor_type.shape.dim[2].dim_value == 24


def test_bf16_weights_are_torchs(decoder_of, tmp_path) -> None:
    import onnx

    decoder = decoder_of()
    decoder_graphs(decoder, "bf16", tmp_path)
    model = onnx.load(str(tmp_path / "decode.onnx"))
    stored = next(value for value in model.graph.initializer if value.name == "blocks.1.down.weight")
    values = onnx.numpy_helper.to_array(stored)
    assert values.dtype == BFLOAT16
    wanted = decoder.blocks[1].down.weight.detach().T.bfloat16().float().numpy()
    np.testing.assert_array_equal(values.astype(np.float32), wanted)


@pytest.fixture
def plain(rtx, monkeypatch) -> ModuleType:
    """TensorRT-RTX in the place of TensorRT: the same calls, and sm_86 in place of the GPU of this machine."""

    class Builder(rtx.Builder):
        def create_builder_config(self):
            config = super().create_builder_config()
            config.num_compute_capabilities = 1
            config.set_compute_capability(rtx.ComputeCapability.SM86, 0)
            return config

    stand_in = ModuleType("tensorrt")
    vars(stand_in).update({name: value for name, value in vars(rtx).items() if name != "__name__"}, Builder=Builder)
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    return stand_in


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_tensorrt_goes_through_the_same_builder_and_keeps_its_timings(plain, model_of, tmp_path, monkeypatch) -> None:
    model, out = model_of(n_layer=1), tmp_path / "out"
    written = module.write_graphs
    monkeypatch.setattr(module, "write_graphs", lambda *about: written(*about)[1:2])  # the decode step says enough
    first = export_engines(model, out, kind="tensorrt", batches=[1])
    assert first["library"] == "tensorrt" and first["targets"] == ["sm_86"]
    size = (out / TIMINGS).stat().st_size
    assert size and first["timing_cache"] == {"reused_bytes": 0, "bytes": size}
    assert first["files"][TIMINGS]["bytes"] == size
    again = export_engines(model, out, kind="tensorrt", batches=[1])
    assert again["timing_cache"]["reused_bytes"] == size
    monkeypatch.setattr(plain, "__version__", "12.0")
    newer = export_engines(model, out, kind="tensorrt", batches=[1])
    assert newer["timing_cache"]["reused_bytes"] == 0


def test_timings_of_another_gpu_are_not_used() -> None:
    class Config:
        used: bytes | None = None

        def create_timing_cache(self, data):
            return SimpleNamespace(data=data)

        def set_timing_cache(self, cache, ignore_mismatch):
            if cache.data == b"theirs":
                return False
            self.used = cache.data
            return True

    for given, used, reused in ((b"ours", b"ours", 4), (b"theirs", b"", 0), (b"", b"", 0)):
        one, config = EngineBuilder(trt=None, sizes=SIZES, batches=[1], capabilities=[], timing=given), Config()
        assert one._timings(config).data == config.used == used and one.reused == reused


def test_targets_and_packages_that_are_not_there(model_of, tmp_path, monkeypatch) -> None:
    stand_in = SimpleNamespace(ComputeCapability=SimpleNamespace(__members__={"SM86": 86, "SM120": 120, "CURRENT": 0}))
    found = check_targets(stand_in, "tensorrt-rtx", ["sm_120", "sm_86", "sm_120"])
    assert found == {"sm_120": 120, "sm_86": 86} and list(found) == ["sm_120", "sm_86"]
    for targets, why in ((["sm_90"], "some of sm_120, sm_86, got 'sm_90'"), ([], "name the GPUs")):
        with pytest.raises(UserError, match=why):
            check_targets(stand_in, "tensorrt-rtx", targets)
    with pytest.raises(UserError, match="GPU of this machine; name targets with tensorrt-rtx"):
        check_targets(stand_in, "tensorrt", ["sm_86"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees none"):
        check_targets(stand_in, "tensorrt", [])
    for kind, name in LIBRARIES.items():
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=rf"needs the package {kind}, .* pip install 'kinetok\[{kind}\]'"):
            export_engines(model_of(), tmp_path / "out", kind=kind, targets=["sm_86"])
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
        with pytest.raises(UserError, match="without its libraries"):
            export_engines(model_of(), tmp_path / "out", kind=kind, targets=["sm_86"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtype": "fp8"}, "dtype: expected one of fp32, fp16, bf16, int8, int4, got 'fp8'"),
        ({"batches": []}, "batches: expected positive numbers"),
        ({"batches": [8, 0]}, "batches: expected positive numbers"),
        ({"positions": 1}, "positions: expected 2 to 40, got 1"),
        ({"positions": 41}, "positions: expected 2 to 40, got 41"),
    ],
)
def test_options_that_cannot_be(model_of, tmp_path, options, why) -> None:
    with pytest.raises(UserError, match=why):
        export_engines(model_of(), tmp_path / "out", kind="tensorrt-rtx", targets=["sm_86"], **options)
    assert not list(tmp_path.iterdir())


def test_what_the_library_refuses_is_passed_on_and_nothing_is_written(rtx, model_of, tmp_path, monkeypatch) -> None:
    def broken(model, folder: Path, *rest):
        (folder / "decode.onnx").write_bytes(b"no graph")
        return ["decode"]

    monkeypatch.setattr(module, "write_graphs", broken)
    with pytest.raises(UserError, match=r"decode\.onnx: tensorrt_rtx .* cannot read this graph") as caught:
        export_engines(model_of(), tmp_path / "out", kind="tensorrt-rtx", targets=["sm_86"])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_width_that_blocks_do_not_divide(rtx, model_of, tmp_path) -> None:
    model = dataclasses.replace(model_of(n_embd=48, n_head=2))
    with pytest.raises(UserError, match="4-bit weights need a width that is a multiple of 32, got 48"):
        export_engines(model, tmp_path / "out", kind="tensorrt-rtx", dtype="int4", targets=["sm_86"])
    assert not list(tmp_path.iterdir())
