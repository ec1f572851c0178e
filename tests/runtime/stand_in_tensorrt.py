"""TensorRT-RTX's runtime as the backend calls it, on a CPU: ONNX Runtime computes over the addresses that it is given.

An engine's file names an ONNX graph and the largest batch of each profile. What the real library's documentation forbids is
refused here: shapes outside the profile, addresses that are not set, a cache whose two ends lie apart, a profile that is
not set.
"""

import ctypes
import json
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

__version__ = "1.0"
Builder = None  # what the package has where its libraries are

MAGIC = b"stand-in engine "
KERNELS = b"kernels of this GPU"


class DataType(Enum):
    FLOAT, HALF, BF16, INT32, INT64, BOOL = range(6)


class TensorIOMode(Enum):
    NONE, INPUT, OUTPUT = range(3)


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY, EAGER, NONE = range(3)


class ILogger:
    class Severity(IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


TYPES = {"tensor(float)": DataType.FLOAT, "tensor(float16)": DataType.HALF, "tensor(int64)": DataType.INT64}
NUMPY = {DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT64: np.int64}


def engine_file(graph: Path, batches: list[int], text: int) -> bytes:
    """text: the longest that the profiles take."""
    return MAGIC + json.dumps([str(graph), batches, text]).encode()


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, data: bytes) -> "Engine | None":
        if not data.startswith(MAGIC):
            self.logger.log(ILogger.Severity.ERROR, "the magic tag\ndoes not match")
            return None
        return Engine(self.logger, *json.loads(data[len(MAGIC) :]))


class RuntimeCache:
    def deserialize(self, blob: bytes) -> bool:
        return blob == KERNELS

    def serialize(self) -> bytes:
        return KERNELS


class RuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
    cache: RuntimeCache | None = None

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class Engine:
    def __init__(self, logger: ILogger, graph: str, batches: list[int], text: int) -> None:
        self.logger = logger
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns of every cache that it does not write in place
        options.intra_op_num_threads = 1  # several wait for one another on a busy machine, and a step is small
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        self.inputs = {value.name: value for value in inputs}
        self.values = {value.name: value for value in (*inputs, *outputs)}
        self.names, self.batches, self.text = list(self.values), batches, text
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(batches)
        self.contexts: list[Context] = []
        self.broken = False

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return TYPES[self.values[name].type]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [size if isinstance(size, int) else -1 for size in self.values[name].shape]

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        ranges = {"batch": (1, self.batches[index], self.batches[index]), "text": (1, min(16, self.text), self.text)}
        axes = [ranges[axis] if isinstance(axis, str) else (axis,) * 3 for axis in self.inputs[name].shape]
        return [[axis[at] for axis in axes] for at in range(3)]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.replace("present", "past_key_values") if name.startswith("present") else None

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, config: RuntimeConfig) -> "Context":
        assert config.dynamic_shapes_kernel_specialization_strategy is DynamicShapesKernelSpecializationStrategy.NONE
        assert config.cache is not None
        self.contexts.append(Context(self))
        return self.contexts[-1]


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.bindings = 0
        self.runs: list[tuple[int, int]] = []  # rows, stream

    def refuse(self, why: str) -> bool:
        self.engine.logger.log(ILogger.Severity.ERROR, why)
        return False

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        self.shapes[name] = shape
        fits = len(shape) == len(least) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
        return fits or self.refuse(f"{name} {shape} is outside its profile")

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.bindings += 1
        self.addresses[name] = address
        return name in self.engine.values or self.refuse(f"no tensor {name}")

    def execute_async_v3(self, stream: int) -> bool:
        engine = self.engine
        if engine.broken:
            return self.refuse("out of\nluck")
        if set(self.addresses) != set(engine.names) or set(self.shapes) != set(engine.inputs):
            return self.refuse("not all tensors are bound")
        for name in engine.names:
            source = engine.get_aliased_input_tensor(name)
            if source is not None and self.addresses[name] != self.addresses[source]:
                return self.refuse(f"{name} does not lie where {source} does")
        feeds = {name: self.memory(name, self.shapes[name]) for name in engine.inputs}
        outputs = [name for name in engine.names if name not in engine.inputs]
        for name, value in zip(outputs, engine.session.run(outputs, feeds), strict=True):
            self.memory(name, value.shape)[...] = value
        self.runs.append((len(next(iter(feeds.values()))), stream))
        return True

    def memory(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(NUMPY[self.engine.get_tensor_dtype(name)])
        count = int(np.prod(shape))
        raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(self.addresses[name])
        return np.frombuffer(raw, dtype, count).reshape(shape)
