"""Tokens to frames while the tokens are still coming, frame for frame what decoding the whole clip gives (section 2).

Every convolution keeps the inputs it will need again. One that looks ahead runs late by as many steps as it looks ahead, and
what it would compute before the first or after the last step of a clip is zeroed, as the padding of the whole clip is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kinetok.errors import UserError
from kinetok.kernels.fsq import fsq_dequantize
from kinetok.model.config import TokenizerConfig
from kinetok.model.tokenizer import ACTIVATIONS, Conv, MotionTokenizer, Residual

ENDLESS = 1 << 40


@dataclass(frozen=True, slots=True, eq=False)
class _Clock:
    """Where the steps of a push stand in their clips, at one rate: ``first [n]`` is the first one's step, ``end [n]`` where
    the clip is over."""

    first: Tensor
    end: Tensor

    def rated(self, rate: int) -> "_Clock":
        return _Clock(self.first * rate, self.end * rate)

    def inside(self, x: Tensor, late: int) -> Tensor:
        """``x [n, k, C]``, which runs ``late`` steps late, with zeros outside its clip."""
        step = self.first[:, None] - late + torch.arange(x.shape[1], device=x.device)
        return torch.where(((step >= 0) & (step < self.end[:, None]))[..., None], x, 0.0)


class _Line:
    """The last ``span`` steps of what passed, ``[slots, span, C]``."""

    def __init__(self, slots: int, span: int, like: Tensor, channels: int) -> None:
        self.kept = torch.zeros(slots, span, channels, dtype=like.dtype, device=like.device)
        self._new: Tensor | None = None

    def through(self, x: Tensor, slots: Tensor) -> Tensor:
        """``x [n, k, C]`` with the span before it, ``[n, span + k, C]``, the last of which ``keep`` will keep."""
        span = self.kept.shape[1]
        if not span:
            return x
        joined = torch.cat((self.kept[slots], x), dim=1)
        self._new = joined[:, -span:]
        return joined

    def keep(self, slots: Tensor) -> None:
        if self._new is not None:
            self.kept[slots], self._new = self._new, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [n, k, K]`` times the transpose of ``weight [N, K]``, a product of its own for each of the n rows, whose bits then
    do not depend on the others."""
    y = torch.bmm(x, weight.T.expand(len(x), -1, -1))
    return y if bias is None else y + bias


class _Conv:
    def __init__(self, conv: Conv, late: int, slots: int) -> None:
        assert conv.stride == 1
        _, self.taps, inputs = conv.weight.shape
        self.conv, self.before = conv, late
        self.late = late + (conv.padding[1] if self.taps > 1 else 0)
        self.line = _Line(slots, (self.taps - 1) * conv.dilation, conv.weight, inputs)

    def __call__(self, x: Tensor, slots: Tensor, clock: _Clock | None) -> Tensor:
        steps, conv = x.shape[1], self.conv
        if self.taps > 1:
            x = self.line.through(x if clock is None else clock.inside(x, self.before), slots)
            x = torch.cat([x[:, k * conv.dilation :][:, :steps] for k in range(self.taps)], dim=-1)
        return _product(x, conv.weight.flatten(1), conv.bias)


class _Residual:
    def __init__(self, block: Residual, late: int, slots: int) -> None:
        self.block = block
        self.conv1, self.conv2 = _Conv(block.conv1, late, slots), _Conv(block.conv2, late, slots)
        self.late = self.conv1.late
        self.skip = _Line(slots, self.late - late, block.conv2.weight, block.conv2.weight.shape[0])

    def __call__(self, x: Tensor, slots: Tensor, clock: _Clock | None) -> Tensor:
        block = self.block
        y = self.conv1(block.act(block.norm1(x)), slots, clock)
        y = self.conv2(block.act(block.norm2(y)), slots, clock)
        return self.skip.through(x, slots)[:, : x.shape[1]] + y


_Stage = Callable[[Tensor, Tensor, _Clock | None], Tensor]


def whole_clip_reason(config: TokenizerConfig) -> str | None:
    """Why no frame of this tokenizer is known before the clip's last token; None where a stream is possible."""
    if config.norm == "GN":
        return "its group norm takes means over the whole clip"
    if config.patcher in ("db2", "db3", "db4") and config.patch_size > 1:
        return f"its {config.patcher} wavelet wraps around, so that the first frames depend on the last token"
    return None


