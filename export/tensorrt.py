"""TensorRT and TensorRT-RTX engines from the same ONNX graphs, by one builder: the two libraries share their interface."""

import importlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kinetok.errors import UserError, missing_package
from kinetok.export.bundle import decoder_facts
from kinetok.export.decoder import DecoderExport, module_tensors
from kinetok.export.detokenizer import DetokenizerExport, why_not_streamed
from kinetok.export.graph import WeightFile
from kinetok.export.precision import Precision
from kinetok.files import whole_directory
from kinetok.model.bank import MAX_FEATURES
from kinetok.model.pretrained import ModelBundle
from kinetok.runtime.bundle import file_digest
from kinetok.runtime.engines import ENGINES, FORMAT, VERSION

LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
BATCHES = (1, 8, 64)
OPSET = 23
STREAMED_TOKENS = 16

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Ranges of the free axes: smallest, most common, largest."""

    axes: Mapping[str, tuple[int, int, int]]

    def of(self, name: str, batch: int) -> tuple[int, int, int]:
        """batch: a profile serves up to so many rows and is tuned for as many."""
        if name == "batch":
            return 1, batch, batch
        return self.axes[name]


def library(kind: str) -> Any:
    """The module of ``kind``. ``UserError`` naming the package where it is not installed."""
    try:
        module = importlib.import_module(LIBRARIES[kind])
    except (ImportError, OSError) as error:
        raise missing_package(kind, kind, f"kinetok export {kind}") from error
    # The package alone may be a stub whose libraries come from the vendor's own index.
    if not hasattr(module, "Builder"):
        raise UserError(f"the package {kind} is here without its libraries: install it as its vendor describes")
    return module


def check_targets(trt: Any, kind: str, targets: Sequence[str]) -> list[Any]:
    """The library's compute capabilities for names such as sm_86; none for tensorrt, which builds for the GPU at hand."""
    if kind == "tensorrt":
        if targets:
            raise UserError("--targets: tensorrt builds for the GPU of this machine; name targets with tensorrt-rtx")
        return []
    known = {f"sm_{name[2:]}": value for name, value in trt.ComputeCapability.__members__.items() if name[:2] == "SM"}
    if not targets:
        raise UserError(f"--targets: name the GPUs to build for, some of {', '.join(sorted(known))}")
    for target in targets:
        if target not in known:
            raise UserError(f"--targets: expected some of {', '.join(sorted(known))}, got {target!r}")
    return [known[target] for target in dict.fromkeys(targets)]


def build_engine(trt: Any, path: Path, sizes: Sizes, batches: Sequence[int], capabilities: Sequence[Any]) -> bytes:
    """A serialised engine of an ONNX file, strongly typed, with an optimisation profile for each of ``batches``.

    Raises ``UserError`` with the library's words where it cannot parse or build the graph.
    """
    said: list[str] = []

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                said.append(message)

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        words = [parser.get_error(i).desc() for i in range(parser.num_errors)] or said
        raise UserError(f"{path.name}: {trt.__name__} {trt.__version__} cannot read this graph: {_short(words)}")
    _allow_decomposing(trt, network)
    config = builder.create_builder_config()
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(capability, index)
    names = _axis_names(path)
    for batch in batches:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            value = network.get_input(index)
            if -1 in tuple(value.shape):
                ranges = [sizes.of(axis, batch) if isinstance(axis, str) else (axis,) * 3 for axis in names[value.name]]
                profile.set_shape(value.name, *(tuple(part[at] for part in ranges) for at in range(3)))
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UserError(f"{path.name}: {trt.__name__} {trt.__version__} cannot build this graph: {_short(said)}")
    return bytes(engine)


def _allow_decomposing(trt: Any, network: Any) -> None:
    """Attention of shapes that have no kernel of their own may be built from its parts instead of failing."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if kind is not None and layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer  # the library hands every layer out as its base class
            layer.attention.decomposable = True


def _short(words: Sequence[str]) -> str:
    return " ".join(" ".join(words).split())[:300] or "it did not say why"


def _axis_names(path: Path) -> dict[str, list[int | str]]:
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    return {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in graph.input
    }


def write_graphs(model: ModelBundle, folder: Path, precision: Precision, kv_dtype: np.dtype) -> list[str]:
    """The graphs as TensorRT's parsers take them; returns their names.

    The cache is written outside ``Attention``, whose second output the parsers refuse; integer weights are
    DequantizeLinear in blocks; fp32 attention is spelt out.
    """
    export = DecoderExport(
        config=model.decoder.config,
        tensors=module_tensors(model.decoder),
        precision=precision,
        kv_dtype=kv_dtype,
        opset=OPSET,
    )
    detokenizer = DetokenizerExport(tokenizer=model.tokenizer, mean=model.mean, std=model.std, opset=OPSET)
    with (folder / "weights.bin").open("wb") as file, (folder / "detokenizer.bin").open("wb") as other:
        weights, more = WeightFile(file, "weights.bin"), WeightFile(other, "detokenizer.bin")
        graphs = [export.prefill(weights), export.decode(weights), detokenizer.whole(more)]
        if why_not_streamed(model.tokenizer.config) is None:
            graphs.append(detokenizer.stream(more)[0])
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
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Write a folder of engines, whole or not at all; an older one at ``out`` is replaced.

    kind: "tensorrt" or "tensorrt-rtx". dtype: fp32, fp16, int8 or int4; activations and cache are fp16 but for fp32.
    targets: sm_86 and so on, tensorrt-rtx alone; one engine serves them all. Raises ``UserError`` for a missing
    library, unknown targets and graphs that the library refuses.
    """
    precision = Precision(name=dtype, target="tensorrt")
    if not batches or any(batch < 1 for batch in batches):
        raise UserError(f"batches: expected positive numbers, got {list(batches)}")
    trt = library(kind)
    capabilities = check_targets(trt, kind, targets)
    config = model.decoder.config
    text = min(MAX_FEATURES, config.block_size - 1)
    sizes = Sizes(
        axes={
            "text": (1, min(16, text), text),
            "capacity": (2, config.block_size, config.block_size),
            "tokens": (1, min(150, config.block_size), config.block_size),
            "step": (1, 1, STREAMED_TOKENS),
        }
    )
    with (
        whole_directory(Path(out), lambda folder: (folder / ENGINES).is_file(), "a folder of engines") as folder,
        tempfile.TemporaryDirectory() as scratch,
    ):
        files: dict[str, Any] = {}
        names = write_graphs(model, Path(scratch), precision, precision.activations)
        for done, name in enumerate(names):
            if progress is not None:
                progress(done, len(names), f"building {name}")
            path = folder / f"{name}.engine"
            path.write_bytes(build_engine(trt, Path(scratch) / f"{name}.onnx", sizes, batches, capabilities))
            digest, size = file_digest(path)
            files[path.name] = {"sha256": digest, "bytes": size}
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "library": kind,
            "library_version": trt.__version__,
            "targets": list(dict.fromkeys(targets)),
            "precision": dtype,
            "kv_dtype": precision.activations.name,
            "batches": list(batches),
            "axes": {name: list(values) for name, values in sizes.axes.items()},
            "decoder": decoder_facts(config),
            "licence": model.licence,
            "files": files,
        }
        (folder / ENGINES).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return Path(out)
