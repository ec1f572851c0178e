"""The LLaMA-style decoder that writes motion tokens after a text prefix (MotionMillion, section 3)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kinetok.errors import UserError
from kinetok.kernels.attention import attention, prefix_mask
from kinetok.kernels.gating import swiglu
from kinetok.kernels.norm import rms_norm
from kinetok.kernels.rotary import apply_rotary, rotary_table
from kinetok.model.config import DecoderConfig
from kinetok.model.kv_cache import KVCache


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale ``[d]``, eps 1e-5, in the activations' dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale)


class Block(nn.Module):
    """x += out(attention(norm x)); x += down(silu(gate h) * up h), h = norm x.

    ``qkv`` holds the rows of q, k and v, ``gate_up`` those of gate and up: one product each.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.n_embd
        self.heads = config.n_head
        self.attn_norm, self.mlp_norm = RMSNorm(width), RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        drop: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Tensor:
        """Both branches on ``x [B, T, d]``; attend mixes v by q and k (as ``project`` gives them), drop acts on a branch."""
        x = x + drop(self.mix(attend(*self.project(x, table))))
        return x + drop(self.mlp(x))

    def project(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q, k and plain v, each ``[B, H, T, hd]``, of ``x [B, T, d]``; table ``[B or 1, T, hd / 2, 2]``."""
        q, k, v = self.qkv(self.attn_norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return (
            apply_rotary(q, table).transpose(1, 2),
            apply_rotary(k, table).transpose(1, 2),
            v.transpose(1, 2),
        )

    def mix(self, mixed: Tensor) -> Tensor:
        """The attention branch's output ``[B, T, d]`` of mixed values ``[B, H, T, hd]``."""
        return self.attn_out(mixed.transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(self.mlp_norm(x))))


class MotionDecoder(nn.Module):
    """Text prefix and motion tokens to logits over ``codebook`` tokens and the end.

    Two layouts: ``forward`` is the training one (whole sequences, logits everywhere); ``prefill`` and ``decode_step``
    keep keys and values in a ``KVCache`` and send one position a row through the head.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        weight = torch.empty(config.vocab_size, config.n_embd)
        if not weight.is_meta:  # drawing numbers on the meta device makes torch import its compiler, for seconds
            nn.init.normal_(weight)
        self.embed = nn.Embedding(config.vocab_size, config.n_embd, _weight=weight)
        self.text_proj = nn.Linear(config.text_dim, config.n_embd)
        self.blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(config) for _ in range(config.n_layer)
        )
        self.norm = RMSNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.head_rows, bias=False)
        if config.tie_weights:
            self.head.weight = self.embed.weight
        self._table: Tensor | None = None

    def rotary(self) -> Tensor:
        """The rotary table ``[block_size, hd / 2, 2]`` in fp32 on the weights' device; built once, never stored."""
        device = self.embed.weight.device
        if self._table is None or self._table.device != device:
            # Kept for later calls, which may train: a tensor made in inference mode could not take part in that.
            with torch.inference_mode(False):
                table = rotary_table(self.config.block_size, self.config.head_dim, self.config.rope)
                self._table = table.to(device)
        return self._table

    @torch.no_grad()
    def lay_out_for_single_rows(self) -> None:
        """Store weights with more rows than columns column by column: values, names and shapes stay as they are.

        A CPU multiplies one position by such a weight at the speed at which it reads, and by torch's own layout at
        0.6 of it (0.45 of it for the default model's head). The order of the sums changes with the layout.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.out_features > module.in_features:
                module.weight.data = module.weight.data.T.contiguous().T

    def forward(self, tokens: Tensor, text_features: Tensor, text_mask: Tensor, *, dropout: float = 0.0) -> Tensor:
        """Logits ``[B, T, head_rows]`` in the training layout: the head on ``states``."""
        return self.head(self.states(tokens, text_features, text_mask, dropout=dropout))

    def states(self, tokens: Tensor, text_features: Tensor, text_mask: Tensor, *, dropout: float = 0.0) -> Tensor:
        """What the head multiplies, ``[B, T, d]``, in the training layout (section 3).

        tokens ``[B, T]`` integer: n pads for an item's n text tokens, motion, end, pads. text_features ``[B, L, D]`` and
        text_mask ``[B, L]`` (1 for a real one, real ones first): where the mask is 1 the embedding is replaced by the
        projected feature; a shorter item's motion starts right after its own text. dropout acts on the embeddings
        and the residual branches in training mode. Raises ``UserError`` for more than ``block_size`` positions.
        """
        positions, width = tokens.shape[1], text_features.shape[1]
        if positions > self.config.block_size or width > positions:
            raise UserError(
                f"expected {width} text positions within at most {self.config.block_size} in all, got {positions}"
            )

        def drop(value: Tensor) -> Tensor:
            return F.dropout(value, dropout, self.training) if dropout else value

        real = F.pad(text_mask.bool(), (0, positions - width))
        text = F.pad(self._text(text_features), (0, 0, 0, positions - width))
        x = drop(torch.where(real[..., None], text, self.embed(tokens)))
        visible = prefix_mask(text_mask.sum(1), positions)
        table = self.rotary()[None, :positions]
        for block in self.blocks:
            x = block(x, table, lambda q, k, v: attention(q, k, v, visible), drop)
        return self.norm(x)

    def _text(self, features: Tensor) -> Tensor:
        return self.text_proj(features.to(self.text_proj.weight.dtype))

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for ``batch`` rows of at most ``capacity`` positions. ``UserError`` beyond ``block_size``."""
        config = self.config
        if not 0 < capacity <= config.block_size:
            raise UserError(f"text and motion need {capacity} positions, but this model has {config.block_size}")
        weight = self.embed.weight
        shape = (config.n_layer, batch, config.n_head, capacity, config.head_dim)
        return KVCache(shape, device=weight.device, dtype=weight.dtype)

    def prefill(self, features: Sequence[Tensor], cache: KVCache) -> Tensor:
        """Fill an empty cache with text, a tensor ``[L_b, D]`` a row; returns the last positions' logits ``[B, rows]``."""
        lengths = [len(row) for row in features]
        if not all(lengths):
            raise UserError("expected at least one text feature a prompt, got none")
        longest = max(lengths)
        x = self._text(nn.utils.rnn.pad_sequence(list(features), batch_first=True).to(self.embed.weight.device))
        visible = None
        if min(lengths) < longest:
            at = torch.arange(longest, device=x.device)
            visible = (at < torch.tensor(lengths, device=x.device)[:, None])[:, None, None]
        table = self.rotary()[None, :longest]
        for layer, block in enumerate(self.blocks):
            q, k, v = block.project(x, table)
            cache.fill(layer, k, v)
            x = x + block.mix(attention(q, k, v, visible))
            x = x + block.mlp(x)
        cache.lengths = lengths
        last = x[torch.arange(len(lengths), device=x.device), torch.tensor(lengths, device=x.device) - 1]
        return self.head(self.norm(last))

    def decode_step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append one token a row, ``[B]``; returns the logits of the next, ``[B, rows]``."""
        x = self.embed(tokens)[:, None]
        at, visible = cache.advance()
        table = self.rotary()[at][:, None]
        for layer, block in enumerate(self.blocks):
            q, k, v = block.project(x, table)
            x = x + block.mix(attention(q, *cache.append(layer, k, v, at), visible))
            x = x + block.mlp(x)
        return self.head(self.norm(x[:, 0]))
