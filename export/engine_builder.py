"""One TensorRT engine from one ONNX graph; TensorRT and TensorRT-RTX share the interface that this uses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinetok.errors import UserError
from kinetok.runtime.engines import log_into, short


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Ranges of the free axes: smallest, most common, largest."""

    axes: Mapping[str, tuple[int, int, int]]

    def of(self, name: str, batch: int) -> tuple[int, int, int]:
        """batch: a profile serves up to so many rows and is tuned for as many."""
        if name == "batch":
            return 1, batch, batch
        return self.axes[name]


@dataclass(kw_only=True, slots=True)
class EngineBuilder:
    """Builds engines, strongly typed, with an optimisation profile for each of ``batches``.

    capabilities: the GPUs to build for; none: the GPU at hand. timing: what was measured in builds before (b"": nothing),
    for TensorRT, which times kernels as it builds and skips those that are in it; it grows with every build, and ``reused``
    is how many bytes of the given ones are of use. None for TensorRT-RTX, which measures nothing before it runs and keeps
    a cache there (``runtime/backends/tensorrt.py``).
    """

    trt: Any
    sizes: Sizes
    batches: Sequence[int]
    capabilities: Sequence[Any]
    timing: bytes | None = None
    reused: int = field(init=False)
    _said: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.reused = len(self.timing or b"")

    def build(self, path: Path) -> bytes:
        """The engine of an ONNX file. ``UserError`` with the library's words where it cannot parse or build the graph."""
        trt = self.trt
        self._said.clear()
        logger = log_into(trt, self._said)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(path)):
            words = [parser.get_error(i).desc() for i in range(parser.num_errors)] or self._said
            raise UserError(f"{path.name}: {trt.__name__} {trt.__version__} cannot read this graph: {short(words)}")
        _allow_decomposing(trt, network)
        config = builder.create_builder_config()
        if self.capabilities:
            config.num_compute_capabilities = len(self.capabilities)
            for index, capability in enumerate(self.capabilities):
                config.set_compute_capability(capability, index)
        self._add_profiles(builder, network, config, path)
        cache = None if self.timing is None else self._timings(config)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise UserError(
                f"{path.name}: {trt.__name__} {trt.__version__} cannot build this graph: {short(self._said)}"
            )
        if cache is not None:
            self.timing = bytes(cache.serialize())
        return bytes(engine)

    def _timings(self, config: Any) -> Any:
        """The timing cache of a build."""
        cache = config.create_timing_cache(self.timing)
        if not config.set_timing_cache(cache, False):  # measured on another GPU
            self.timing, self.reused = b"", 0
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        return cache

    def _add_profiles(self, builder: Any, network: Any, config: Any, path: Path) -> None:
        names = _axis_names(path)
        for batch in self.batches:
            profile = builder.create_optimization_profile()
            for index in range(network.num_inputs):
                value = network.get_input(index)
                if -1 in tuple(value.shape):
                    axes = names[value.name]
                    ranges = [self.sizes.of(axis, batch) if isinstance(axis, str) else (axis,) * 3 for axis in axes]
                    profile.set_shape(value.name, *(tuple(part[at] for part in ranges) for at in range(3)))
            config.add_optimization_profile(profile)


def _allow_decomposing(trt: Any, network: Any) -> None:
    """Attention of shapes that have no kernel of their own may be built from its parts instead of failing."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if kind is not None and layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer  # the library hands every layer out as its base class
            layer.attention.decomposable = True


def _axis_names(path: Path) -> dict[str, list[int | str]]:
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    return {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in graph.input
    }
