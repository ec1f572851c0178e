"""The tokenizer's decoder as graphs: a whole clip, or a stream with its state outside (MotionMillion, section 2).

Channels-last as in ``model/tokenizer.py``: a convolution is one product over its taps side by side. Always fp32. Streams as in
``model/streaming.py``: what looks ahead runs late, and is zeroed outside its clip.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from kinetok.errors import UserError
from kinetok.kernels.wavelet.op import GAINS
from kinetok.kernels.wavelet.reference import SCALING
from kinetok.model.graphs.builder import Graph, Weights
from kinetok.model.graphs.ops import fsq_dequantize, gelu, idwt, layer_norm, silu
from kinetok.model.streaming import whole_clip_reason
from kinetok.model.tokenizer import Conv, MotionTokenizer, Residual
from kinetok.motion.features import FEATURES

FLOAT = np.dtype(np.float32)


def context(tokenizer: MotionTokenizer) -> tuple[int, int]:
    """How many tokens before and after a token touch its frames."""
    config, token = tokenizer.config, 10_000
    scale = config.stride_t**config.down_t
    first, last = token * scale, token * scale + scale - 1
    if config.patcher in ("db2", "db3", "db4"):
        for _ in range(tokenizer.wavelet_levels):
            side = len(SCALING[config.patcher]) // 4
            first, last = first - side, last + side
    if config.norm == "GN":
        return token, token
    for module in reversed(list(_path(tokenizer))):
        if isinstance(module, Conv):
            taps = module.weight.shape[1]
            first, last = first - module.padding[0], last + (taps - 1) * module.dilation - module.padding[0]
        else:
            first, last = first // module, last // module
    return token - first, last - token


def _path(tokenizer: MotionTokenizer) -> Iterator[Conv | int]:
    """The decoder's convolutions, and the factors of its upsamplings, in their order."""
    decoder = tokenizer.decoder
    yield decoder.first
    for stage in decoder.stages:
        for block in stage.blocks:  # type: ignore[union-attr]
            yield block.conv1
        yield stage.stride  # type: ignore[misc]
        yield stage.conv  # type: ignore[misc]
    yield from (decoder.middle, decoder.last)


@dataclass(kw_only=True, slots=True)
class _Stream:
    """A streaming graph under construction: where it is in the network, and its states so far.

    late: steps by which the values there run behind the tokens, at ``rate`` steps a token. clip: the inputs position and
    end, where anything may be late at all.
    """

    clip: tuple[str, str] | None
    rate: int = 1
    late: int = 0
    states: list[tuple[str, str]] = field(default_factory=list)

    def inside(self, g: Graph, x: str) -> str:
        """``x [B, k, C]`` with zeros before its clip's start and from its end on."""
        if self.clip is None:
            return x
        first, end = (g.node("Mul", g.reshape(part, -1, 1, 1), g.const(self.rate)) for part in self.clip)
        here = g.node("Add", g.node("Sub", first, g.const(self.late)), g.reshape(g.range(g.size(x, 1)), 1, -1, 1))
        within = g.node("And", g.node("Less", here, end), g.node("GreaterOrEqual", here, g.const(0)))
        return g.node("Where", within, x, g.const(0, np.float32))

    def through(self, g: Graph, x: str, span: int, channels: int) -> str:
        """``x [B, k, C]`` with the ``span`` steps before it, of which the last are the next state."""
        number = len(self.states)
        shape: list[int | str] = ["batch", span, channels]
        joined = g.node("Concat", g.input(f"state.{number}", FLOAT, shape), x, axis=1)
        # The output is a node of its own: a graph's output may not be one of its inner values in place.
        g.output(g.slice(joined, 1, -span, np.iinfo(np.int64).max), f"next_state.{number}", FLOAT, shape)
        self.states.append((f"state.{number}", f"next_state.{number}"))
        return joined


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamGraph:
    """states: names of inputs and the outputs that follow them. delay_frames: how far its frames run behind its tokens."""

    graph: Graph
    states: list[tuple[str, str]]
    delay_frames: int


