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


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """A slot's clip so far: tokens pushed, frames made. Never changed, only replaced, so that a push that is cut off leaves
    every slot as it was or as it should be."""

    pushed: int = 0
    made: int = 0
    newest: Tensor | None = None  # the frames that the last push made
    ended: bool = False
    kept: tuple[Tensor, ...] | None = None  # the last steps of every line; None: zeros


class _Lines:
    """The last steps of what passed, for every place of the network that needs them again: ``[n, span, C]`` each."""

    def __init__(self, clips: Sequence[Clip]) -> None:
        self.clips, self.new = clips, list[Tensor]()

    def through(self, x: Tensor, span: int) -> Tensor:
        """``x [n, k, C]`` with the span before it, ``[n, span + k, C]``. Places come in the same order at every push."""
        line = len(self.new)
        nothing = x.new_zeros(span, x.shape[2])
        before = torch.stack([nothing if clip.kept is None else clip.kept[line] for clip in self.clips])
        joined = torch.cat((before, x), dim=1)
        self.new.append(joined[:, joined.shape[1] - span :])
        return joined


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [n, k, K]`` times the transpose of ``weight [N, K]``, a product of its own for each of the n rows, whose bits then
    do not depend on the others."""
    if x.device.type == "cpu":  # where a batch is shared out among threads otherwise than one product is
        y = torch.stack([row @ weight.T for row in x])
    else:
        y = torch.bmm(x, weight.T.expand(len(x), -1, -1))
    return y if bias is None else y + bias


class _Conv:
    def __init__(self, conv: Conv, late: int) -> None:
        assert conv.stride == 1
        self.taps, self.conv, self.before = conv.weight.shape[1], conv, late
        self.late = late + (conv.padding[1] if self.taps > 1 else 0)

    def __call__(self, x: Tensor, lines: _Lines, clock: _Clock | None) -> Tensor:
        steps, conv = x.shape[1], self.conv
        if self.taps > 1:
            x = x if clock is None else clock.inside(x, self.before)
            x = lines.through(x, (self.taps - 1) * conv.dilation)
            x = torch.cat([x[:, k * conv.dilation :][:, :steps] for k in range(self.taps)], dim=-1)
        return _product(x, conv.weight.flatten(1), conv.bias)


class _Residual:
    def __init__(self, block: Residual, late: int) -> None:
        self.block, self.before = block, late
        self.conv1, self.conv2 = _Conv(block.conv1, late), _Conv(block.conv2, late)
        self.late = self.conv1.late

    def __call__(self, x: Tensor, lines: _Lines, clock: _Clock | None) -> Tensor:
        block = self.block
        y = self.conv1(block.act(block.norm1(x)), lines, clock)
        y = self.conv2(block.act(block.norm2(y)), lines, clock)
        return lines.through(x, self.late - self.before)[:, : x.shape[1]] + y


_Stage = Callable[[Tensor, _Lines, _Clock | None], Tensor]


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
        self.stages: list[tuple[int, _Stage]] = []  # each with the steps a token at its rate
        late, rate = 0, 1

        def conv(layer: Conv) -> None:
            nonlocal late
            stage = _Conv(layer, late)
            self.stages.append((rate, stage))
            late = stage.late

        def point(function: Callable[[Tensor], Tensor]) -> None:
            self.stages.append((rate, lambda x, lines, clock: function(x)))

        net = tokenizer.decoder
        conv(net.first)
        point(ACTIVATIONS["relu"])
        for up in net.stages:
            for block in up.blocks:  # type: ignore[union-attr]
                stage = _Residual(block, late)
                self.stages.append((rate, stage))
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
        self.clips = [Clip()] * slots

    def reset(self, slot: int) -> None:
        """Start a new clip in a slot."""
        self.clips[slot] = Clip()

    def copy(self, source: int, target: int) -> None:
        """Make ``target`` what ``source`` is."""
        self.clips[target] = self.clips[source]

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
        return self._run(slots, tokens, [ENDLESS] * len(slots))

    @torch.inference_mode()
    def finish(self, slots: Sequence[int]) -> list[Tensor]:
        """The frames still missing of clips that end here; the slots must be reset before they are used again."""
        ends = [self.clips[slot].pushed for slot in slots]
        # Any tokens: they stand behind the clips' ends.
        return self._run(slots, torch.zeros(len(slots), self.lookahead, dtype=torch.int64), ends)

    def _run(self, slots: Sequence[int], tokens: Tensor, ends: Sequence[int]) -> list[Tensor]:
        config, steps = self.tokenizer.config, tokens.shape[1]
        if not slots:
            return []
        clips = [self.clips[slot] for slot in slots]
        if steps:
            frames, kept = self._frames(clips, tokens, ends)
        else:
            frames = self.tokenizer.decoder.first.weight.new_zeros(len(slots), 0, config.input_dim)
            kept = [clip.kept for clip in clips]
        unit = config.frames_per_token
        result = []
        for row, (clip, end) in enumerate(zip(clips, ends, strict=True)):
            first = clip.pushed * unit - self._late
            result.append(frames[row, max(0, -first) : max(0, min(frames.shape[1], end * unit - first))])
        for slot, clip, end, frame, lines in zip(slots, clips, ends, result, kept, strict=True):
            self.clips[slot] = Clip(clip.pushed + steps, clip.made + len(frame), frame, end < ENDLESS, lines)
        return result

    def _frames(
        self, clips: Sequence[Clip], tokens: Tensor, ends: Sequence[int]
    ) -> tuple[Tensor, list[tuple[Tensor, ...] | None]]:
        """All frames ``[n, F, 272]`` that ``tokens [n, k]``, k > 0, lead to, late ones too, and what each clip then keeps."""
        config, project, weight = self.tokenizer.config, self.tokenizer.project_out, self.tokenizer.decoder.last.weight
        x = fsq_dequantize(tokens.to(weight.device), config.levels).to(weight.dtype)
        if isinstance(project, nn.Linear):
            x = _product(x, project.weight, project.bias)
        starts, lines = [clip.pushed for clip in clips], _Lines(clips)
        # Once past a clip's start and before its end nothing needs zeroing.
        settled = min(starts) >= self.lookahead and max(starts) + tokens.shape[1] <= min(ends)
        clock = None if settled else _Clock(*(torch.tensor(list(v), device=x.device) for v in (starts, ends)))
        for rate, stage in self.stages:
            x = stage(x, lines, None if clock is None else clock.rated(rate))
        return self.tokenizer.unpatch(x), [tuple(line[row] for line in lines.new) for row in range(len(clips))]