class StreamingDetokenizer:
    """``MotionTokenizer.decode`` for clips that grow, one in each of ``slots`` places; constant work a token.

    ``lookahead``: tokens that must follow a token before its last frame comes out (16 for the released tokenizer, 0 for
    causal ones). Frames equal those of the whole clip to 1e-5 of its range in fp32; a slot's bits depend on its own tokens
    and on how they were cut into pushes, and not on the other slots. Raises ``UserError`` for a tokenizer whose first
    frame needs the last token: norm "GN", and db2, db3, db4 wavelets of one level or more.
    """

    def __init__(self, tokenizer: MotionTokenizer, slots: int) -> None:
        if (reason := whole_clip_reason(tokenizer.config)) is not None:
            raise UserError(f"this tokenizer cannot stream: {reason}")
        if slots < 1:
            raise UserError(f"expected at least one slot, got {slots}")
        self.tokenizer, self.slots = tokenizer, slots
        self.lines: list[_Line] = []
        self.stages: list[tuple[int, _Stage]] = []  # each with the steps a token at its rate
        late, rate = 0, 1

        def conv(layer: Conv) -> None:
            nonlocal late
            stage = _Conv(layer, late, slots)
            self.stages.append((rate, stage))
            self.lines.append(stage.line)
            late = stage.late

        def point(function: Callable[[Tensor], Tensor]) -> None:
            self.stages.append((rate, lambda x, slots, clock: function(x)))

        net = tokenizer.decoder
        conv(net.first)
        point(ACTIVATIONS["relu"])
        for up in net.stages:
            for block in up.blocks:  # type: ignore[union-attr]
                stage = _Residual(block, late, slots)
                self.stages.append((rate, stage))
                self.lines += [stage.conv1.line, stage.skip]
                late = stage.late
            stride = int(up.stride)  # type: ignore[arg-type]
            point(lambda x, stride=stride: x.repeat_interleave(stride, dim=1))  # type: ignore[misc]
            late, rate = late * stride, rate * stride
            conv(up.conv)  # type: ignore[arg-type]
        conv(net.middle)
        point(ACTIVATIONS["relu"])
        conv(net.last)
        self._late = late * tokenizer.config.patch_size  # frames
        self.lookahead = -(-self._late // tokenizer.config.frames_per_token)
        self._pushed = [0] * slots

    def reset(self, slot: int) -> None:
        """Start a new clip in a slot."""
        self._pushed[slot] = 0
        for line in self.lines:
            line.kept[slot] = 0

    def copy(self, source: int, target: int) -> None:
        """Make ``target`` what ``source`` is."""
        self._pushed[target] = self._pushed[source]
        for line in self.lines:
            line.kept[target] = line.kept[source]

    @torch.inference_mode()
    def push(self, slots: Sequence[int], tokens: Tensor) -> list[Tensor]:
        """Append ``tokens [n, k]`` to n different slots; the normalised frames ``[frames, 272]`` this completes in each.

        Raises ``UserError`` for tokens that are none of the codebook.
        """
        config = self.tokenizer.config
        if tokens.ndim != 2 or len(tokens) != len(slots) or tokens.is_floating_point():
            raise UserError(f"expected whole tokens [{len(slots)}, k], got {tokens.dtype} {list(tokens.shape)}")
        if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < config.codebook):
            raise UserError(f"expected tokens from 0 to {config.codebook - 1}")
        project, weight = self.tokenizer.project_out, self.tokenizer.decoder.last.weight
        x = fsq_dequantize(tokens.to(weight.device), config.levels).to(weight.dtype)
        if isinstance(project, nn.Linear):
            x = _product(x, project.weight, project.bias)
        return self._run(slots, x, [ENDLESS] * len(slots))

    @torch.inference_mode()
    def finish(self, slots: Sequence[int]) -> list[Tensor]:
        """The frames still missing of clips that end here; the slots must be reset before they are used again."""
        ends = [self._pushed[slot] for slot in slots]
        nothing = self.tokenizer.decoder.first.weight.new_zeros(
            len(slots), self.lookahead, self.tokenizer.config.code_dim
        )
        return self._run(slots, nothing, ends)

    def pushed(self, slot: int) -> int:
        """Tokens of a slot's clip so far."""
        return self._pushed[slot]

    def _run(self, slots: Sequence[int], x: Tensor, ends: Sequence[int]) -> list[Tensor]:
        config, steps = self.tokenizer.config, x.shape[1]
        if not steps or not slots:
            return [x.new_zeros(0, config.input_dim) for _ in slots]
        starts = [self._pushed[slot] for slot in slots]
        where = torch.tensor(list(slots), device=x.device)
        # Once past a clip's start and before its end nothing needs zeroing.
        settled = min(starts) >= self.lookahead and max(starts) + steps <= min(ends)
        clock = None if settled else _Clock(*(torch.tensor(list(v), device=x.device) for v in (starts, ends)))
        for rate, stage in self.stages:
            x = stage(x, where, None if clock is None else clock.rated(rate))
        frames = self.tokenizer.unpatch(x)
        unit = config.frames_per_token
        result = []
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            first = start * unit - self._late
            result.append(frames[row, max(0, -first) : max(0, min(frames.shape[1], end * unit - first))])
        # Last, so that whatever fails before can be repeated.
        for line in self.lines:
            line.keep(where)
        for slot, start in zip(slots, starts, strict=True):
            self._pushed[slot] = start + steps
        return result