@dataclass(kw_only=True, slots=True)
class DetokenizerExport:
    """Both graphs of a tokenizer; mean, std ``[272]`` are applied inside them."""

    tokenizer: MotionTokenizer
    mean: np.ndarray
    std: np.ndarray
    opset: int = 23

    def whole(self, weights: Weights) -> Graph:
        """Tokens ``[B, n]`` to frames ``[B, n * frames_per_token, 272]``."""
        return self._build(Graph("detokenize", weights, self.opset), "tokens", None)

    def stream(self, weights: Weights) -> StreamGraph:
        """The next tokens ``[B, step]`` and the state to frames and the next state.

        ``detokenize_stream`` for a causal tokenizer; ``detokenize_ahead`` for one that looks ahead, which also takes the
        clip's tokens so far and in all (docs/bundle.md). Raises ``UserError`` for a tokenizer that cannot be streamed.
        """
        config = self.tokenizer.config
        if (reason := whole_clip_reason(config)) is not None:
            raise UserError(f"no streaming graph: {reason}")
        g = Graph("detokenize_stream" if config.causal else "detokenize_ahead", weights, self.opset)
        clip = (
            None if config.causal else (g.input("position", np.int64, ["batch"]), g.input("end", np.int64, ["batch"]))
        )
        stream = _Stream(clip=clip)
        self._build(g, "step", stream)
        return StreamGraph(graph=g, states=stream.states, delay_frames=stream.late * config.patch_size)

    def _build(self, g: Graph, axis: str, stream: _Stream | None) -> Graph:
        config, decoder = self.tokenizer.config, self.tokenizer.decoder
        if config.input_dim != FEATURES:
            raise UserError(f"expected a tokenizer of {FEATURES} features, got {config.input_dim}")
        tokens = g.input("tokens", np.int64, ["batch", axis])
        x = fsq_dequantize(g, tokens, config.levels)
        if isinstance(self.tokenizer.project_out, nn.Linear):
            x = self._linear(g, x, self.tokenizer.project_out, "project_out")
        x = g.node("Relu", self._conv(g, x, decoder.first, "first", stream))
        for number, stage in enumerate(decoder.stages):
            for at, block in enumerate(stage.blocks):  # type: ignore[arg-type]
                x = self._residual(g, x, block, f"stages.{number}.blocks.{at}", stream)
            stride = int(stage.stride)  # type: ignore[arg-type]
            x = self._repeat(g, x, stride)
            if stream is not None:
                stream.rate, stream.late = stream.rate * stride, stream.late * stride
            x = self._conv(g, x, stage.conv, f"stages.{number}.conv", stream)  # type: ignore[arg-type]
        x = g.node("Relu", self._conv(g, x, decoder.middle, "middle", stream))
        x = self._unpatch(g, self._conv(g, x, decoder.last, "last", stream))
        x = g.node("Mul", x, g.const(self.std, np.float32))
        g.output(
            g.node("Add", x, g.const(self.mean, np.float32)), "features", np.float32, ["batch", "frames", FEATURES]
        )
        return g

    def _residual(self, g: Graph, x: str, block: Residual, name: str, stream: _Stream | None) -> str:
        before = stream.late if stream is not None else 0
        y = self._act(g, self._norm(g, x, block.norm1, f"{name}.norm1"))
        y = self._norm(g, self._conv(g, y, block.conv1, f"{name}.conv1", stream), block.norm2, f"{name}.norm2")
        y = self._conv(g, self._act(g, y), block.conv2, f"{name}.conv2", stream)
        if stream is not None and stream.late > before:
            held = stream.through(g, x, stream.late - before, block.conv1.weight.shape[2])
            x = g.slice(held, 1, 0, before - stream.late)
        return g.node("Add", x, y)

    def _act(self, g: Graph, x: str) -> str:
        kind = self.tokenizer.config.activation
        return silu(g, x) if kind == "silu" else gelu(g, x) if kind == "gelu" else g.node("Relu", x)

    def _norm(self, g: Graph, x: str, norm: nn.Module, name: str) -> str:
        def vector(part: str, value: np.ndarray) -> str:
            return g.weight(f"{name}.{part}", lambda: value.astype(np.float32))

        if isinstance(norm, nn.Identity):
            return x
        values = {part: value.double().numpy() for part, value in norm.state_dict().items() if value.ndim}
        if isinstance(norm, nn.LayerNorm):
            scale, bias = (vector(part, values[part]) for part in ("weight", "bias"))
            return layer_norm(g, x, scale, bias, norm.eps)
        if isinstance(norm, nn.BatchNorm1d):
            gain = values["weight"] / np.sqrt(values["running_var"] + norm.eps)
            shift = values["bias"] - values["running_mean"] * gain
            return g.node("Add", g.node("Mul", x, vector("scale", gain)), vector("shift", shift))
        if isinstance(norm, nn.GroupNorm):
            groups = norm.num_groups
            first = g.reshape(g.transpose(x, 0, 2, 1), 0, groups, -1)
            ones, zeros = g.const(np.ones(groups), np.float32), g.const(np.zeros(groups), np.float32)
            unit = g.node("InstanceNormalization", first, ones, zeros, epsilon=norm.eps)
            back = g.transpose(g.node("Reshape", unit, g.node("Shape", g.transpose(x, 0, 2, 1))), 0, 2, 1)
            return g.node(
                "Add", g.node("Mul", back, vector("weight", values["weight"])), vector("bias", values["bias"])
            )
        raise UserError(f"{name}: the exporter knows LN, GN, BN and no norm, got {type(norm).__name__}")

    def _linear(self, g: Graph, x: str, module: nn.Linear, name: str) -> str:
        weight, bias = (part.detach().float().numpy() for part in (module.weight, module.bias))
        product = g.node("MatMul", x, g.weight(f"{name}.weight", lambda: weight.T))
        return g.node("Add", product, g.weight(f"{name}.bias", lambda: bias))

    def _conv(self, g: Graph, x: str, conv: Conv, name: str, stream: _Stream | None) -> str:
        outputs, taps, inputs = conv.weight.shape
        if conv.stride != 1:
            raise UserError(f"{name}: the exporter knows convolutions of stride 1 in a decoder, got {conv.stride}")
        left, right = conv.padding
        if taps > 1:
            reach = (taps - 1) * conv.dilation
            if stream is not None:
                x = stream.through(g, stream.inside(g, x), reach, inputs)
                stream.late += right
            else:
                x = g.node("Pad", x, g.const([0, left, 0, 0, right, 0]))
            ends = [k * conv.dilation - reach or np.iinfo(np.int64).max for k in range(taps)]
            columns = [g.slice(x, 1, k * conv.dilation, end) for k, end in enumerate(ends)]
            x = g.node("Concat", *columns, axis=2)
        weight = conv.weight.detach().float().reshape(outputs, taps * inputs).numpy()
        product = g.node("MatMul", x, g.weight(f"{name}.weight", lambda: weight.T))
        return g.node("Add", product, g.weight(f"{name}.bias", lambda: conv.bias.detach().float().numpy()))

    @staticmethod
    def _repeat(g: Graph, x: str, times: int) -> str:
        if times == 1:
            return x
        tiled = g.node("Tile", g.node("Unsqueeze", x, g.const([2])), g.const([1, 1, times, 1]))
        return g.node("Reshape", tiled, g.node("Concat", g.const([0, -1]), g.size(x, 2), axis=0))

    def _unpatch(self, g: Graph, x: str) -> str:
        config = self.tokenizer.config
        if config.patcher == "none" or config.patch_size == 1:
            return x
        if config.patcher == "rearrange":
            split = g.reshape(x, 0, 0, FEATURES, config.patch_size)
            return g.reshape(g.transpose(split, 0, 1, 3, 2), 0, -1, FEATURES)
        return idwt(g, x, self.tokenizer.wavelet_levels, config.patcher, 1 / GAINS["patcher"])
