"""TensorRT and TensorRT-RTX on a folder of engines (docs/tensorrt.md). **Never run on a GPU yet.**

What our tests run is everything but the library: which tensors go where, which profile serves a call, what is refused; the
library's place is taken by one that computes the same graphs on a CPU.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.files import whole_file
from kinetok.model.tensor_files import natural
from kinetok.runtime.backends.graphs import TRIAL, CacheShape, GraphBackend, Run
from kinetok.runtime.engines import Engines, check_here, deserialize, short

KV_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
COMPILED = "runtime.cache"

Launch = Callable[[Callable[[int], bool]], bool]
"""Calls a function with the handle of a CUDA stream, in its place among what the current stream does."""


class SideStream:
    """A stream of its own, in order with torch's current one: on the default one the library waits more than it must."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def __call__(self, enqueue: Callable[[int], bool]) -> bool:
        with torch.cuda.device(self.stream.device):  # the library works on the current one
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            done = enqueue(self.stream.cuda_stream)
            current.wait_stream(self.stream)
        return done


class CompiledKernels:
    """What TensorRT-RTX compiled for this GPU, kept beside the engines so that the next start need not compile it again.

    ``state`` says whether that was so. TensorRT compiles when it builds and has no such cache.
    """

    def __init__(self, trt: Any, directory: Path, target: str) -> None:
        self.trt, self.path = trt, directory / f"{target}.{COMPILED}"
        self.blob = self.path.read_bytes() if self.path.is_file() else b""
        self.cache: Any = None
        self.state = "none: tensorrt compiles kernels when it builds engines"

    def context(self, engine: Any) -> Any:
        """A new execution context of an engine, whose kernels come from the cache or go into it."""
        if not hasattr(engine, "create_runtime_config"):
            return engine.create_execution_context()
        config = engine.create_runtime_config()
        if self.cache is None:
            self.cache = config.create_runtime_cache()
            # It refuses what another version, driver or GPU compiled, and then it is empty.
            reused = bool(self.blob) and self.cache.deserialize(self.blob)
            self.state = f"{self.path.name}: {len(self.blob)} bytes reused" if reused else f"{self.path.name}: new"
        config.set_runtime_cache(self.cache)
        # Kernels specialised for a shape would take the general ones' place in the middle of a clip, and change its bits.
        general = self.trt.DynamicShapesKernelSpecializationStrategy.NONE
        config.dynamic_shapes_kernel_specialization_strategy = general
        return engine.create_execution_context(config)

    def save(self) -> None:
        """Keep what was compiled since; a folder that cannot be written leaves it for the next start to compile."""
        if self.cache is None:
            return
        blob = bytes(self.cache.serialize())
        if blob == self.blob:
            return
        try:
            with whole_file(self.path) as path:
                path.write_bytes(blob)
        except UserError as error:
            self.state += f", not kept ({error})"


@dataclass(slots=True)
class _Context:
    """An execution context and the tensors that it is bound to now."""

    context: Any
    bound: Mapping[str, Tensor] | None = None


