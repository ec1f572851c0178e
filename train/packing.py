"""Sequences one after another without padding: every position of a batch is one that counts (section 3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kinetok.errors import UserError
from kinetok.kernels.attention import prefix_attention
from kinetok.kernels.cross_entropy import linear_cross_entropy
from kinetok.model.config import DecoderConfig
from kinetok.model.decoder import MotionDecoder, RMSNorm

IGNORED = -100


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """B sequences of ``lengths [B]`` positions, of which the first ``text_lengths [B]`` are text: N positions in all.

    tokens, targets int64 ``[N]`` (pads where text is, ``IGNORED`` where nothing is predicted); text ``[M, D]``, the features
    of all text positions; text_at int64 ``[M]``, where they go; slot int64 ``[N]``, each position's place among B x longest;
    at int64 ``[N]``, its number in its sequence. longest is the length of the longest sequence.
    """

    tokens: Tensor
    targets: Tensor
    text: Tensor
    text_at: Tensor
    slot: Tensor
    at: Tensor
    text_lengths: Tensor
    lengths: Tensor
    longest: int

    @property
    def targets_counted(self) -> int:
        """How many positions predict something: a sequence's tokens and its end."""
        return int((self.lengths - self.text_lengths).sum())

    def to(self, device: torch.device) -> "PackedBatch":
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self) if f.name != "longest"
        }
        return replace(self, **moved)


def pack(items: Sequence[tuple[Tensor, Tensor]], config: DecoderConfig) -> PackedBatch:
    """(text features ``[L, D]``, motion tokens ``[m]``) of whole clips to a batch; each ends with the end token.

    Raises ``UserError`` for no items, an item without text, and one longer than ``block_size``.
    """
    if not items:
        raise UserError("expected at least one sequence to pack, got none")
    texts, motions = zip(*items, strict=True)
    text_lengths, counts = (torch.tensor([len(part) for part in parts]) for parts in (texts, motions))
    return pack_rows(torch.cat(texts), text_lengths, torch.cat(motions), counts, config)


def pack_rows(text: Tensor, text_lengths: Tensor, motion: Tensor, counts: Tensor, config: DecoderConfig) -> PackedBatch:
    """``pack`` of clips that follow each other: ``text [M, D]`` and ``motion [K]``, of each ``text_lengths [B]`` features
    and ``counts [B]`` tokens."""
    lengths = text_lengths + counts + 1
    longest, total = int(lengths.max()), int(lengths.sum())
    if longest > config.block_size or int(text_lengths.min()) < 1:
        raise UserError(
            f"expected 1 text feature or more and at most {config.block_size} positions a sequence, "
            f"got {int(text_lengths.min())} and {longest}"
        )
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    at = torch.arange(total) - (lengths.cumsum(0) - lengths)[rows]
    is_text = at < text_lengths[rows]
    is_end = at == lengths[rows] - 1
    tokens = torch.full((total,), config.pad_id)
    tokens[~(is_text | is_end)] = motion
    tokens[is_end] = config.end_id
    # Each position from the last of the text on predicts the next one.
    predicts = (at >= text_lengths[rows] - 1) & ~is_end
    targets = torch.where(predicts, tokens.roll(-1), IGNORED)
    return PackedBatch(
        tokens=tokens,
        targets=targets,
        text=text,
        text_at=is_text.nonzero()[:, 0],
        slot=rows * longest + at,
        at=at,
        text_lengths=text_lengths,
        lengths=lengths,
        longest=longest,
    )


class PackedDecoder(nn.Module):
    """A decoder on packed batches: products, norms and the head see N positions; attention alone sees rows.

    checkpointing: keep the blocks' inputs only, and compute the rest again in the backward pass.
    """

    def __init__(self, decoder: MotionDecoder, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.decoder = decoder
        self.checkpointing = checkpointing

    def states(self, batch: PackedBatch) -> Tensor:
        """What the head multiplies, ``[N, d]``."""
        decoder = self.decoder
        x = decoder.embed(batch.tokens)
        text = decoder.text_proj(batch.text.to(decoder.text_proj.weight.dtype))
        x = x.index_copy(0, batch.text_at, text.to(x.dtype))[None]
        table = decoder.rotary()[batch.at][None]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """``[1, H, N, hd]`` through the operator's ragged rows and back."""
            rows = len(batch.lengths)

            def ragged(y: Tensor) -> Tensor:
                y = y[0].transpose(0, 1)
                room = y.new_zeros(rows * batch.longest, *y.shape[1:])
                return room.index_put((batch.slot,), y).unflatten(0, (rows, batch.longest))

            mixed = prefix_attention(ragged(q), ragged(k), ragged(v), batch.text_lengths, batch.lengths)
            return mixed.flatten(0, 1)[batch.slot].transpose(0, 1)[None]

        for block in decoder.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, table, attend, use_reentrant=False)
            else:
                x = block(x, table, attend)
        return decoder.norm(x)[0]

    def forward(self, batch: PackedBatch) -> Tensor:
        """Mean cross-entropy over the targets that count, a scalar in fp32 (fp64 in fp64)."""
        return linear_cross_entropy(self.states(batch), self.decoder.head.weight, batch.targets, IGNORED)


def fill(part: nn.Module) -> None:
    """Give a part of a decoder on the meta device its first weights: N(0, 0.02), norms 1, biases 0."""
    part.to_empty(device="cpu")
    for parameter in part.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.zeros_(parameter)
    for module in part.modules():
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.scale)


def fill_rest(module: PackedDecoder, fill: Callable[[nn.Module], None]) -> None:
    """``fill`` everything outside of the blocks."""
    decoder = module.decoder
    for part in (decoder.embed, decoder.text_proj, decoder.norm, decoder.head):
        fill(part)
    if decoder.config.tie_weights:
        decoder.head.weight = decoder.embed.weight
