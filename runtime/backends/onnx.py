"""ONNX Runtime on a bundle's graphs (docs/bundle.md): no copy of the cache in any step."""

from collections.abc import Mapping, Sequence
from functools import partial
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from kinetok.errors import UserError, missing_package
from kinetok.model.decoder import MotionDecoder
from kinetok.model.streaming import ENDLESS
from kinetok.motion.features import FEATURES
from kinetok.runtime.backends.graphs import CacheShape, GraphBackend, Run
from kinetok.runtime.bundle import Bundle
from kinetok.runtime.manifest import MANIFEST, interface

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
ONE_THREAD = 20_000_000  # parameters
CPU_OPERATOR = b"GroupQueryAttention"  # in fp32, as our graphs have it
_OPSET_18 = "export the bundle with --opset 18 (1.18 runs that in fp32 and fp16, 1.23 in int8 and int4)"
# How releases too old for a graph refuse it, in a part of their words, and what helps but a newer one. They are out, so the
# words stay.
_TOO_OLD = {
    "Unsupported model IR version": _OPSET_18,
    "is under development and support for this is limited": _OPSET_18,  # an opset
    "Only 4b quantization is supported": "export the bundle with --dtype fp32 or fp16",
}
_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_ELEMENTS = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}


def runtime_library() -> Any:
    """The module onnxruntime. ``UserError`` where it is absent."""
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_package("onnxruntime", "onnx", "running a bundle") from error
    return onnxruntime


def open_session(bundle: Bundle, graph: str, device: torch.device, threads: int | None = None) -> Any:
    """A session of one of the bundle's graphs on the CPU or a GPU; threads None takes torch's number.

    Raises ``UserError`` where onnxruntime or its execution provider for the device is absent, the provider lacks the graph's
    attention, or the graph is damaged.
    """
    path = bundle.graph(graph)
    if device.type == "cuda" and CPU_OPERATOR in path.read_bytes():
        raise UserError(
            f"{path}: attends in {CPU_OPERATOR.decode()}, which CUDA's provider has for half precision alone, so the cache "
            "would visit the CPU in every step: export the model again with --kv fp16 or --dtype fp16, or use the device cpu"
        )
    session = _session(str(path), str(path), device, threads, {})
    inputs, outputs = interface(bundle.manifest, graph)
    # What is bound to a graph is as large as the manifest says.
    shapes = {value.name: (_ELEMENTS.get(value.type), _numbers(value.shape)) for value in session.get_inputs()}
    results = {value.name: _ELEMENTS.get(value.type) for value in session.get_outputs()}
    if shapes != inputs or results != {name: dtype for name, (dtype, _) in outputs.items()}:
        raise UserError(f"{path}: not the graph that {MANIFEST} describes: export the model again")
    return session


def _place(device: str | torch.device) -> torch.device:
    """A device that ONNX Runtime has a provider for. ``UserError`` for any other."""
    try:
        place = torch.device(device)
    except RuntimeError:
        place = None
    if place is None or place.type not in PROVIDERS:
        raise UserError(f"device: expected {' or '.join(PROVIDERS)}, got {str(device)[:40]!r}")
    return place


def _numbers(shape: Sequence[Any]) -> tuple[int | None, ...]:
    """A shape with its free axes as None."""
    return tuple(size if isinstance(size, int) else None for size in shape)


def _session(
    model: str | bytes, name: str, device: torch.device, threads: int | None, weights: Mapping[str, np.ndarray]
) -> Any:
    """A session of a graph's file or bytes. weights: what the graph refers to and does not hold; read here, not kept.

    Raises ``UserError`` where onnxruntime or its provider is absent, or it cannot load the graph: because it is too old, or
    the graph is damaged.
    """
    onnxruntime = runtime_library()
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
    # Threads of a session that is done would wait for its next call in a loop, on the core that another session needs now:
    # the prefill's, while the first steps run.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # By default its fp32 products have TF32's ten bits, which is less than a bundle promises.
    cuda = {"device_id": device.index or 0, "use_tf32": 0}
    choice = [(provider, cuda)] if device.type == "cuda" else [provider]
    try:
        if weights:
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in weights.values()]
            options.add_external_initializers(list(weights), values)
        return onnxruntime.InferenceSession(model, options, providers=choice)
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        detail = " ".join(str(error).split())
        for words, remedy in _TOO_OLD.items():
            if words in detail:
                or_a_bundle = "" if isinstance(model, bytes) else f", or {remedy}"
                raise UserError(
                    f"{name}: onnxruntime {onnxruntime.__version__} is too old for it: install a newer one, "
                    f"pip install 'kinetok[onnx]'{or_a_bundle}"
                ) from error
        raise UserError(f"{name}: onnxruntime cannot load it: {detail[:200]}") from error


