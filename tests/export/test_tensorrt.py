"""Engines: TensorRT-RTX really builds them here, without a GPU; what plain TensorRT shares with it; what is refused.

Running them needs a GPU that the library supports, so nothing here says that their numbers are right.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kinetok.errors import UserError
from kinetok.export import tensorrt as module
from kinetok.export.decoder import DecoderExport, module_tensors
from kinetok.export.graph import WeightFile, check_model
from kinetok.export.precision import BLOCK, Precision, dequantize, quantize
from kinetok.export.tensorrt import Sizes, build_engine, check_targets, export_engines, library, write_graphs
from kinetok.model.config import DecoderConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.pretrained import load_pretrained
from kinetok.runtime.engines import ENGINES, check_gpu, read_engines

SIZES = Sizes(axes={"text": (1, 16, 150), "capacity": (2, 301, 301), "tokens": (1, 150, 301), "step": (1, 1, 16)})


@pytest.fixture(scope="module")
def rtx():
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13 (Linux on x86-64), which is not installed")
    return library("tensorrt-rtx")


def test_engines_of_the_default_model(rtx, tmp_path) -> None:
    model = load_pretrained(None, "cpu", "float32")
    out = export_engines(model, tmp_path / "out", kind="tensorrt-rtx", targets=["sm_86", "sm_120"], batches=[8])
    manifest = read_engines(out)
    assert set(manifest["files"]) == {
        f"{name}.engine" for name in ("prefill", "decode", "detokenize", "detokenize_stream")
    }
    assert manifest["targets"] == ["sm_86", "sm_120"] and manifest["library_version"] == rtx.__version__
    # An engine holds the weights: 3.5 million halves of the decoder.
    assert manifest["files"]["decode.engine"]["bytes"] > 6e6
    check_gpu(manifest, (8, 6))
    with pytest.raises(UserError, match=r"built for sm_86, sm_120, but this GPU is sm_89: .* --targets sm_89"):
        check_gpu(manifest, (8, 9))
    with pytest.raises(UserError, match="need an NVIDIA GPU"):
        check_gpu(manifest, None)
    data = bytearray((out / "decode.engine").read_bytes())
    data[-1] ^= 1
    (out / "decode.engine").write_bytes(data)
    with pytest.raises(UserError, match=r"decode\.engine: not the file that was exported"):
        read_engines(out)


def test_an_engine_of_one_layer_at_the_7bs_width(rtx, tmp_path) -> None:
    config = DecoderConfig(n_layer=1, n_head=32, n_embd=4096, codebook=510)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in MotionDecoder(config).state_dict().items()}
    half = Precision(name="fp16", target="tensorrt")
    export = DecoderExport(
        config=config,
        tensors=lambda name: torch.full(shapes[name], 0.01, dtype=torch.float16),
        precision=half,
        kv_dtype=half.activations,
    )
    with (tmp_path / "weights.bin").open("wb") as file:
        graph = export.decode(WeightFile(file, "weights.bin"))
    (tmp_path / "decode.onnx").write_bytes(graph.model().SerializeToString())
    capabilities = check_targets(rtx, "tensorrt-rtx", ["sm_120"])
    engine = build_engine(rtx, tmp_path / "decode.onnx", SIZES, [8], capabilities)
    assert len(engine) > 2 * sum(shape.numel() for name, shape in shapes.items() if name.startswith("blocks"))


@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4"])
def test_the_decode_step_builds_in_every_precision(rtx, decoder_of, tmp_path, dtype) -> None:
    precision = Precision(name=dtype, target="tensorrt")
    decoder = decoder_of(n_layer=1)
    export = DecoderExport(
        config=decoder.config, tensors=module_tensors(decoder), precision=precision, kv_dtype=precision.activations
    )
    with (tmp_path / "weights.bin").open("wb") as file:
        graph = export.decode(WeightFile(file, "weights.bin"))
    (tmp_path / "decode.onnx").write_bytes(graph.model().SerializeToString())
    assert build_engine(rtx, tmp_path / "decode.onnx", SIZES, [1], check_targets(rtx, "tensorrt-rtx", ["sm_86"]))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "int4"])
def test_graphs_for_tensorrt_are_standard_onnx_with_one_output_attention(model_of, tmp_path, dtype) -> None:
    import onnx

    precision = Precision(name=dtype, target="tensorrt")
    for name in write_graphs(model_of(n_embd=64), tmp_path, precision, precision.activations):
        check_model(tmp_path / f"{name}.onnx")
        nodes = onnx.load(str(tmp_path / f"{name}.onnx"), load_external_data=False).graph.node
        assert all(len(node.output) == 1 for node in nodes if node.op_type == "Attention")
        kinds = {node.op_type for node in nodes}
        if name in ("prefill", "decode"):
            assert ("DequantizeLinear" in kinds) == (dtype in ("int8", "int4"))
            assert ("Attention" in kinds) == (dtype != "fp32")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("positive", [False, True])
def test_quantised_weights_are_within_half_a_step(bits, positive) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(7, 70)
    weight[3, :BLOCK] = 0
    codes, scale = quantize(weight, bits, positive=positive)
    assert codes.shape == (7, 3, BLOCK) and codes.min() >= -(1 << (bits - 1)) and codes.max() < 1 << (bits - 1)
    assert not positive or (scale >= 0).all()
    error = (dequantize(codes, scale, 70) - weight).abs().numpy()
    # With one step fewer above than below, a number next to the largest of the other sign may be cut by one step.
    steps = np.repeat(np.abs(scale), BLOCK, axis=1)[:, :70]
    assert (error <= (0.5 if positive else 1.0) * steps + 1e-6).all()
    assert not error[3, :BLOCK].any()


def test_targets_and_packages_that_are_not_there(model_of, tmp_path, monkeypatch) -> None:
    stand_in = SimpleNamespace(ComputeCapability=SimpleNamespace(__members__={"SM86": 86, "SM120": 120, "CURRENT": 0}))
    assert check_targets(stand_in, "tensorrt-rtx", ["sm_120", "sm_86", "sm_120"]) == [120, 86]
    for targets, why in ((["sm_90"], "some of sm_120, sm_86, got 'sm_90'"), ([], "name the GPUs")):
        with pytest.raises(UserError, match=why):
            check_targets(stand_in, "tensorrt-rtx", targets)
    with pytest.raises(UserError, match="GPU of this machine"):
        check_targets(stand_in, "tensorrt", ["sm_86"])
    for kind, name in module.LIBRARIES.items():
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=rf"needs the package {kind}, .* pip install 'kinetok\[{kind}\]'"):
            export_engines(model_of(), tmp_path / "out", kind=kind, targets=["sm_86"])
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
        with pytest.raises(UserError, match="without its libraries"):
            export_engines(model_of(), tmp_path / "out", kind=kind, targets=["sm_86"])
    assert not list(tmp_path.iterdir())


def test_what_the_library_refuses_is_passed_on_and_nothing_is_written(rtx, model_of, tmp_path, monkeypatch) -> None:
    def broken(model, folder: Path, *rest):
        (folder / "decode.onnx").write_bytes(b"no graph")
        return ["decode"]

    monkeypatch.setattr(module, "write_graphs", broken)
    with pytest.raises(UserError, match=r"decode\.onnx: tensorrt_rtx .* cannot read this graph"):
        export_engines(model_of(), tmp_path / "out", kind="tensorrt-rtx", targets=["sm_86"])
    assert not list(tmp_path.iterdir())


def test_a_manifest_of_engines_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(UserError, match=r"cannot read kinetok_engines\.json"):
        read_engines(tmp_path)
    (tmp_path / ENGINES).write_text(json.dumps({"format": "kinetok-engines", "version": 9}))
    with pytest.raises(UserError, match="build the engines again"):
        read_engines(tmp_path)
