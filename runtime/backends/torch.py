"""The eager backend: plain torch, on a CPU or a GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kinetok.errors import UserError
from kinetok.kernels.attention import attention, prefix_mask
from kinetok.kernels.rotary import apply_rotary
from kinetok.model.decoder import MotionDecoder
from kinetok.runtime.memory import cache_bytes, within_memory


class TorchBackend:
    """``Backend`` on the decoder's own weights; the slab is ``[2, layers, slots, H, capacity, hd]`` in their dtype.

    Every row is a product of its own and attends over its own length, so its bits do not depend on the others
    (docs/numerics.md); norms and rotations work on all rows at once.
    """

    def __init__(self, decoder: MotionDecoder, slots: int, capacity: int, kv: torch.dtype | None = None) -> None:
        config, weight = decoder.config, decoder.embed.weight
        if slots < 1 or not 0 < capacity <= config.block_size:
            raise UserError(
                f"expected at least one slot and 1 to {config.block_size} positions, got {slots} and {capacity}"
            )
        self.decoder, self.slots, self.capacity, self.device = decoder, slots, capacity, weight.device
        if self.device.type == "cpu":
            decoder.lay_out_for_single_rows()
        shape = (2, config.n_layer, slots, config.n_head, capacity, config.head_dim)
        kv = kv or weight.dtype  # another one is for subclasses that can read it
        need = cache_bytes(config, slots, capacity, kv.itemsize)
        with within_memory(f"a cache of {slots} rows of {capacity} positions", need, weight.device, rows=slots):
            self.slab = torch.zeros(shape, device=weight.device, dtype=kv)
        self.lengths = [0] * slots

    @torch.inference_mode()
    def prefill(self, slot: int, text: Tensor, tokens: Sequence[int] = ()) -> Tensor:
        self._check_prefill(text, tokens)
        decoder, length = self.decoder, len(text) + len(tokens)
        x = decoder.text_proj(text.to(self.device, decoder.text_proj.weight.dtype))
        visible = None
        if tokens:
            x = torch.cat((x, decoder.embed(torch.tensor(list(tokens), device=self.device))))
            visible = prefix_mask(torch.tensor([len(text)], device=self.device), length)
        x = x[None]
        table = decoder.rotary()[None, :length]
        for layer, block in enumerate(decoder.blocks):
            q, k, v = block.project(x, table)
            self.slab[0, layer, slot, :, :length] = k[0]
            self.slab[1, layer, slot, :, :length] = v[0]
            x = x + block.mix(attention(q, k, v, visible))
            x = x + block.mlp(x)
        self.lengths[slot] = length
        return decoder.head(decoder.norm(x[:, -1]))[0].float()

    def _check_prefill(self, text: Tensor, tokens: Sequence[int]) -> None:
        if not len(text) or len(text) + len(tokens) > self.capacity:
            raise UserError(
                f"expected 1 to {self.capacity} positions of text and motion, text among them, got {len(text)} of text "
                f"and {len(tokens)} of motion"
            )

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], tokens: Tensor) -> Tensor:
        decoder, config = self.decoder, self.decoder.config
        at = [self.lengths[slot] for slot in slots]
        if max(at, default=0) >= self.capacity:
            raise UserError(f"a slot holds {self.capacity} positions and is full")
        x = decoder.embed(tokens)
        table = decoder.rotary()[torch.tensor(at, device=self.device)][:, None]
        for layer, block in enumerate(decoder.blocks):
            qkv = _product(block.attn_norm(x), block.qkv).view(len(x), 1, 3, config.n_head, config.head_dim)
            q, k = apply_rotary(qkv[:, :, :2].flatten(2, 3), table)[:, 0].unflatten(1, (2, -1)).unbind(1)
            v = qkv[:, 0, 2]
            mixed = torch.empty_like(q)
            for row, (slot, position) in enumerate(zip(slots, at, strict=True)):
                keys, values = self.slab[0, layer, slot], self.slab[1, layer, slot]
                keys[:, position], values[:, position] = k[row], v[row]
                seen = (part[None, :, : position + 1] for part in (keys, values))
                mixed[row] = attention(q[None, row, :, None], *seen)[0, :, 0]
            x = x + _product(mixed.flatten(1), block.attn_out)
            gate, up = _product(block.mlp_norm(x), block.gate_up).chunk(2, dim=-1)
            x = x + _product(F.silu(gate) * up, block.down)
        for slot in slots:
            self.lengths[slot] += 1
        return _product(decoder.norm(x), decoder.head).float()

    @torch.inference_mode()
    def copy(self, source: int, target: int) -> None:
        length = self.lengths[source]
        self.slab[:, :, target, :, :length] = self.slab[:, :, source, :, :length]
        self.lengths[target] = length


def _product(x: Tensor, layer: nn.Module) -> Tensor:
    """``layer`` of each row of ``x [n, K]`` by itself: a single product of all rows would sum in an order that depends on
    how many there are. Packed weights see to that themselves."""
    if not isinstance(layer, nn.Linear):
        return layer(x)
    if x.is_cuda:
        return torch.bmm(x[:, None], layer.weight.T.expand(len(x), -1, -1))[:, 0]
    # A batched product of weights that lie column by column does not keep a row's bits; products one by one do.
    return layer(x) if len(x) == 1 else torch.cat([layer(row) for row in x.split(1)])