def bound(session: Any, tensors: Mapping[str, Tensor]) -> Run:
    """A session with its inputs and outputs bound to tensors once; running it moves no memory of theirs."""
    binding = session.io_binding()
    for kind, bind in (
        (session.get_inputs(), binding.bind_input),
        (session.get_outputs(), binding.bind_output),
    ):
        for value in kind:
            tensor = tensors[value.name]
            assert tensor.is_contiguous()
            element = torch.empty(0, dtype=tensor.dtype).numpy().dtype
            bind(
                value.name, tensor.device.type, tensor.device.index or 0, element, list(tensor.shape), tensor.data_ptr()
            )

    def run() -> None:
        assert tensors  # which it keeps alive
        session.run_with_iobinding(binding)

    return run


class OnnxBackend(GraphBackend):
    """``Backend`` on a bundle."""

    def __init__(self, bundle: Bundle, slots: int, capacity: int, device: str | torch.device = "cpu") -> None:
        self.bundle, place = bundle, _place(device)
        sizes = {
            name: bundle.number("decoder", name) for name in ("layers", "heads", "head_dim", "positions", "logits")
        }
        kv = str(bundle.manifest.get("kv_dtype"))
        if kv not in _DTYPES:
            raise UserError(f"{bundle.directory}: expected kv_dtype to be one of {list(_DTYPES)}, got {kv[:40]!r}")
        shape = CacheShape(
            layers=sizes["layers"],
            heads=sizes["heads"],
            length=min(capacity, sizes["positions"]),
            head_dim=sizes["head_dim"],
            dtype=_DTYPES[kv],
        )
        prefill, decode = (partial(bound, open_session(bundle, name, place)) for name in ("prefill", "decode"))
        self.own_threads = place.type == "cpu"
        super().__init__(shape, slots, capacity, sizes["logits"], place, prefill, decode)


class LiveOnnxBackend(GraphBackend):
    """``Backend`` on a decoder in memory: one session prefills and steps, over one cache.

    ONNX Runtime keeps a copy of the weights of its own, laid out for its products and shared by all backends of a decoder.
    """

    own_threads = True

    def __init__(self, decoder: MotionDecoder, slots: int, capacity: int) -> None:
        config, weight = decoder.config, decoder.embed.weight
        if weight.device.type != "cpu" or weight.dtype != torch.float32 or not isinstance(decoder.head, nn.Linear):
            raise UserError(
                "backend onnx: expected plain fp32 weights on a CPU; make a bundle with kinetok export onnx MODEL --out DIR, "
                "and name it as onnx:DIR"
            )
        self.decoder, self._session = decoder, live_session(decoder, "decoder_graph")
        shape = CacheShape(
            layers=config.n_layer,
            heads=config.n_head,
            length=min(capacity, config.block_size),
            head_dim=config.head_dim,
            dtype=torch.float32,
        )
        super().__init__(shape, slots, capacity, config.head_rows, weight.device, self._bind, self._bind)

    @torch.inference_mode()
    def _fill(self, slot: int, text: Tensor, tokens: Sequence[int]) -> None:
        """Text and tokens in one call."""
        length = len(text) + len(tokens)
        self._start(
            slot,
            length,
            {
                # In the graph it would be packed once more, for a product that comes once a text.
                "text_embeds": self.decoder.text_proj(text.to(torch.float32))[None],
                "input_ids": torch.tensor([list(tokens)], dtype=torch.int64),
                "position_ids": torch.arange(length)[None],
            },
        )

    def _bind(self, tensors: Mapping[str, Tensor]) -> Run:
        """Of a step there is no text."""
        none = torch.empty(len(tensors["input_ids"]), 0, self.decoder.config.n_embd)
        return bound(self._session, {"text_embeds": none, **tensors})