class BoundEngine:
    """An engine whose inputs and outputs are tensors of ours: a context for each profile, made when a call first needs it."""

    def __init__(self, trt: Any, path: Path, compiled: CompiledKernels, launch: Launch) -> None:
        self.name, self.compiled, self.launch = path.stem, compiled, launch
        self.said: list[str] = []
        self.engine = engine = deserialize(trt, path, self.said)
        tensors = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.dtypes = {tensor: torch_dtype(trt, engine.get_tensor_dtype(tensor)) for tensor in tensors}
        self.inputs = inputs = [name for name in tensors if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.limits = [
            {name: tuple(map(tuple, engine.get_tensor_profile_shape(name, index))) for name in inputs}
            for index in range(engine.num_optimization_profiles)
        ]
        self.outputs = {name: tuple(engine.get_tensor_shape(name)) for name in tensors if name not in inputs}
        self.same = {
            tensor: source for tensor in self.outputs if (source := engine.get_aliased_input_tensor(tensor)) is not None
        }
        self.contexts: dict[int, _Context] = {}

    @property
    def batches(self) -> list[int]:
        """The most rows that each profile takes; rows are every input's first axis."""
        return [next(iter(limits.values()))[2][0] for limits in self.limits]

    def profile(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The first profile, they grow, that takes inputs of these shapes. ``UserError`` where none does."""
        wrong = ""
        for index, limits in enumerate(self.limits):
            outside = [name for name, (least, _, most) in limits.items() if not _within(least, shapes[name], most)]
            if not outside:
                return index
            wrong = outside[0]
        raise UserError(
            f"engine {self.name}: no profile takes {wrong} of shape {list(shapes[wrong])}, the largest is "
            f"{list(self.limits[-1][wrong][2])}: build the engines again with other --batches or --positions"
        )

    def bind(self, tensors: Mapping[str, Tensor]) -> Run:
        """What runs the engine on these tensors. All checks are made here, once."""
        if tensors.keys() != self.dtypes.keys():
            odd = sorted(tensors.keys() ^ self.dtypes.keys())[0]
            raise UserError(f"engine {self.name}: {odd} is not both in the engine and in its manifest: build it again")
        for name, dtype in self.dtypes.items():
            given = tensors[name]
            if given.dtype != dtype or not given.is_contiguous():
                raise UserError(
                    f"engine {self.name}: {name} is {dtype} in the engine, got {given.dtype}: build it again"
                )
        for name, shape in self.outputs.items():
            given = tensors[name]
            # What the engine writes must not be more than there is room for.
            if len(shape) != given.ndim or any(
                size not in (-1, room) for size, room in zip(shape, given.shape, strict=True)
            ):
                raise UserError(
                    f"engine {self.name}: {name} is {list(shape)} in the engine, and its manifest makes it "
                    f"{list(given.shape)}: build it again"
                )
        for output, source in self.same.items():
            assert tensors[output].data_ptr() == tensors[source].data_ptr()
        index = self.profile({tensor: tuple(tensors[tensor].shape) for tensor in self.inputs})

        def run() -> None:
            if not self.launch(lambda stream: self._enqueue(index, tensors, stream)):
                raise RuntimeError(f"engine {self.name} did not run: {short(self.said)}")

        return run

    def _enqueue(self, index: int, tensors: Mapping[str, Tensor], stream: int) -> bool:
        if index not in self.contexts:
            context = self.compiled.context(self.engine)
            if context is None or not context.set_optimization_profile_async(index, stream):
                raise UserError(f"engine {self.name}: no memory for its profile {index}: {short(self.said)}")
            self.contexts[index] = _Context(context)
        at = self.contexts[index]
        if at.bound is not tensors:
            at.bound = None  # until all of them are set
            for name, tensor in tensors.items():
                fine = at.context.set_tensor_address(name, tensor.data_ptr())
                if name in self.inputs:
                    fine = at.context.set_input_shape(name, tuple(tensor.shape)) and fine
                if not fine:
                    return False
            at.bound = tensors
        return bool(at.context.execute_async_v3(stream))


def _within(least: tuple[int, ...], shape: tuple[int, ...], most: tuple[int, ...]) -> bool:
    return len(shape) == len(least) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))


def torch_dtype(trt: Any, kind: Any) -> torch.dtype:
    """torch's name of a library's type."""
    types = {
        "FLOAT": "float32",
        "HALF": "float16",
        "BF16": "bfloat16",
        "INT64": "int64",
        "INT32": "int32",
        "BOOL": "bool",
    }
    for name, ours in types.items():
        if kind == getattr(trt.DataType, name):
            return getattr(torch, ours)
    raise UserError(f"the engine has a tensor of type {kind}, which kinetok does not write: build it again")


class TensorRTBackend(GraphBackend):
    """``Backend`` on engines, whose cache is bound once and written in place.

    Texts are prefilled one by one, by the profile for one row; tokens go through the profile that the number of
    neighbouring slots asks for, or one by one where the library's kernels make a row's bits depend on that number
    (``SlotSteps``). Nothing in a step waits for the device. **Never run on a GPU yet.**
    """

    def __init__(
        self, trt: Any, engines: Engines, slots: int, capacity: int, device: torch.device, target: str, launch: Launch
    ) -> None:
        self.engines, self.compiled = engines, CompiledKernels(trt, engines.directory, target)
        sizes = {name: engines.number("decoder", name) for name in ("layers", "heads", "head_dim", "logits")}
        length, kv = engines.manifest.get("positions"), str(engines.manifest.get("kv_dtype"))
        if not isinstance(length, int) or not natural(length) or kv not in KV_DTYPES:
            raise UserError(
                f"{engines.directory / engines.source}: expected positions to be a whole number and kv_dtype one of "
                f"{', '.join(KV_DTYPES)}, got {str(length)[:40]} and {kv[:40]!r}"
            )
        if capacity > length:
            raise UserError(
                f"{engines.directory}: these engines hold {length} positions, and {capacity} are asked for: build them again "
                f"with --positions {capacity}, or open the engine with positions={length}"
            )
        prefill, decode = (
            BoundEngine(trt, engines.engine(name), self.compiled, launch) for name in ("prefill", "decode")
        )
        shape = CacheShape(
            layers=sizes["layers"],
            heads=sizes["heads"],
            length=length,
            head_dim=sizes["head_dim"],
            dtype=KV_DTYPES[kv],
        )
        super().__init__(
            shape,
            slots,
            capacity,
            sizes["logits"],
            device,
            prefill.bind,
            decode.bind,
            most=max(decode.batches),
            trial=(*TRIAL, *decode.batches),
        )
        self.compiled.save()


def open_engines(engines: Engines, slots: int, capacity: int, device: torch.device) -> TensorRTBackend:
    """The backend on a GPU of this machine. ``UserError`` for engines of another GPU or version of the library."""
    trt = check_here(engines, "backend tensorrt", device if device.type == "cuda" else None)
    if device.type != "cuda":
        raise UserError(f"backend tensorrt runs on a GPU, and the model is on {device}: load it with the device cuda")
    target = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    with torch.cuda.device(device):
        return TensorRTBackend(trt, engines, slots, capacity, device, target, SideStream(device))
