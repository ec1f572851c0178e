"""Weights in tiles that a program reads in one piece, as floats, 8 or 4 bits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels.ops import check_device, check_floats

ROWS = 64  # of a tile: the fewest that a Hopper matrix instruction (wgmma) takes
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
ZERO = {"int8": 128, "int4": 8}  # what a stored 0 stands for, negated
GROUPS = {"int8": (0, 64, 128), "int4": (64, 128)}
PROGRAMS = 256  # about two on each multiprocessor of the largest GPUs
LEAST_TILES = 4  # along K for one program: fewer do not fill its pipeline
BATCH = 256  # rows of x in one launch
LEAST_BATCH_TILE = 32  # of those a program takes where there are more than one


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedWeight:
    """A weight ``[rows, columns]`` as tiles of 64 rows that lie in memory one after the other.

    data ``[row tiles, column tiles, 64, words]`` holds ``tile_columns`` numbers of each row; rows and columns are padded with
    zeros to whole tiles, rows to a multiple of 128. Quantised numbers are int32 words of four bytes (int8: q + 128, fp8:
    its bits) or eight nibbles (int4: q + 8): the lowest of each word are the tile's first columns, and so on.
    scale is fp32 ``[padded rows]``, or bf16 ``[row tiles, groups, 64]`` where ``group`` columns share one. paired: gate
    and up rows alternate. counters are zero between products: the programs that share a tile's sum count themselves
    there, so two streams must not multiply by one packed weight at the same time.
    """

    kind: str
    group: int
    rows: int
    columns: int
    paired: bool
    data: Tensor
    scale: Tensor | None
    counters: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads: padding included, counters not."""
        return self.data.nbytes + (self.scale.nbytes if self.scale is not None else 0)

    def check_dtype(self, x: Tensor) -> None:
        """Raises ``UserError`` where ``x`` cannot be multiplied: a float kind takes its own dtype, others any float."""
        if x.dtype not in FLOATS.values() or x.dtype != FLOATS.get(self.kind, x.dtype):
            raise UserError(f"x: expected {FLOATS.get(self.kind, 'a float dtype')}, got {x.dtype}")

    def to(self, device: torch.device) -> "PackedWeight":
        return PackedWeight(
            kind=self.kind,
            group=self.group,
            rows=self.rows,
            columns=self.columns,
            paired=self.paired,
            data=self.data.to(device),
            scale=self.scale.to(device) if self.scale is not None else None,
            counters=self.counters.to(device),
        )


def tile_columns(kind: str) -> int:
    """Columns of a tile: 128 bytes or more of each row, and whole groups."""
    return {"fp32": 64, "int4": 256}.get(kind, 128)


