"""Streaming detokenization in ONNX Runtime: ``StreamingDetokenizer``'s network as a graph, made in memory."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.model.streaming import ENDLESS, Clip, StreamingDetokenizer
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.runtime.backends.onnx import live_session

TRIAL = (1, 2, 5, 16)  # rows of a call
_ROWS_AGREE: "WeakKeyDictionary[MotionTokenizer, bool]" = WeakKeyDictionary()


class OnnxStreamingDetokenizer(StreamingDetokenizer):
    """``StreamingDetokenizer`` of a tokenizer in fp32 on a CPU, with its frames to 1e-5.

    Clips of a push go through the graph together where a trial, once a tokenizer, shows that this leaves each one's bits
    alone, otherwise one by one. Raises ``UserError`` where onnx or onnxruntime is absent too.
    """

    def __init__(self, tokenizer: MotionTokenizer, slots: int) -> None:
        super().__init__(tokenizer, slots)
        weight = tokenizer.decoder.last.weight
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            raise UserError(f"expected a tokenizer in float32 on a CPU, got {weight.dtype} on {weight.device}")
        self._session = live_session(tokenizer, "stream_graph")
        inputs = {value.name: value.shape for value in self._session.get_inputs()}
        self._late_too = "position" in inputs
        self._spans = [shape[1:] for name, shape in inputs.items() if name.startswith("state.")]
        self._outputs = ["features", *(f"next_state.{line}" for line in range(len(self._spans)))]
        if tokenizer not in _ROWS_AGREE:
            _ROWS_AGREE[tokenizer] = self._rows_agree()
        self.batched = _ROWS_AGREE[tokenizer]

    def _frames(
        self, clips: Sequence[Clip], tokens: Tensor, ends: Sequence[int]
    ) -> tuple[Tensor, list[tuple[Tensor, ...] | None]]:
        if self.batched or len(clips) == 1:
            return self._together(clips, tokens, ends)
        rows = zip(clips, tokens.split(1), ends, strict=True)
        parts = [self._together([clip], own, [end]) for clip, own, end in rows]
        return torch.cat([frames for frames, _ in parts]), [kept[0] for _, kept in parts]

    def _together(
        self, clips: Sequence[Clip], tokens: Tensor, ends: Sequence[int]
    ) -> tuple[Tensor, list[tuple[Tensor, ...] | None]]:
        feeds = {"tokens": tokens.to(torch.int64).numpy()}
        if self._late_too:
            feeds |= {"position": np.array([clip.pushed for clip in clips]), "end": np.array(ends)}
        for line, shape in enumerate(self._spans):
            before = [torch.zeros(shape) if clip.kept is None else clip.kept[line] for clip in clips]
            feeds[f"state.{line}"] = torch.stack(before).numpy()
        frames, *states = map(torch.from_numpy, self._session.run(self._outputs, feeds))
        return frames, [tuple(state[row] for state in states) for row in range(len(clips))]

    def _rows_agree(self) -> bool:
        most = max(TRIAL)
        tokens = torch.arange(2 * most).view(2, most, 1) % self.tokenizer.config.codebook
        frames: list[list[Tensor]] = []
        for size in TRIAL:
            clips, made = [Clip()] * most, []
            for step in range(2):  # the second push sees what the first one left
                parts = [
                    self._together(clips[at : at + size], row, [ENDLESS] * len(row))
                    for at, row in zip(range(0, most, size), tokens[step].split(size), strict=True)
                ]
                clips = [Clip(pushed=step + 1, kept=lines) for _, kept in parts for lines in kept]
                made.append(torch.cat([part for part, _ in parts]))
            frames.append(made)
        return all(torch.equal(a, b) for other in frames for a, b in zip(frames[0], other, strict=True))
