"""ONNX Runtime on a bundle's graphs (docs/bundle.md): no copy of the cache in any step."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinetok.errors import UserError, missing_package
from kinetok.runtime.bundle import Bundle

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
TRIAL_ROWS = 5
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


def open_session(bundle: Bundle, graph: str, device: torch.device, threads: int | None = None) -> Any:
    """A session of one of the bundle's graphs on the CPU or a GPU; threads None takes torch's number.

    Raises ``UserError`` where onnxruntime or its execution provider for the device is absent, or the graph is damaged.
    """
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
        return onnxruntime.InferenceSession(str(bundle.graph(graph)), options, providers=choice)
    except UserError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{bundle.graph(graph)}: onnxruntime cannot load it: {detail}") from error


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


class OnnxBackend:
    """``Backend`` on a bundle; one slab ``[layers, 2, slots, H, capacity, hd]`` that both graphs write into in place.

    Neighbouring slots go through the graph together where that leaves a slot's bits alone, which the kernels of a CPU
    decide: a trial when the backend is made compares rows together with rows alone. Where they differ, each slot is a call
    of its own (``batched`` is False).
    """

    def __init__(self, bundle: Bundle, slots: int, capacity: int, device: str | torch.device = "cpu") -> None:
        self.bundle, self.slots, self.capacity, self.device = bundle, slots, capacity, torch.device(device)
        sizes = {
            name: bundle.number("decoder", name) for name in ("layers", "heads", "head_dim", "positions", "logits")
        }
        if slots < 1 or not 0 < capacity <= sizes["positions"]:
            raise UserError(
                f"expected at least one slot and 1 to {sizes['positions']} positions, got {slots} and {capacity}"
            )
        self.layers, self.classes = sizes["layers"], sizes["logits"]
        kv = bundle.manifest.get("kv_dtype")
        if kv not in _DTYPES:
            raise UserError(f"{bundle.directory}: expected kv_dtype to be one of {list(_DTYPES)}, got {kv!r}")
        self._prefill = open_session(bundle, "prefill", self.device)
        self._decode = open_session(bundle, "decode", self.device)
        shape = (self.layers, 2, slots, sizes["heads"], capacity, sizes["head_dim"])
        self.slab = torch.zeros(shape, dtype=_DTYPES[kv], device=self.device)
        self.lengths = [0] * slots
        self._tokens = torch.zeros(slots, 1, dtype=torch.int64, device=self.device)
        self._positions = torch.zeros(slots, 1, dtype=torch.int64, device=self.device)
        self._logits = torch.zeros(slots, self.classes, device=self.device)
        self._calls: dict[tuple[int, int], _Call] = {}
        self.batched = self._rows_agree()

    def prefill(self, slot: int, text: Tensor, tokens: Sequence[int] = ()) -> Tensor:
        length = len(text) + len(tokens)
        if not len(text) or length > self.capacity:
            raise UserError(
                f"expected 1 to {self.capacity} positions of text and motion, text among them, got {len(text)} of text "
                f"and {len(tokens)} of motion"
            )
        features = text.detach().to(self.device, torch.float32).contiguous()[None]
        call = _Call(
            self._prefill,
            {
                "text_features": features,
                "text_lengths": torch.tensor([len(text)], device=self.device),
                "logits": self._logits[slot : slot + 1],
                **self._cache(slot, slot + 1),
            },
        )
        # What is masked still counts as zero times its value: an earlier row's NaN must not come back.
        self.slab[:, :, slot] = 0
        call.run()
        self.lengths[slot] = len(text)
        for token in tokens:
            self._step(slot, slot + 1, [token])
        return self._logits[slot].clone()

    def decode(self, slots: Sequence[int], tokens: Tensor) -> Tensor:
        if max((self.lengths[slot] for slot in slots), default=0) >= self.capacity:
            raise UserError(f"a slot holds {self.capacity} positions and is full")
        order = sorted(range(len(slots)), key=slots.__getitem__)
        sorted_slots = [slots[at] for at in order]
        values = tokens.tolist()
        breaks = [
            at + 1 for at, (left, right) in enumerate(pairwise(sorted_slots)) if right != left + 1 or not self.batched
        ]
        for first, last in pairwise([0, *breaks, len(order)]) if order else ():
            start = sorted_slots[first]
            self._step(start, start + last - first, [values[at] for at in order[first:last]])
        return self._logits[list(slots)]

    def copy(self, source: int, target: int) -> None:
        length = self.lengths[source]
        self.slab[:, :, target, :, :length] = self.slab[:, :, source, :, :length]
        self.lengths[target] = length

    def _rows_agree(self) -> bool:
        tokens = torch.arange(min(self.slots, TRIAL_ROWS), dtype=torch.int64)
        rows = range(len(tokens))
        results = []
        for group in (1, 2, len(tokens)):
            self.lengths = [0] * self.slots
            for _ in range(min(2, self.capacity)):  # the second token sees the first one's keys
                for first in range(0, len(tokens), group):
                    some = tokens[first : first + group].tolist()
                    self._step(first, first + len(some), some)
            results.append(self._logits[list(rows)])
        self.lengths = [0] * self.slots
        self.slab.zero_()
        return all(torch.equal(results[0], other) for other in results[1:])

    def _cache(self, start: int, stop: int) -> dict[str, Tensor]:
        """The cache of neighbouring slots as inputs and, in the same memory, outputs."""
        return {
            f"{side}.{layer}.{kind}": self.slab[layer, part, start:stop]
            for layer in range(self.layers)
            for part, kind in enumerate(("key", "value"))
            for side in ("past_key_values", "present")
        }

    def _step(self, start: int, stop: int, tokens: list[int]) -> None:
        """One token for each of the slots from ``start`` to before ``stop``."""
        if (start, stop) not in self._calls:
            self._calls[start, stop] = _Call(
                self._decode,
                {
                    "input_ids": self._tokens[start:stop],
                    "position_ids": self._positions[start:stop],
                    "logits": self._logits[start:stop],
                    **self._cache(start, stop),
                },
            )
        self._tokens[start:stop, 0] = torch.tensor(tokens)
        self._positions[start:stop, 0] = torch.tensor(self.lengths[start:stop])
        self._calls[start, stop].run()
        for slot in range(start, stop):
            self.lengths[slot] += 1


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
