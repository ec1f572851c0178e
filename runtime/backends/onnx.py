"""ONNX Runtime on a bundle's graphs (docs/bundle.md): no copy of the cache in any step."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from kinetok.errors import UserError, missing_package
from kinetok.model.decoder import MotionDecoder
from kinetok.runtime.backends.torch import TorchBackend
from kinetok.runtime.bundle import Bundle

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
TRIAL_ROWS = 16
ONE_THREAD = 20_000_000  # parameters
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


def open_session(bundle: Bundle, graph: str, device: torch.device, threads: int | None = None) -> Any:
    """A session of one of the bundle's graphs on the CPU or a GPU; threads None takes torch's number.

    Raises ``UserError`` where onnxruntime or its execution provider for the device is absent, or the graph is damaged.
    """
    path = bundle.graph(graph)
    return _session(str(path), str(path), device, threads, {})


def _session(
    model: str | bytes, name: str, device: torch.device, threads: int | None, weights: Mapping[str, np.ndarray]
) -> Any:
    """A session of a graph's file or bytes. weights: what the graph refers to and does not hold; read here, not kept."""
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_package("onnxruntime", "onnx", "running a bundle") from error
    onnxruntime.disable_telemetry_events()  # what a user runs is nobody else's business
    provider = PROVIDERS[device.type]
    present = onnxruntime.get_available_providers()
    if provider not in present:
        raise UserError(
            f"this onnxruntime has no {provider} (it has {', '.join(present)}): install onnxruntime-gpu, or use the device cpu"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    choice = [(provider, {"device_id": device.index or 0})] if device.type == "cuda" else [provider]
    try:
        if weights:
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in weights.values()]
            options.add_external_initializers(list(weights), values)
        return onnxruntime.InferenceSession(model, options, providers=choice)
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: onnxruntime cannot load it: {detail}") from error


class _Call:
    """A session with its inputs and outputs bound to tensors once; running it moves no memory of theirs."""

    def __init__(self, session: Any, tensors: dict[str, Tensor]) -> None:
        self.session, self.binding = session, session.io_binding()
        self.tensors = tensors  # kept alive
        for kind, bind in (
            (session.get_inputs(), self.binding.bind_input),
            (session.get_outputs(), self.binding.bind_output),
        ):
            for value in kind:
                tensor = tensors[value.name]
                assert tensor.is_contiguous()
                element = torch.empty(0, dtype=tensor.dtype).numpy().dtype
                place = tensor.device.type, tensor.device.index or 0
                bind(value.name, *place, element, list(tensor.shape), tensor.data_ptr())

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding)