def split_k(rows: int, columns: int, kind: str) -> int:
    """Into how many parts a product's sums along K are cut.

    Chosen by the weight's shape and kind alone, never by the batch, so a row's bits do not depend on the other rows.
    """
    row_tiles, column_tiles = 2 * -(-rows // (2 * ROWS)), -(-columns // tile_columns(kind))
    split = 1
    while row_tiles * split < PROGRAMS and column_tiles // (2 * split) >= LEAST_TILES:
        split *= 2
    return split


def pack(
    weight: Tensor, kind: str, *, group: int = 0, norm_scale: Tensor | None = None, paired: bool = False
) -> PackedWeight:
    """Pack ``weight [N, K]`` for ``linear``.

    kind: "fp32", "fp16" or "bf16" (rounded to nearest), "int8" (a scale a row, or per ``group`` of 64 or 128 columns),
    "int4" (groups of 64 or 128), "fp8" (e4m3, a scale a row). Quantised symmetrically: scale = largest magnitude / 127,
    7 or 448, round to nearest even. norm_scale ``[K]``, the learned scale of the RMSNorm before the product, is
    multiplied in before rounding. paired takes the first half of the rows as gates, the second as ups. Raises
    ``UserError`` for other kinds, groups and shapes, and for weights that are not finite.
    """
    if kind not in FLOATS and kind not in LARGEST:
        raise UserError(f"kind: expected one of {[*FLOATS, *LARGEST]}, got {kind!r}")
    if group not in GROUPS.get(kind, (0,)):
        raise UserError(f"group: expected one of {GROUPS.get(kind, (0,))} for {kind}, got {group}")
    if weight.ndim != 2 or not weight.numel() or (paired and len(weight) % 2):
        raise UserError(f"expected a weight [{'even ' if paired else ''}N, K], got {list(weight.shape)}")
    check_floats(weight=weight, norm_scale=norm_scale)
    check_device(weight, norm_scale)
    rows, columns = weight.shape
    wide = weight.detach().float()
    if norm_scale is not None:
        if norm_scale.shape != (columns,):
            raise UserError(f"expected norm_scale [{columns}], got {list(norm_scale.shape)}")
        wide = wide * norm_scale.detach().float()
    if not wide.isfinite().all():
        raise UserError("expected finite weights, got NaN or infinity")
    if paired:
        wide = wide.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
    width = tile_columns(kind)
    wide = torch.nn.functional.pad(wide, (0, -columns % width, 0, -rows % (2 * ROWS)))
    scale = None
    if kind in FLOATS:
        numbers = wide.to(FLOATS[kind])
    else:
        numbers, scale = _quantise(wide, kind, group)
    tiles = numbers.unflatten(1, (-1, width)).unflatten(0, (-1, ROWS)).transpose(1, 2)
    if scale is not None:
        tiles = _words(tiles, kind)
        scale = scale.unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous() if group else scale[:, 0].contiguous()
    return PackedWeight(
        kind=kind,
        group=group,
        rows=rows,
        columns=columns,
        paired=paired,
        data=tiles.contiguous(),
        scale=scale,
        counters=torch.zeros(len(tiles) * (BATCH // LEAST_BATCH_TILE), dtype=torch.int32, device=weight.device),
    )


def _quantise(wide: Tensor, kind: str, group: int) -> tuple[Tensor, Tensor]:
    """Stored numbers (unsigned bytes) ``[N, K]`` and scales ``[N, groups]`` of fp32 weights."""
    groups = wide.unflatten(1, (-1, group or wide.shape[1]))
    scale = groups.abs().amax(2) / LARGEST[kind]
    if group:
        scale = scale.bfloat16()
    scale = torch.where(scale == 0, 1.0, scale)
    ratio = (groups / scale.float()[..., None]).clamp(-LARGEST[kind], LARGEST[kind]).flatten(1)
    if kind == "fp8":
        return ratio.to(torch.float8_e4m3fn).view(torch.uint8), scale
    return (ratio.round() + ZERO[kind]).to(torch.uint8), scale


def _words(numbers: Tensor, kind: str) -> Tensor:
    """int32 words ``[..., W / 4 or 8]`` of stored numbers ``[..., W]``."""
    if kind == "int4":
        even, odd = numbers.unflatten(-1, (4, 2, -1)).unbind(-2)
        lanes = even | odd << 4
    else:
        lanes = numbers.unflatten(-1, (4, -1))
    return lanes.transpose(-1, -2).contiguous().view(torch.int32).squeeze(-1)


def unpack(packed: PackedWeight) -> Tensor:
    """The weight that ``packed`` stands for: fp32 ``[N, K]``, ``norm_scale`` multiplied in, in the order it was given."""
    weight = dequantise(packed.data, packed.scale, packed.kind, packed.group)[: packed.rows, : packed.columns]
    return weight.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1) if packed.paired else weight


def dequantise(data: Tensor, scale: Tensor | None, kind: str, group: int) -> Tensor:
    """fp32 ``[padded rows, padded columns]`` of ``PackedWeight.data`` and ``scale``, paired rows left as they lie."""
    if scale is None:
        numbers = data.float()
    else:
        lanes = data[..., None].view(torch.uint8).transpose(-1, -2)
        if kind == "int4":
            lanes = torch.stack((lanes & 15, lanes >> 4), dim=-2)
        stored = lanes.flatten(3)
        numbers = stored.view(torch.float8_e4m3fn).float() if kind == "fp8" else stored.float() - ZERO[kind]
    weight = numbers.transpose(1, 2).flatten(2).flatten(0, 1)
    if scale is None:
        return weight
    if not group:
        return weight * scale[:, None]
    return (weight.unflatten(1, (-1, group)) * scale.float().transpose(1, 2).flatten(0, 1)[..., None]).flatten(1)
