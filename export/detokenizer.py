"""The tokenizer's decoder as graphs: a whole clip, or a stream with its state outside (MotionMillion, section 2).

Channels-last as in ``model/tokenizer.py``: a convolution is one product over its taps side by side. Always fp32.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from kinetok.errors import UserError
from kinetok.export.graph import Graph, WeightFile
from kinetok.export.ops import fsq_dequantize, gelu, idwt, layer_norm, silu
from kinetok.kernels.wavelet.op import GAINS
from kinetok.kernels.wavelet.reference import SCALING
from kinetok.model.config import TokenizerConfig
from kinetok.model.tokenizer import Conv, MotionTokenizer, Residual
from kinetok.motion.features import FEATURES

FLOAT = np.dtype(np.float32)


def why_not_streamed(config: TokenizerConfig) -> str | None:
    """Why a tokenizer cannot be decoded a token at a time; None where it can."""
    if not config.causal:
        return "the tokenizer is not causal: its frames depend on later tokens"
    if config.patcher in ("db2", "db3", "db4"):
        return f"the wavelet {config.patcher} wraps around the ends of a clip"
    if config.norm == "GN":
        return "its group norms take statistics over the whole clip"
    return None


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
class DetokenizerExport:
    """Both graphs of a tokenizer; mean, std ``[272]`` are applied inside them."""

    tokenizer: MotionTokenizer
    mean: np.ndarray
    std: np.ndarray
    opset: int = 23
    _states: list[tuple[str, str]] = field(default_factory=list)

    def whole(self, weights: WeightFile) -> Graph:
        """Tokens ``[B, n]`` to frames ``[B, n * frames_per_token, 272]``."""
        return self._build(Graph("detokenize", weights, self.opset), "tokens", streamed=False)

    def stream(self, weights: WeightFile) -> tuple[Graph, list[tuple[str, str]]]:
        """The next tokens ``[B, step]`` and the state to frames and the next state, and the names of the state.

        Raises ``UserError`` for a tokenizer that cannot be streamed.
        """
        reason = why_not_streamed(self.tokenizer.config)
        if reason is not None:
            raise UserError(f"no streaming graph: {reason}")
        self._states = []
        return self._build(Graph("detokenize_stream", weights, self.opset), "step", streamed=True), self._states

    def _build(self, g: Graph, axis: str, *, streamed: bool) -> Graph:
        config, decoder = self.tokenizer.config, self.tokenizer.decoder
        if config.input_dim != FEATURES:
            raise UserError(f"expected a tokenizer of {FEATURES} features, got {config.input_dim}")
        tokens = g.input("tokens", np.int64, ["batch", axis])
        x = fsq_dequantize(g, tokens, config.levels)
        if isinstance(self.tokenizer.project_out, nn.Linear):
            x = self._linear(g, x, self.tokenizer.project_out, "project_out")

        def conv(value: str, module: Conv, name: str) -> str:
            return self._conv(g, value, module, name, streamed)

        x = g.node("Relu", conv(x, decoder.first, "first"))
        for number, stage in enumerate(decoder.stages):
            for at, block in enumerate(stage.blocks):  # type: ignore[arg-type]
                x = self._residual(g, x, block, f"stages.{number}.blocks.{at}", conv)
            x = self._repeat(g, x, stage.stride)  # type: ignore[arg-type]
            x = conv(x, stage.conv, f"stages.{number}.conv")  # type: ignore[arg-type]
        x = conv(g.node("Relu", conv(x, decoder.middle, "middle")), decoder.last, "last")
        x = self._unpatch(g, x)
        x = g.node("Mul", x, g.const(self.std, np.float32))
        g.output(
            g.node("Add", x, g.const(self.mean, np.float32)), "features", np.float32, ["batch", "frames", FEATURES]
        )
        return g

    def _residual(self, g: Graph, x: str, block: Residual, name: str, conv: Callable[[str, Conv, str], str]) -> str:
        y = self._act(g, self._norm(g, x, block.norm1, f"{name}.norm1"))
        y = self._act(g, self._norm(g, conv(y, block.conv1, f"{name}.conv1"), block.norm2, f"{name}.norm2"))
        return g.node("Add", x, conv(y, block.conv2, f"{name}.conv2"))

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

    def _conv(self, g: Graph, x: str, conv: Conv, name: str, streamed: bool) -> str:
        outputs, taps, inputs = conv.weight.shape
        if conv.stride != 1:
            raise UserError(f"{name}: the exporter knows convolutions of stride 1 in a decoder, got {conv.stride}")
        left, right = conv.padding
        if left and streamed:
            number = len(self._states)
            shape: list[int | str] = ["batch", left, inputs]
            past = g.input(f"state.{number}", np.float32, shape)
            x = g.node("Concat", past, x, axis=1)
            # The output is a node of its own: a graph's output may not be one of its inner values in place.
            g.output(g.slice(x, 1, -left, np.iinfo(np.int64).max), f"next_state.{number}", np.float32, shape)
            self._states.append((f"state.{number}", f"next_state.{number}"))
        elif left or right:
            x = g.node("Pad", x, g.const([0, left, 0, 0, right, 0]))
        if taps > 1:
            reach = (taps - 1) * conv.dilation
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
