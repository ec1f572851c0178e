"""What computes logits: the seam between the scheduler and torch, ONNX Runtime and whatever follows."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels.linear.packing import FLOATS
from kinetok.kernels.sampling import Draw
from kinetok.model import streaming
from kinetok.model.pretrained import ModelBundle
from kinetok.model.tokenizer import MotionTokenizer


class Backend(Protocol):
    """Keys and values of a fixed number of slots, and the logits that follow from them.

    A slot holds one row of up to ``capacity`` positions: a text, then motion tokens. A character has one slot, two with
    guidance. All memory is taken when the backend is made. **A slot's logits depend on its own text and tokens alone, to the
    bit, whichever slots are in a call and whatever is in the others**; the scheduler relies on it. Who uses which slot is
    the scheduler's business. Logits are fp32 on ``device``.
    """

    slots: int
    capacity: int
    device: torch.device

    def prefill(self, slot: int, text: Tensor, tokens: Sequence[int] = ()) -> Tensor:
        """Start a slot anew: text features ``[L, D]``, L > 0, then motion tokens; logits ``[head_rows]`` after the last.

        Nothing of what the slot held before can be seen afterwards. Raises ``UserError`` beyond ``capacity``.
        """
        ...

    def decode(self, slots: Sequence[int], tokens: Tensor) -> Tensor:
        """Append one token to each of these different slots, int64 ``[n]`` on ``device``; logits ``[n, head_rows]``.

        Raises ``UserError`` for a full slot, and then no slot has changed.
        """
        ...

    def copy(self, source: int, target: int) -> None:
        """Make ``target`` what ``source`` is."""
        ...


class Reading(Protocol):
    """Tokens on their way from the device."""

    def token(self, slot: int) -> int | None:
        """The token of the character whose first slot this is, once it has come; the end token for one that ended.

        None where its logits were no numbers.
        """
        ...


@runtime_checkable
class DrawingBackend(Backend, Protocol):
    """A backend that draws on the device, so that a step need not wait for the host nor the host for a step.

    ``slots`` of one character are its text's and, with guidance, the empty text's; the first one names it. The tokens are
    those of docs/numerics.md. None of the calls waits for the device; nor do they have to be read before the next one.
    """

    def prefill_all(self, rows: Sequence[tuple[int, Tensor, Sequence[int]]]) -> Tensor:
        """``prefill`` of several different slots at once, to the same bits: logits ``[n, head_rows]``.

        Raises ``UserError`` where one of them does not fit, and then no slot has changed.
        """
        ...

    def warm_up(self) -> None:
        """Prepare every kind of step that there can be, so that no crowd waits for it later. No slot changes."""
        ...

    def begin(self, slots: Sequence[int], lengths: Sequence[int], draw: Draw, written: int, logits: Tensor) -> Reading:
        """Draw a character's token number ``written`` from ``logits [len(slots), head_rows]``.

        lengths: positions of each slot in use; what follows them is not used any more. Raises ``UserError`` where
        ``draw`` leaves no room for a token.
        """
        ...

    def resume(self, slots: Sequence[int], lengths: Sequence[int], draw: Draw, written: int, token: int) -> None:
        """Let a character go on that has ``written`` tokens, the newest of which, ``token``, is not in its slots yet."""
        ...

    def decode_and_draw(self, characters: Sequence[int]) -> Reading:
        """Feed these characters' newest tokens, and draw the next ones; nobody else's cache or draws change.

        One that drew its end token, or the last one that it may, draws no more. Raises ``UserError`` for a full slot, and
        then nothing has changed.
        """
        ...


def _torch(model: ModelBundle, slots: int, capacity: int) -> Backend:
    from kinetok.runtime.backends.torch import TorchBackend

    return TorchBackend(model.decoder, slots, capacity)


def _fused(model: ModelBundle, slots: int, capacity: int, float8: bool) -> Backend:
    from kinetok.runtime.backends.fused import FusedBackend

    return FusedBackend(model.decoder, slots, capacity, float8=float8)


def _onnx(model: ModelBundle, slots: int, capacity: int, folder: str) -> Backend:
    from kinetok.runtime.backends.onnx import LiveOnnxBackend, OnnxBackend
    from kinetok.runtime.bundle import read_bundle

    if not folder:
        return LiveOnnxBackend(model.decoder, slots, capacity)
    bundle = read_bundle(folder)
    bundle.check_decoder(model.decoder.config)
    bundle.check_weights(model.decoder)
    return OnnxBackend(bundle, slots, capacity, model.decoder.embed.weight.device)


def _tensorrt(model: ModelBundle, slots: int, capacity: int, folder: str) -> Backend:
    from kinetok.runtime.backends.tensorrt import open_engines
    from kinetok.runtime.engines import read_engines

    if not folder:
        raise UserError(
            "backend tensorrt runs engines: make them with kinetok export tensorrt-rtx MODEL --out DIR, and name them as "
            "tensorrt:DIR"
        )
    engines = read_engines(folder)
    engines.check_decoder(model.decoder.config)
    engines.check_weights(model.decoder)
    return open_engines(engines, slots, capacity, model.decoder.embed.weight.device)


BACKENDS: dict[str, Callable[..., Any]] = {"torch": _torch, "fused": _fused, "onnx": _onnx, "tensorrt": _tensorrt}


def check_names(name: str, kv: str = "auto") -> None:
    """Raise ``UserError`` for a backend, or a kv with it, that no model can have; name may be "auto"."""
    kind, _, folder = name.partition(":") if isinstance(name, str) else ("", "", "")
    if kind not in (*BACKENDS, "auto") or (folder and kind not in ("onnx", "tensorrt")):
        raise UserError(f"backend: expected one of auto, torch, fused, onnx, onnx:DIR, tensorrt:DIR, got {name!r}")
    if kv not in ("auto", *FLOATS, "fp8"):
        raise UserError(f"kv: expected one of auto, {', '.join(FLOATS)}, fp8, got {kv!r}")
    if kv != "auto" and folder:
        raise UserError(f"kv: expected auto, for kinetok export has fixed how {name} keeps keys and values; got {kv}")
    if kv == "fp8" and kind not in ("fused", "auto"):
        raise UserError(
            f"kv: fp8 is for the backend fused alone, and this is {name}; use kv auto, or the backend fused"
        )


def check_backend(name: str, model: ModelBundle, kv: str = "auto") -> None:
    """Raise ``UserError`` for what ``check_names`` refuses, for "auto", and for a kv that ``model`` cannot have."""
    if name == "auto":
        raise UserError("backend: expected the name of one, got 'auto'")
    check_names(name, kv)
    dtype = {value: name for name, value in FLOATS.items()}.get(model.decoder.embed.weight.dtype)
    if kv not in ("auto", "fp8", dtype):
        raise UserError(f"kv: this model keeps keys and values as auto, {dtype} (its weights' type) or fp8, got {kv!r}")


def open_backend(name: str, model: ModelBundle, slots: int, capacity: int, kv: str = "auto") -> Backend:
    """The backend of that name for ``model``: "torch", "fused", "onnx", "onnx:DIR" with a bundle of the same model, or
    "tensorrt:DIR" with engines of it.

    kv as in ``kinetok.runtime.Engine``. Raises ``UserError`` for what ``check_backend`` refuses, or where it cannot run.
    """
    check_backend(name, model, kv)
    kind, _, folder = name.partition(":")
    own: dict[str, dict[str, Any]] = {
        "onnx": {"folder": folder},
        "tensorrt": {"folder": folder},
        "fused": {"float8": kv == "fp8"},
    }
    return BACKENDS[kind](model, slots, capacity, **own.get(kind, {}))


def open_detokenizer(backend: str, tokenizer: MotionTokenizer, slots: int) -> streaming.StreamingDetokenizer:
    """What makes frames of tokens as they come, beside the backend of that name.

    With "onnx", which runs on a CPU, ONNX Runtime, which is the faster one there (benchmarks/runtime/bench_detokenizer.py).
    It is for whole clips too, but by a few milliseconds beside hundreds of decoding, so these stay torch's.
    """
    if backend != "onnx":
        return streaming.StreamingDetokenizer(tokenizer, slots)
    from kinetok.runtime.backends.onnx_stream import OnnxStreamingDetokenizer

    return OnnxStreamingDetokenizer(tokenizer, slots)
