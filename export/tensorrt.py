"""TensorRT and TensorRT-RTX engines from the same ONNX graphs (docs/tensorrt.md), by one builder."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kinetok.errors import UserError
from kinetok.export.bundle import check_original, decoder_facts
from kinetok.export.engine_builder import EngineBuilder, Sizes
from kinetok.files import whole_directory
from kinetok.model.bank import MAX_FEATURES
from kinetok.model.graphs.builder import WeightFile
from kinetok.model.graphs.decoder import DecoderExport, module_tensors
from kinetok.model.graphs.detokenizer import DetokenizerExport
from kinetok.model.graphs.precision import Precision
from kinetok.model.pretrained import ModelBundle
from kinetok.model.streaming import whole_clip_reason
from kinetok.runtime.backends.tensorrt import COMPILED
from kinetok.runtime.bundle import file_digest, only_holds, probe
from kinetok.runtime.engines import ENGINES, FORMAT, VERSION, library, read_engines

BATCHES = (1, 8, 64)
OPSET = 24  # has TensorScatter
STREAMED_TOKENS = 16
TIMINGS = "timing.cache"


def check_targets(trt: Any, kind: str, targets: Sequence[str]) -> dict[str, Any]:
    """Names such as sm_86, and the library's compute capability of each; tensorrt has this machine's GPU alone: None.

    Raises ``UserError`` for names that the library does not know, and for tensorrt where there is no GPU.
    """
    if kind == "tensorrt":
        if targets:
            raise UserError("--targets: tensorrt builds for the GPU of this machine; name targets with tensorrt-rtx")
        if not torch.cuda.is_available():
            raise UserError("tensorrt builds for the GPU of this machine, and torch sees none: use tensorrt-rtx")
        return {"sm_{}{}".format(*torch.cuda.get_device_capability()): None}
    known = {f"sm_{name[2:]}": value for name, value in trt.ComputeCapability.__members__.items() if name[:2] == "SM"}
    if not targets:
        raise UserError(f"--targets: name the GPUs to build for, some of {', '.join(sorted(known))}")
    for target in targets:
        if target not in known:
            raise UserError(f"--targets: expected some of {', '.join(sorted(known))}, got {target!r}")
    return {target: known[target] for target in targets}


def write_graphs(model: ModelBundle, folder: Path, precision: Precision, positions: int) -> list[str]:
    """The graphs as TensorRT's parsers take them; returns their names.

    The cache, ``positions`` long, is written outside ``Attention``, whose second output the parsers refuse, and in place;
    integer weights are DequantizeLinear in blocks; fp32 attention is spelt out.
    """
    export = DecoderExport(
        config=model.decoder.config,
        tensors=module_tensors(model.decoder),
        precision=precision,
        kv_dtype=precision.activations,
        opset=OPSET,
        capacity=positions,
    )
    detokenizer = DetokenizerExport(tokenizer=model.tokenizer, mean=model.mean, std=model.std, opset=OPSET)
    with (folder / "weights.bin").open("wb") as file, (folder / "detokenizer.bin").open("wb") as other:
        weights, more = WeightFile(file, "weights.bin"), WeightFile(other, "detokenizer.bin")
        graphs = [export.prefill(weights), export.decode(weights), detokenizer.whole(more)]
        if model.tokenizer.config.causal and whole_clip_reason(model.tokenizer.config) is None:
            graphs.append(detokenizer.stream(more).graph)
    for graph in graphs:
        (folder / f"{graph.name}.onnx").write_bytes(graph.model().SerializeToString())
    return [graph.name for graph in graphs]


def export_engines(
    model: ModelBundle,
    out: str | Path,
    *,
    kind: str,
    dtype: str = "fp16",
    targets: Sequence[str] = (),
    batches: Sequence[int] = BATCHES,
    positions: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Write a folder of engines, whole or not at all; an older one at ``out`` is replaced. Returns its manifest.

    kind: "tensorrt" or "tensorrt-rtx". dtype: fp32, fp16, bf16, int8 or int4; activations and cache are fp16 but for fp32
    and bf16. targets: sm_86 and so on, tensorrt-rtx alone; one engine serves them all. batches: a profile for each, the
    most rows that it serves. positions: the cache's length, text and motion together; the model's limit by default.
    What tensorrt timed for the engines at ``out`` is not timed again. Raises ``UserError`` for a missing library, unknown
    targets and graphs that the library refuses.
    """
    precision, config = Precision(name=dtype, target="tensorrt"), model.decoder.config
    if not batches or any(batch < 1 for batch in batches):
        raise UserError(f"batches: expected positive numbers, got {list(batches)}")
    length = config.block_size if positions is None else positions
    if not 2 <= length <= config.block_size:
        raise UserError(f"positions: expected 2 to {config.block_size}, got {length}")
    check_original(model)
    trt = library(kind, f"kinetok export {kind}")
    capabilities = check_targets(trt, kind, targets)
    text = min(MAX_FEATURES, length - 1)
    sizes = Sizes(
        axes={
            "text": (1, min(16, text), text),
            "tokens": (1, min(150, config.block_size), config.block_size),
            "step": (1, 1, STREAMED_TOKENS),
        }
    )
    builder = EngineBuilder(
        trt=trt,
        sizes=sizes,
        batches=sorted(set(batches)),
        capabilities=[one for one in capabilities.values() if one is not None],
        timing=_timings(Path(out), trt) if kind == "tensorrt" else None,
    )
    with (
        whole_directory(
            Path(out), lambda folder: only_holds(folder, ENGINES, COMPILED), "a folder of engines"
        ) as folder,
        tempfile.TemporaryDirectory() as scratch,
    ):
        names = write_graphs(model, Path(scratch), precision, length)
        for done, name in enumerate(names):
            if progress is not None:
                progress(done, len(names), f"building {name}")
            (folder / f"{name}.engine").write_bytes(builder.build(Path(scratch) / f"{name}.onnx"))
        if builder.timing is not None:
            (folder / TIMINGS).write_bytes(builder.timing)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "library": kind,
            "library_version": trt.__version__,
            "targets": list(capabilities),
            "precision": dtype,
            "kv_dtype": precision.activations.name,
            "batches": builder.batches,
            "positions": length,
            "axes": {name: list(values) for name, values in sizes.axes.items()},
            "timing_cache": None
            if builder.timing is None
            else {"reused_bytes": builder.reused, "bytes": len(builder.timing)},
            "decoder": decoder_facts(config),
            "probe": probe(model.decoder),
            "licence": model.licence,
            "files": {},
        }
        for path in sorted(folder.iterdir()):
            digest, size = file_digest(path)
            manifest["files"][path.name] = {"sha256": digest, "bytes": size}
        (folder / ENGINES).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return manifest


def _timings(out: Path, trt: Any) -> bytes:
    """What the same version of TensorRT measured for the engines that are at ``out`` now; b"" where there are none."""
    try:
        old = read_engines(out)
        old.check_library(trt)
    except UserError:
        return b""  # nothing there, or damaged, or another version's: measured anew
    path = out / TIMINGS
    return path.read_bytes() if TIMINGS in old.section("files") else b""
