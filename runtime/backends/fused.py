"""The decode step of fused kernels on packed weights; on a GPU replayed as one CUDA graph for each number of slots."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kinetok.errors import UserError
from kinetok.kernels.linear.packing import FLOATS
from kinetok.model.decode_step import FusedDecoderStep
from kinetok.model.decoder import MotionDecoder
from kinetok.runtime.backends.torch import TorchBackend


class FusedBackend(TorchBackend):
    """``Backend`` on ``FusedDecoderStep``, with weights packed once in the decoder's dtype; texts are prefilled by torch.

    A step runs the first 1, 2, 4, ... slots, whichever of them are in the call: the batch then has one of few sizes, and the
    kernels see a row's position in a tensor on the device, so that one captured graph serves every step of that size. A slot
    that is not in the call writes to its next position, which its own next token writes again. Nothing in a step waits
    for the device. On a CPU the same step runs by its definition: right, slow, and tested. **Never run on a GPU yet.**
    """

    def __init__(self, decoder: MotionDecoder, slots: int, capacity: int) -> None:
        super().__init__(decoder, slots, capacity)
        dtype = decoder.embed.weight.dtype
        kinds = {value: name for name, value in FLOATS.items()}
        if dtype not in kinds or not isinstance(decoder.blocks[0].qkv, nn.Linear):
            raise UserError(f"backend fused: expected plain weights in {', '.join(FLOATS)}; use the backend torch")
        self._step = FusedDecoderStep(decoder, kinds[dtype])
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self._positions = torch.zeros_like(self._tokens)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], tokens: Tensor) -> Tensor:
        if any(self.lengths[slot] >= self.capacity for slot in slots):
            raise UserError(f"a slot holds {self.capacity} positions and is full")
        if not slots:
            return self._tokens.new_zeros((0, self._step.config.head_rows), dtype=torch.float32)
        rows = min(self.slots, 1 << max(slots).bit_length())
        where = torch.tensor(list(slots)).to(self.device, non_blocking=True)
        # A full slot can only start anew, so it does not matter what its last position becomes.
        at = torch.tensor([min(length, self.capacity - 1) for length in self.lengths])
        self._positions.copy_(at, non_blocking=True)
        self._tokens[where] = tokens
        logits = self._run(rows)[where]
        for slot in slots:
            self.lengths[slot] += 1
        return logits

    def _run(self, rows: int) -> Tensor:
        """Logits of the first ``rows`` slots, fp32 ``[rows, head_rows]``."""
        if self.device.type != "cuda":
            return self._logits(rows)
        if rows not in self._graphs:
            # Kernels are compiled, and their scratch memory taken, before the capture and beside the current stream.
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                self._logits(rows)
            torch.cuda.current_stream(self.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._logits(rows)
            self._graphs[rows] = (graph, logits)
        graph, logits = self._graphs[rows]
        graph.replay()
        return logits

    def _logits(self, rows: int) -> Tensor:
        return self._step.logits(self._tokens[:rows], self._positions[:rows], self.slab[:, :, :rows])