class _Step:
    """The decode graph over a cache: one token for any of its slots.

    slots: the keys and values of neighbouring slots from one to before another, ``[layers][2]`` of ``[n, H, capacity, hd]``,
    which the graph reads and writes in place. Neighbours go through the graph together where that leaves a slot's bits
    alone, which the kernels of a CPU decide: a trial compares rows together with rows alone. Where they differ, each slot
    is a call of its own (``batched`` is False).
    """

    def __init__(self, session: Any, slots: int, classes: int, cache: Callable[[int, int], list[list[Tensor]]]) -> None:
        self.cache, self.session = cache, session
        device = cache(0, 1)[0][0].device
        self.lengths = [0] * slots
        self.tokens = torch.zeros(slots, 1, dtype=torch.int64, device=device)
        self.positions = torch.zeros(slots, 1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(slots, classes, device=device)
        self.calls: dict[tuple[int, int], _Call] = {}
        self.batched = self._rows_agree()

    def run(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """A token for each of these different slots; the logits are left in ``logits``."""
        order = sorted(range(len(slots)), key=slots.__getitem__)
        inside = [slots[at] for at in order]
        breaks = [at + 1 for at, (a, b) in enumerate(pairwise(inside)) if b != a + 1 or not self.batched]
        for first, last in pairwise([0, *breaks, len(order)]) if order else ():
            self._neighbours(inside[first], [tokens[at] for at in order[first:last]])

    def _neighbours(self, start: int, tokens: list[int]) -> None:
        stop = start + len(tokens)
        if (start, stop) not in self.calls:
            self.calls[start, stop] = _Call(
                self.session,
                {
                    "input_ids": self.tokens[start:stop],
                    "position_ids": self.positions[start:stop],
                    "logits": self.logits[start:stop],
                    **named(self.cache(start, stop)),
                },
            )
        self.tokens[start:stop, 0] = torch.tensor(tokens)
        self.positions[start:stop, 0] = torch.tensor(self.lengths[start:stop])
        self.calls[start, stop].run()
        for slot in range(start, stop):
            self.lengths[slot] += 1

    def _rows_agree(self) -> bool:
        slots = len(self.lengths)
        capacity = self.cache(0, 1)[0][0].shape[2]
        rows = min(slots, TRIAL_ROWS)
        tokens = list(range(rows))
        results = []
        for group in sorted({1, min(2, rows), min(5, rows), rows}):
            self.lengths = [0] * slots
            for _ in range(min(2, capacity)):  # the second token sees the first one's keys
                for first in range(0, rows, group):
                    self._neighbours(first, tokens[first : first + group])
            results.append(self.logits[:rows].clone())
        self.lengths = [0] * slots
        return all(torch.equal(results[0], other) for other in results[1:])


def named(cache: list[list[Tensor]]) -> dict[str, Tensor]:
    """The cache of neighbouring slots as a graph's inputs and, in the same memory, outputs."""
    return {
        f"{side}.{layer}.{kind}": tensor
        for layer, parts in enumerate(cache)
        for kind, tensor in zip(("key", "value"), parts, strict=True)
        for side in ("past_key_values", "present")
    }


class OnnxBackend:
    """``Backend`` on a bundle; one slab ``[layers, 2, slots, H, capacity, hd]`` that both graphs write into in place."""

    def __init__(self, bundle: Bundle, slots: int, capacity: int, device: str | torch.device = "cpu") -> None:
        self.bundle, self.slots, self.capacity, self.device = bundle, slots, capacity, torch.device(device)
        sizes = {
            name: bundle.number("decoder", name) for name in ("layers", "heads", "head_dim", "positions", "logits")
        }
        if slots < 1 or not 0 < capacity <= sizes["positions"]:
            raise UserError(
                f"expected at least one slot and 1 to {sizes['positions']} positions, got {slots} and {capacity}"
            )
        kv = bundle.manifest.get("kv_dtype")
        if kv not in _DTYPES:
            raise UserError(f"{bundle.directory}: expected kv_dtype to be one of {list(_DTYPES)}, got {kv!r}")
        self._prefill = open_session(bundle, "prefill", self.device)
        shape = (sizes["layers"], 2, slots, sizes["heads"], capacity, sizes["head_dim"])
        self.slab = torch.zeros(shape, dtype=_DTYPES[kv], device=self.device)
        self._step = _Step(open_session(bundle, "decode", self.device), slots, sizes["logits"], self._cache)
        self.slab.zero_()

    @property
    def lengths(self) -> list[int]:
        """Positions that each slot holds."""
        return self._step.lengths

    @property
    def batched(self) -> bool:
        """Whether neighbouring slots go through the graph together."""
        return self._step.batched

    def prefill(self, slot: int, text: Tensor, tokens: Sequence[int] = ()) -> Tensor:
        length = len(text) + len(tokens)
        if not len(text) or length > self.capacity:
            raise UserError(
                f"expected 1 to {self.capacity} positions of text and motion, text among them, got {len(text)} of text "
                f"and {len(tokens)} of motion"
            )
        features = text.detach().to(self.device, torch.float32).contiguous()[None]
        logits = self._step.logits
        call = _Call(
            self._prefill,
            {
                "text_features": features,
                "text_lengths": torch.tensor([len(text)], device=self.device),
                "logits": logits[slot : slot + 1],
                **named(self._cache(slot, slot + 1)),
            },
        )
        # What is masked still counts as zero times its value: an earlier row's NaN must not come back.
        self.slab[:, :, slot] = 0
        call.run()
        self.lengths[slot] = len(text)
        for token in tokens:
            self._step.run([slot], [token])
        return logits[slot].clone()

    def decode(self, slots: Sequence[int], tokens: Tensor) -> Tensor:
        if max((self.lengths[slot] for slot in slots), default=0) >= self.capacity:
            raise UserError(f"a slot holds {self.capacity} positions and is full")
        self._step.run(slots, tokens.tolist())
        return self._step.logits[list(slots)]

    def copy(self, source: int, target: int) -> None:
        length = self.lengths[source]
        self.slab[:, :, target, :, :length] = self.slab[:, :, source, :, :length]
        self.lengths[target] = length

    def _cache(self, start: int, stop: int) -> list[list[Tensor]]:
        return [[part[start:stop] for part in layer] for layer in self.slab]


class LiveOnnxBackend(TorchBackend):
    """``Backend`` on a decoder in memory: texts are prefilled by torch, steps run in ONNX Runtime, over the same cache.

    ONNX Runtime keeps a copy of the weights of its own, laid out for its products and shared by all backends of a decoder.
    """

    single_rows = False

    def __init__(self, decoder: MotionDecoder, slots: int, capacity: int) -> None:
        super().__init__(decoder, slots, capacity)
        if self.device.type != "cpu" or self.slab.dtype != torch.float32 or not isinstance(decoder.head, nn.Linear):
            raise UserError(
                "backend onnx: expected plain fp32 weights on a CPU; make a bundle with kinetok export onnx MODEL --out DIR, "
                "and name it as onnx:DIR"
            )
        self._step = _Step(_live_session(decoder), slots, decoder.config.head_rows, self._cache)
        self.slab.zero_()
        self.lengths = self._step.lengths

    @torch.inference_mode()
    def prefill(self, slot: int, text: Tensor, tokens: Sequence[int] = ()) -> Tensor:
        # What is masked still counts as zero times its value: an earlier row's NaN must not come back.
        self.slab[:, :, slot] = 0
        return super().prefill(slot, text, tokens)

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], tokens: Tensor) -> Tensor:
        if max((self.lengths[slot] for slot in slots), default=0) >= self.capacity:
            raise UserError(f"a slot holds {self.capacity} positions and is full")
        self._step.run(slots, tokens.tolist())
        return self._step.logits[list(slots)]

    def _cache(self, start: int, stop: int) -> list[list[Tensor]]:
        return [[part[start:stop] for part in layer] for layer in self.slab.unbind(1)]


