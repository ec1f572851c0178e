"""The decoder's graphs over a static KV cache (MotionMillion, section 3): a bundle's two, and the one that is both."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kinetok.kernels.rotary import rotary_table
from kinetok.model.config import DecoderConfig
from kinetok.model.graphs.builder import Graph, Weights
from kinetok.model.graphs.ops import add_rms_norm, attention, cached_attention, cached_heads, rms_norm, rotate, silu
from kinetok.model.graphs.precision import Precision, Tensors, linear, to_numpy

Attend = Callable[[int, str], str]
"""A layer's number and its queries, keys and values ``[B, T, 3 d]`` to the heads' mixed values ``[B, T, d]``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderExport:
    """What the graphs share. ``tensors`` gives the weights under ``MotionDecoder``'s names; kv_dtype is the cache's.

    capacity None: the cache's length is a free axis, and ScatterND writes it. A number (opset 24): it is that long, and
    TensorScatter writes it, which TensorRT does where the cache lies, without a copy, and for a fixed length only.
    contrib: ONNX Runtime's own operators may stand for several standard ones, as they do anyway beside its quantised product.
    """

    config: DecoderConfig
    tensors: Tensors
    precision: Precision
    kv_dtype: np.dtype
    opset: int = 23
    capacity: int | None = None
    contrib: bool = False

    def prefill(self, weights: Weights) -> Graph:
        """Text ``[B, L, D]`` into the first positions of an empty cache; logits after each row's last."""
        config = self.config
        g = Graph("prefill", weights, self.opset)
        text = g.input("text_features", np.float32, ["batch", "text", config.text_dim])
        lengths = g.input("text_lengths", np.int64, ["batch"])
        past = self._past(g)
        rows, width = g.size(text, 0), g.size(text, 1)
        x = g.cast(text, self._dtype) if self._dtype != np.float32 else text
        x = linear(g, x, "text_proj.weight", self.tensors, self.precision, (config.n_embd, config.text_dim), 0)
        x = g.node("Add", x, self._plain(g, "text_proj.bias"))
        at = g.range(width)
        positions = g.node("Expand", g.node("Unsqueeze", at, g.const([0])), self._pair(g, rows, width))
        real = g.node("Less", g.reshape(at, 1, 1, 1, -1), g.reshape(lengths, -1, 1, 1, 1))
        visible = g.node("Expand", real, g.node("Concat", rows, g.const([1]), width, width, axis=0))
        x = self._blocks(g, x, self._attention(g, past, positions, visible, over_text=True))
        last = g.node("Sub", lengths, g.const(1))
        index = g.node("Concat", g.reshape(g.range(rows), -1, 1), g.reshape(last, -1, 1), axis=1)
        self._logits(g, g.node("GatherND", x, index))
        return g

    def decode(self, weights: Weights) -> Graph:
        """One token ``[B, 1]`` a row at positions ``[B, 1]``; logits of the next."""
        g = Graph("decode", weights, self.opset)
        tokens = g.input("input_ids", np.int64, ["batch", 1])
        positions = g.input("position_ids", np.int64, ["batch", 1])
        past = self._past(g)
        x = self._embedded(g, tokens)
        if self._one_operator:
            attend = self._step_attention(g, past, positions)
        else:
            visible = g.node("LessOrEqual", self._keys(g, past), g.reshape(positions, -1, 1, 1, 1))
            attend = self._attention(g, past, positions, visible, over_text=False)
        x = self._blocks(g, x, attend)
        self._logits(g, g.node("Squeeze", x, g.const([1])))
        return g

    def extend(self, weights: Weights) -> Graph:
        """Both in one: projected text ``[B, L, d]``, then tokens ``[B, M]``, at successive positions ``[B, L + M]``.

        Logits after the last one. A text sees all of itself, so it starts at position 0; without one, L = 0, M tokens
        follow what the cache holds. L = 0 and M = 1 is a decode step.
        """
        g = Graph("extend", weights, self.opset)
        text = g.input("text_embeds", self._dtype, ["batch", "text", self.config.n_embd])
        tokens = g.input("input_ids", np.int64, ["batch", "tokens"])
        positions = g.input("position_ids", np.int64, ["batch", "positions"])
        past = self._past(g)
        x = g.node("Concat", text, self._embedded(g, tokens), axis=1)
        last = g.node("Max", positions, g.node("Sub", g.size(text, 1), g.const([1])))
        visible = g.node("LessOrEqual", self._keys(g, past), g.node("Unsqueeze", last, g.const([1, 3])))
        x = self._blocks(g, x, self._attention(g, past, positions, visible, over_text=False))
        self._logits(g, g.node("Gather", x, g.const(-1), axis=1))
        return g

    def _embedded(self, g: Graph, tokens: str) -> str:
        stored = self.precision.storage
        x = g.node("Gather", g.weight("embed.weight", lambda: self._stored("embed.weight", stored)), tokens)
        return g.cast(x, self._dtype) if stored != self._dtype else x

    @staticmethod
    def _keys(g: Graph, past: list[tuple[str, str]]) -> str:
        """The cache's positions, ``[1, 1, 1, S]``."""
        return g.reshape(g.range(g.size(past[0][0], 2)), 1, 1, 1, -1)

    @property
    def _dtype(self) -> np.dtype:
        return self.precision.activations

    def _stored(self, name: str, dtype: np.dtype) -> np.ndarray:
        return to_numpy(self.tensors(name), dtype, name)

    def _plain(self, g: Graph, name: str) -> str:
        """A vector of the model in the activations' dtype."""
        return g.weight(name, lambda: self._stored(name, self._dtype))

    @staticmethod
    def _pair(g: Graph, first: str, second: str) -> str:
        return g.node("Concat", first, second, axis=0)

    def _past(self, g: Graph) -> list[tuple[str, str]]:
        shape = self._cache_shape
        return [
            (
                g.input(f"past_key_values.{i}.key", self.kv_dtype, shape),
                g.input(f"past_key_values.{i}.value", self.kv_dtype, shape),
            )
            for i in range(self.config.n_layer)
        ]

    @property
    def _cache_shape(self) -> list[int | str]:
        return ["batch", self.config.n_head, self.capacity or "capacity", self.config.head_dim]

    def _index(self, g: Graph, positions: str) -> str:
        """Where the cache is written for successive positions ``[B, T]``.

        For ScatterND (row, head, position), ``[B, H, T, 3]``; for TensorScatter each row's first position ``[B]``.
        """
        if self.capacity is not None:
            return g.node("Squeeze", g.slice(positions, 1, 0, 1), g.const([1]))
        heads = self.config.n_head
        rows, width = g.size(positions, 0), g.size(positions, 1)
        shape = g.node("Concat", rows, g.const([heads]), width, g.const([1]), axis=0)
        parts = (
            g.reshape(g.range(rows), -1, 1, 1, 1),
            g.const(np.arange(heads).reshape(1, -1, 1, 1)),
            g.node("Unsqueeze", positions, g.const([1, 3])),
        )
        return g.node("Concat", *(g.node("Expand", part, shape) for part in parts), axis=-1)

    def _table(self, g: Graph) -> tuple[str, str]:
        config = self.config

        def part(which: int) -> np.ndarray:
            return rotary_table(config.block_size, config.head_dim, config.rope)[..., which].numpy()

        return g.weight("rotary.cos", lambda: part(0)), g.weight("rotary.sin", lambda: part(1))

    def _write(self, g: Graph, past: str, index: str, value: str, name: str) -> str:
        """The cache with ``value`` written; also the output ``name``."""
        if self.kv_dtype != self._dtype:
            value = g.cast(value, self.kv_dtype)
        if self.capacity is None:
            written = g.node("ScatterND", past, index, value)
        else:
            written = g.node("TensorScatter", past, value, index, axis=2)
        g.output(written, name, self.kv_dtype, self._cache_shape)
        return name

    @property
    def _for_ort(self) -> bool:
        """Whether nothing but ONNX Runtime could run the graph."""
        return self.contrib or (self.precision.bits > 0 and self.precision.target == "ort")

    @property
    def _one_operator(self) -> bool:
        """Whether a step's attention is one operator of ONNX Runtime, whose MatMulNBits the graph has anyway."""
        return self._for_ort and self.kv_dtype == self._dtype and cached_heads(self.config.head_dim)

    def _step_attention(self, g: Graph, past: list[tuple[str, str]], positions: str) -> Attend:
        """Of one token a row: GroupQueryAttention writes the cache and reads it as far as it is filled."""
        config, table = self.config, self._table(g)
        last = g.cast(g.reshape(positions, -1), np.int32)
        filled = g.node("Add", g.node("ReduceMax", last, keepdims=0), g.const(1, np.int32))

        def attend(layer: int, qkv: str) -> str:
            mixed, *cache = cached_attention(g, qkv, past[layer], last, filled, table, config.n_head, config.head_dim)
            for value, kind in zip(cache, ("key", "value"), strict=True):
                g.output(value, f"present.{layer}.{kind}", self.kv_dtype, self._cache_shape)
            return mixed

        return attend

    def _attention(
        self, g: Graph, past: list[tuple[str, str]], positions: str, visible: str, *, over_text: bool
    ) -> Attend:
        """In standard operators. over_text attends over the new positions alone."""
        config, dtype = self.config, self._dtype
        heads, width = config.n_head, config.n_embd
        index, table = self._index(g, positions), self._table(g)

        def attend(layer: int, qkv: str) -> str:
            split = g.transpose(g.reshape(qkv, 0, 0, 3 * heads, config.head_dim), 0, 2, 1, 3)
            qk, v = g.nodes("Split", [split, g.const([2 * heads, heads])], 2, axis=1)
            wide = g.cast(qk, np.float32) if dtype != np.float32 else qk
            turned = rotate(g, wide, table, positions, config.head_dim // 2)
            turned = g.cast(turned, dtype) if dtype != np.float32 else turned
            q, k = g.nodes("Split", [turned], 2, axis=1, num_outputs=2)
            keys, values = (
                self._write(g, old, index, new, f"present.{layer}.{kind}")
                for old, new, kind in zip(past[layer], (k, v), ("key", "value"), strict=True)
            )
            if over_text:
                keys, values = k, v
            elif self.kv_dtype != dtype:
                keys, values = g.cast(keys, dtype), g.cast(values, dtype)
            mixed = attention(g, q, keys, values, visible, config.head_dim, dtype, target=self.precision.target)
            return g.reshape(g.transpose(mixed, 0, 2, 1, 3), 0, 0, width)

        return attend

    def _blocks(self, g: Graph, x: str, attend: Attend) -> str:
        """The residual stream ``[B, T, d]`` after all layers."""
        config, dtype = self.config, self._dtype
        width, bits = config.n_embd, self.precision.bits

        def product(value: str, name: str, rows: int, columns: int) -> str:
            return linear(g, value, name, self.tensors, self.precision, (rows, columns), bits)

        def normed_sum(x: str, more: str | None, name: str) -> tuple[str, str]:
            scale = self._plain(g, name)
            if more is not None and self._for_ort:
                return add_rms_norm(g, x, more, scale)
            x = x if more is None else g.node("Add", x, more)
            return x, rms_norm(g, x, scale, dtype)

        more: str | None = None  # the last product, which the stream lacks
        for i in range(config.n_layer):
            block = f"blocks.{i}"
            x, normed = normed_sum(x, more, f"{block}.attn_norm.scale")
            joined = attend(i, product(normed, f"{block}.qkv.weight", 3 * width, width))
            more = product(joined, f"{block}.attn_out.weight", width, width)
            x, normed = normed_sum(x, more, f"{block}.mlp_norm.scale")
            both = product(normed, f"{block}.gate_up.weight", 2 * config.mlp_width, width)
            gate, up = g.nodes("Split", [both], 2, axis=-1, num_outputs=2)
            hidden = g.node("Mul", silu(g, gate), up)
            more = product(hidden, f"{block}.down.weight", width, config.mlp_width)
        return x if more is None else g.node("Add", x, more)

    def _logits(self, g: Graph, x: str) -> None:
        """``x [B, d]`` through the last norm and the head; fp32."""
        config, bits = self.config, self.precision.bits
        normed = rms_norm(g, x, self._plain(g, "norm.scale"), self._dtype)
        name = "embed.weight" if config.tie_weights else "head.weight"
        if config.tie_weights and not bits:
            # The embedding is in the file already, as it lies: rows are classes.
            table = g.weight(name, lambda: self._stored(name, self._dtype))
            logits = g.node("Gemm", normed, table, transB=1)
        else:
            # The head decides which token is drawn, so it keeps 8 bits where the blocks have 4.
            shape = (config.head_rows, config.n_embd)
            logits = linear(g, normed, name, self.tensors, self.precision, shape, 8 if bits else 0)
        if self._dtype != np.float32:
            logits = g.cast(logits, np.float32)
        g.output(logits, "logits", np.float32, ["batch", config.head_rows])


def module_tensors(module: object) -> Tensors:
    """The weights of a loaded module by name."""
    state: dict[str, Tensor] = module.state_dict()  # type: ignore[attr-defined]
    return state.__getitem__
