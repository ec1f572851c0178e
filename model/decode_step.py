"""Prefill and decode step from packed weights, without a word from the host."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kinetok.kernels.attention import decode_attention, prefix_attention
from kinetok.kernels.linear import PackedWeight, linear, pack
from kinetok.kernels.rotary import apply_rotary, rotary_kv_write
from kinetok.kernels.sampling import SamplingState, greedy_step, sample_step
from kinetok.model.decoder import MotionDecoder, RMSNorm
from kinetok.model.packed import PackedLinear

EPS = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    qkv: PackedWeight
    attn_out: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight


class FusedDecoderStep:
    """``MotionDecoder.decode_step`` from packed copies of the decoder's weights, or from the words of a quantised one
    (section 3).

    kind and group as in ``kinetok.kernels.linear.pack``, of the blocks' products; the head is packed as ``head_kind``. What
    is quantised already stays as it is. The learned scales of the norms are inside the packed weights. Rows stand at
    positions of their own, in a tensor on the device, and a row's bits do not depend on the other rows. Two streams must not
    step with one object at the same time.
    """

    def __init__(self, decoder: MotionDecoder, kind: str, *, group: int = 0, head_kind: str | None = None) -> None:
        def packed(
            layer: nn.Module, norm: RMSNorm | None, kind: str, group: int, *, paired: bool = False
        ) -> PackedWeight:
            if isinstance(layer, PackedLinear):
                return layer.packed
            assert isinstance(layer, nn.Linear)
            return pack(layer.weight, kind, group=group, norm_scale=norm.scale if norm else None, paired=paired)

        self.config = decoder.config
        self.embed = decoder.embed.weight.detach()
        self.table = decoder.rotary()
        self.layers = [
            _Layer(
                qkv=packed(block.qkv, block.attn_norm, kind, group),
                attn_out=packed(block.attn_out, None, kind, group),
                gate_up=packed(block.gate_up, block.mlp_norm, kind, group, paired=True),
                down=packed(block.down, None, kind, group),
            )
            for block in decoder.blocks
        ]
        self.head = packed(decoder.head, decoder.norm, head_kind or (kind if not group else "int8"), 0)

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a step reads, whatever the batch."""
        weights = [w for layer in self.layers for w in (layer.qkv, layer.attn_out, layer.gate_up, layer.down)]
        return sum(weight.nbytes for weight in (*weights, self.head))

    def prefill(
        self, x: Tensor, text_lengths: Tensor, lengths: Tensor, hold: Callable[[int, Tensor, Tensor], None]
    ) -> Tensor:
        """fp32 logits ``[B, head_rows]`` after the last positions of texts and motion, embedded as ``x [B, T, d]``.

        Row b has ``lengths[b]`` positions, ``text_lengths[b]`` of text (both ``[B]`` int64), and padding behind them. A row's
        bits depend neither on the others nor on the padding. hold(layer, k, v) takes a layer's rotated keys and its
        values, ``[B, T, H, hd]``.
        """
        rows, positions, _ = x.shape
        table = self.table[None, :positions]
        x = x.flatten(0, 1)
        for at, layer in enumerate(self.layers):
            qkv = linear(x, layer.qkv, eps=EPS).view(rows, positions, 3, self.config.n_head, -1)
            q, k = apply_rotary(qkv[:, :, :2].flatten(2, 3), table).chunk(2, dim=2)
            hold(at, k, qkv[:, :, 2])
            mixed = prefix_attention(q, k, qkv[:, :, 2], text_lengths, lengths)
            x = linear(mixed.flatten(2).flatten(0, 1), layer.attn_out, residual=x)
            x = linear(linear(x, layer.gate_up, eps=EPS, swiglu=True), layer.down, residual=x)
        last = torch.arange(rows, device=x.device) * positions + lengths - 1
        return linear(x[last], self.head, eps=EPS, wide=True)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        slab: Tensor,
        reach: int | None = None,
        kv_scale: Tensor | None = None,
    ) -> Tensor:
        """The stream ``[B, d]`` before the last norm, in the embedding's dtype.

        tokens ``[B]`` take the positions ``[B]`` (int64; smaller than the capacity) in ``slab [2, layers, B, H, S, hd]``
        (``KVCache.slab``), to which their keys and values are written. reach: how many first positions of the slab attention
        looks at; rows that stand beyond it get no numbers worth having. Any reach gives a row within it the same bits.
        kv_scale ``[layers, 2, B, H]`` fp32, of keys and values, with a slab of float8_e4m3fn and only there.
        """
        x = F.embedding(tokens, self.embed)
        table, lengths = self.table[positions][:, None], positions + 1
        heads = self.config.n_head
        for at, layer in enumerate(self.layers):
            keys, values, scale = slab[0, at], slab[1, at], None if kv_scale is None else kv_scale[at]
            qkv = linear(x, layer.qkv, eps=EPS).view(len(x), 1, 3, heads, -1)
            q = rotary_kv_write(qkv, table, positions, keys, values, scale)
            mixed = decode_attention(q[:, 0], keys[:, :, :reach], values[:, :, :reach], lengths, scale)
            x = linear(mixed.flatten(1), layer.attn_out, residual=x)
            x = linear(linear(x, layer.gate_up, eps=EPS, swiglu=True), layer.down, residual=x)
        return x

    def logits(
        self,
        tokens: Tensor,
        positions: Tensor,
        slab: Tensor,
        reach: int | None = None,
        kv_scale: Tensor | None = None,
    ) -> Tensor:
        """fp32 logits of the next tokens ``[B, head_rows]``; arguments of ``hidden``."""
        return linear(self.hidden(tokens, positions, slab, reach, kv_scale), self.head, eps=EPS, wide=True)

    def greedy(
        self,
        tokens: Tensor,
        positions: Tensor,
        slab: Tensor,
        state: SamplingState,
        reach: int | None = None,
        kv_scale: Tensor | None = None,
    ) -> Tensor:
        """The arg-max tokens ``[B]``, logits not written; moves ``state`` on (``kinetok.kernels.sampling.greedy_step``)."""
        x = self.hidden(tokens, positions, slab, reach, kv_scale)
        return greedy_step(x, self.head, state, end_id=self.config.end_id, pad_id=self._banned, eps=EPS)

    def sample(
        self,
        tokens: Tensor,
        positions: Tensor,
        slab: Tensor,
        state: SamplingState,
        reach: int | None = None,
        kv_scale: Tensor | None = None,
        *,
        empty_at: Tensor | None = None,
    ) -> Tensor:
        """Sampled tokens ``[B]``; moves ``state`` on (``kinetok.kernels.sampling.sample_step``).

        empty_at ``[B]`` int64: the row in which each row's empty text is, for guidance.
        """
        logits = self.logits(tokens, positions, slab, reach, kv_scale)
        return self.draw(logits, state, None if empty_at is None else logits[empty_at])

    def draw(self, logits: Tensor, state: SamplingState, empty: Tensor | None = None) -> Tensor:
        """Tokens ``[B]`` from ``logits`` and the empty texts' ``[B, head_rows]``; moves ``state`` on."""
        return sample_step(logits, state, end_id=self.config.end_id, pad_id=self._banned, empty=empty)

    @property
    def _banned(self) -> int:
        return self.config.pad_id if self.config.tie_weights else -1
