"""A decoder whose products are packed: the tiles of ``kinetok.kernels.linear`` in place of weights, quantised or not."""

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kinetok.errors import UserError
from kinetok.kernels.linear import PackedWeight, linear, pack, unpack
from kinetok.kernels.linear.packing import BATCH, FLOATS, GROUPS, LEAST_BATCH_TILE, ROWS, tile_columns
from kinetok.model.config import _Config
from kinetok.model.decoder import MotionDecoder

KINDS = ("int8", "int4", "fp8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantisation(_Config):
    """kind: "int8", "int4" or "fp8"; group: columns that share a scale, 0 for one scale a row (``linear.pack``).

    The head is int8 where the blocks are grouped: its rows decide between neighbouring tokens.
    """

    kind: str
    group: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"quantisation: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        allowed = GROUPS.get(self.kind, (0,))
        if self.group not in allowed or isinstance(self.group, bool):
            raise UserError(f"quantisation: expected a group of {allowed} for {self.kind}, got {self.group!r}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class PackedLinear(nn.Module):
    """``nn.Linear`` without bias on packed words, which stay packed in memory and in the state.

    paired: gate and up rows alternate in the words; what comes out has the gates first, as the unpacked product does.
    """

    packed_words: Tensor
    packed_scale: Tensor | None

    def __init__(self, rows: int, columns: int, kind: str, group: int, *, paired: bool = False) -> None:
        super().__init__()
        self.rows, self.columns, self.kind, self.group, self.paired = rows, columns, kind, group, paired
        tiles, width = 2 * -(-rows // (2 * ROWS)), tile_columns(kind)
        across = -(-columns // width)
        if kind in FLOATS:
            words, scale = torch.empty(tiles, across, ROWS, width, dtype=FLOATS[kind]), None
        else:
            words = torch.empty(tiles, across, ROWS, width // (8 if kind == "int4" else 4), dtype=torch.int32)
            groups = across * width // group if group else 0
            scale = torch.empty(tiles, groups, ROWS, dtype=torch.bfloat16) if group else torch.empty(tiles * ROWS)
        self.register_buffer("packed_words", words)
        self.register_buffer("packed_scale", scale)
        self._packed: PackedWeight | None = None

    @classmethod
    def of(
        cls, weight: Tensor, kind: str, group: int, *, norm_scale: Tensor | None = None, paired: bool = False
    ) -> "PackedLinear":
        """Pack a weight ``[N, K]``, by ``kernels.linear.pack``; norm_scale ``[K]`` is multiplied in first."""
        packed = pack(weight, kind, group=group, norm_scale=norm_scale, paired=paired)
        with torch.device("meta"):
            made = cls(packed.rows, packed.columns, kind, group, paired=paired)
        assert packed.data.shape == made.packed_words.shape
        made.packed_words, made.packed_scale = packed.data, packed.scale
        return made

    @property
    def packed(self) -> PackedWeight:
        """The words as the kernels take them."""
        words = self.packed_words
        if self._packed is None or self._packed.data is not words or self._packed.scale is not self.packed_scale:
            self._packed = PackedWeight(
                kind=self.kind,
                group=self.group,
                rows=self.rows,
                columns=self.columns,
                paired=self.paired,
                data=words,
                scale=self.packed_scale,
                counters=torch.zeros(len(words) * (BATCH // LEAST_BATCH_TILE), dtype=torch.int32, device=words.device),
            )
        return self._packed

    @property
    def weight(self) -> Tensor:
        """The weight that the words stand for, fp32 ``[N, K]``, unpacked anew at each call."""
        return unpack(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]``; a row's bits do not depend on the other rows."""
        y = linear(x.reshape(-1, self.columns), self.packed)
        if self.paired:
            y = y.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1)
        return y.unflatten(0, x.shape[:-1])


def _layers(decoder: MotionDecoder, kind: str, group: int) -> list[tuple[nn.Module, str, str, int, nn.Module | None]]:
    """Products to pack: owner, name, kind, group, and the norm before it, whose scale goes into the words."""
    found: list[tuple[nn.Module, str, str, int, nn.Module | None]] = []
    for block in decoder.blocks:
        found += [
            (block, "qkv", kind, group, block.attn_norm),
            (block, "attn_out", kind, group, None),
            (block, "gate_up", kind, group, block.mlp_norm),
            (block, "down", kind, group, None),
        ]
    if not decoder.config.tie_weights:  # a tied head is the embedding, which is looked up row by row
        found.append((decoder, "head", "int8" if group else kind, 0, decoder.norm))
    return found


def quantise(decoder: MotionDecoder, quantisation: Quantisation) -> MotionDecoder:
    """A copy whose products are packed; the scales of the norms before them are inside and stand at 1. No gradients."""
    made = copy.deepcopy(decoder)
    _pack(made, quantisation.kind, quantisation.group)
    return made


def pack_in_place(decoder: MotionDecoder) -> None:
    """Pack plain products in their own dtype, one after the other, so that there are never two copies of a decoder.

    What is packed already stays as it is. As ``quantise`` otherwise. Raises ``UserError`` for weights in float64.
    """
    kind = {dtype: name for name, dtype in FLOATS.items()}.get(decoder.embed.weight.dtype)
    if kind is None:
        raise UserError(f"expected weights in {', '.join(FLOATS)} to pack, got {decoder.embed.weight.dtype}")
    _pack(decoder, kind, 0)


@torch.no_grad()
def _pack(decoder: MotionDecoder, kind: str, group: int) -> None:
    decoder.requires_grad_(False)
    for owner, name, kind_, group_, norm in _layers(decoder, kind, group):
        layer, scale = getattr(owner, name), norm.scale if norm is not None else None
        if isinstance(layer, PackedLinear):
            continue
        made = PackedLinear.of(layer.weight, kind_, group_, norm_scale=scale, paired=name == "gate_up")  # type: ignore[arg-type]
        setattr(owner, name, made)
        if scale is not None:
            scale.fill_(1)  # type: ignore[operator]


def unpacked(decoder: MotionDecoder) -> MotionDecoder:
    """A copy whose products hold the values that the words stand for, in the decoder's dtype."""
    made = copy.deepcopy(decoder)
    unpack_in_place(made)
    return made


@torch.no_grad()
def unpack_in_place(decoder: MotionDecoder) -> None:
    """The same without a copy: one layer's words after the other make room for its values."""
    for owner in decoder.modules():
        for name, layer in list(owner.named_children()):
            if isinstance(layer, PackedLinear):
                with torch.device("meta"):
                    plain = nn.Linear(layer.columns, layer.rows, bias=False)
                plain.weight = nn.Parameter(layer.weight.to(decoder.embed.weight.dtype), requires_grad=False)
                setattr(owner, name, plain)


def parameter_count(net: nn.Module) -> int:
    """Numbers of a network, those that packed products stand for among them."""
    packed = [layer for layer in net.modules() if isinstance(layer, PackedLinear)]
    return sum(p.numel() for p in net.parameters()) + sum(layer.rows * layer.columns for layer in packed)


def unpacked_bytes(decoder: MotionDecoder) -> int:
    """Bytes of the products' values, in the decoder's dtype."""
    layers = [layer for layer in decoder.modules() if isinstance(layer, PackedLinear)]
    return sum(layer.rows * layer.columns for layer in layers) * decoder.embed.weight.dtype.itemsize


def hollow(decoder: MotionDecoder, quantisation: Quantisation) -> MotionDecoder:
    """Put packed products, not yet filled, into a decoder that was just built; returns it."""
    for owner, name, kind, group, _ in _layers(decoder, quantisation.kind, quantisation.group):
        old = getattr(owner, name)
        setattr(owner, name, PackedLinear(old.out_features, old.in_features, kind, group, paired=name == "gate_up"))
    return decoder