_SESSIONS: "WeakKeyDictionary[nn.Module, dict[tuple[str, int], Any]]" = WeakKeyDictionary()
_OPENING = Lock()


def live_session(module: nn.Module, graph: str) -> Any:
    """The session of a module with the weights that it has now, for torch's number of threads; made once.

    graph: the function of ``kinetok.model.graphs.live`` that makes it.
    """
    parameters = list(module.parameters())
    # Two threads of a step of a millisecond wait for one another longer than they work.
    threads = 1 if sum(value.numel() for value in parameters) < ONE_THREAD else torch.get_num_threads()
    with _OPENING:
        mine = _SESSIONS.setdefault(module, {})
        if (graph, threads) not in mine:
            from kinetok.model.graphs import live

            model, weights = getattr(live, graph)(module)
            mine[graph, threads] = _session(model, f"the {graph}", parameters[0].device, threads, weights)
        return mine[graph, threads]


class OnnxDetokenizer:
    """A bundle's detokenizer: tokens to features ``[T, 272]``, de-normalised, whole or as a stream."""

    def __init__(self, bundle: Bundle, device: str | torch.device = "cpu") -> None:
        self.bundle, self.device = bundle, _place(device)
        self._whole = open_session(bundle, "detokenize", self.device)

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        """fp32 ``[n * frames_per_token, 272]`` of one clip's tokens."""
        return self._whole.run(["features"], {"tokens": self._checked(tokens)})[0][0]

    def stream(self) -> "OnnxStream":
        """A clip that comes a few tokens at a time. ``UserError`` where the tokenizer needs whole clips."""
        ahead = "detokenize_ahead" in self.bundle.section("graphs")
        return OnnxStream(self, "detokenize_ahead" if ahead else "detokenize_stream")

    def _checked(self, tokens: Sequence[int]) -> np.ndarray:
        ids, codebook = np.asarray([list(tokens)], dtype=np.int64), self.bundle.number("tokenizer", "codebook")
        if not ids.size or ids.min() < 0 or ids.max() >= codebook:
            raise UserError(f"expected tokens from 0 to {codebook - 1}, at least one, got {list(tokens)[:8]}")
        return ids


class OnnxStream:
    """One clip's state between calls."""

    def __init__(self, owner: OnnxDetokenizer, graph: str) -> None:
        bundle = owner.bundle
        self._owner, self._session = owner, open_session(bundle, graph, owner.device)
        about = bundle.section(graph, bundle.section("graphs"))
        self._unit, self._delay = bundle.number("tokenizer", "frames_per_token"), int(about["delay_frames"])
        self._outputs = [value.name for value in self._session.get_outputs()]
        shapes = {value["name"]: value["shape"][1:] for value in about["inputs"]}
        self._state = {state["input"]: np.zeros((1, *shapes[state["input"]]), np.float32) for state in about["states"]}
        self._next = {state["input"]: state["output"] for state in about["states"]}
        self._ahead, self._position = graph == "detokenize_ahead", 0

    def push(self, tokens: Sequence[int]) -> np.ndarray:
        """fp32 frames ``[n, 272]`` that the clip's next tokens complete, frames_per_token each where nothing looks ahead."""
        return self._run(self._owner._checked(tokens), ENDLESS)

    def finish(self) -> np.ndarray:
        """The frames still missing of a clip that ends here; nothing may be pushed after it."""
        missing = -(-self._delay // self._unit)
        return self._run(np.zeros((1, missing), np.int64), self._position)

    def _run(self, tokens: np.ndarray, end: int) -> np.ndarray:
        if not tokens.size:
            return np.zeros((0, FEATURES), np.float32)
        clip = {"position": np.array([self._position]), "end": np.array([end])} if self._ahead else {}
        feeds = {"tokens": tokens, **clip, **self._state}
        results = dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        self._state = {name: results[after] for name, after in self._next.items()}
        first = self._position * self._unit - self._delay  # the number of the first frame in its clip
        self._position += tokens.shape[1]
        frames = results["features"][0]
        return frames[max(0, -first) : max(0, min(len(frames), end * self._unit - first))]