_SESSIONS: "WeakKeyDictionary[MotionDecoder, dict[int, Any]]" = WeakKeyDictionary()
_OPENING = Lock()


def _live_session(decoder: MotionDecoder) -> Any:
    """The session of a decoder with the weights that it has now, for torch's number of threads; made once."""
    # Two threads of a step of a millisecond wait for one another longer than they work.
    small = sum(value.numel() for value in decoder.parameters()) < ONE_THREAD
    threads = 1 if small else torch.get_num_threads()
    with _OPENING:
        mine = _SESSIONS.setdefault(decoder, {})
        if threads not in mine:
            graph, weights = import_module("kinetok.export.live").decode_graph(decoder)
            mine[threads] = _session(graph, "the decoder's graph", decoder.embed.weight.device, threads, weights)
        return mine[threads]


class OnnxDetokenizer:
    """A bundle's detokenizer: tokens to features ``[T, 272]``, de-normalised, whole or as a stream."""

    def __init__(self, bundle: Bundle, device: str | torch.device = "cpu") -> None:
        self.bundle, self.device = bundle, torch.device(device)
        self._whole = open_session(bundle, "detokenize", self.device)

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        """fp32 ``[n * frames_per_token, 272]`` of one clip's tokens."""
        return self._whole.run(["features"], {"tokens": self._checked(tokens)})[0][0]

    def stream(self) -> "OnnxStream":
        """A clip that comes a few tokens at a time. ``UserError`` where the tokenizer looks ahead."""
        return OnnxStream(self, open_session(self.bundle, "detokenize_stream", self.device))

    def _checked(self, tokens: Sequence[int]) -> np.ndarray:
        ids, codebook = np.asarray([list(tokens)], dtype=np.int64), self.bundle.number("tokenizer", "codebook")
        if not ids.size or ids.min() < 0 or ids.max() >= codebook:
            raise UserError(f"expected tokens from 0 to {codebook - 1}, at least one, got {list(tokens)[:8]}")
        return ids


class OnnxStream:
    """One clip's state between calls."""

    def __init__(self, owner: OnnxDetokenizer, session: Any) -> None:
        self._owner, self._session = owner, session
        self._outputs = [value.name for value in session.get_outputs()]
        self._state = {
            value.name: np.zeros((1, *value.shape[1:]), np.float32)
            for value in session.get_inputs()
            if value.name != "tokens"
        }

    def push(self, tokens: Sequence[int]) -> np.ndarray:
        """fp32 frames ``[n * frames_per_token, 272]`` of the clip's next tokens."""
        feeds = {"tokens": self._owner._checked(tokens), **self._state}
        results = dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        self._state = {name: results[f"next_{name}"] for name in self._state}
        return results["features"][0]
