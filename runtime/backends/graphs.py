"""What backends on exported graphs share: a cache written in place, and which of its slots go through a graph together."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.runtime.memory import within_memory

TRIAL = (1, 2, 5, 16)
BOUND = 256  # calls that stay bound, at least one for each slot: a crowd that comes and goes meets very many

Run = Callable[[], None]
Bind = Callable[[Mapping[str, Tensor]], Run]
Cache = list[list[Tensor]]


class SlotSteps:
    """One token for any slots of a cache, by a graph that takes neighbouring slots.

    bind: from the graph's inputs and outputs by name, all of which stay where they are, to what runs it on them. cache: the
    keys and values of neighbouring slots from one to before another, ``[layers][2]`` of ``[n, H, S, hd]``, of which
    ``capacity`` positions are used. most: the largest call that the graph takes. Neighbours go through the graph together
    where that leaves a slot's bits alone, which the library's kernels decide: a trial with calls of the sizes ``trial``
    compares rows together with rows alone. Where they differ, each slot is a call of its own (``batched`` is False). The
    trial writes to the cache.
    """

    def __init__(
        self,
        bind: Bind,
        slots: int,
        capacity: int,
        classes: int,
        cache: Callable[[int, int], Cache],
        *,
        most: int | None = None,
        trial: Sequence[int] = TRIAL,
    ) -> None:
        self.bind, self.capacity, self.cache, self.most = bind, capacity, cache, most or slots
        device = cache(0, 1)[0][0].device
        self.lengths = [0] * slots
        self.tokens = torch.zeros(slots, 1, dtype=torch.int64, device=device)
        self.positions = torch.zeros(slots, 1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(slots, classes, device=device)
        self.calls: dict[tuple[int, int], Run] = {}
        self.batched = True
        self.batched = self._rows_agree(sorted({min(size, slots) for size in trial}))

    def decode(self, slots: Sequence[int], tokens: Tensor) -> Tensor:
        """``Backend.decode``: a token for each of these different slots; logits ``[n, classes]``."""
        if any(self.lengths[slot] >= self.capacity for slot in slots):
            raise UserError(f"a slot holds {self.capacity} positions and is full")
        if not slots:
            return self.logits[:0]
        where = torch.tensor(list(slots)).to(self.tokens.device, non_blocking=True)
        self.tokens[where, 0] = tokens
        # Of slots that are not in the call too, whose positions nothing reads.
        self.positions[:, 0].copy_(torch.tensor(self.lengths), non_blocking=True)
        for start, stop in self.neighbours(slots):
            if (start, stop) not in self.calls:
                if len(self.calls) >= max(BOUND, len(self.lengths)):
                    del self.calls[next(iter(self.calls))]
                self.calls[start, stop] = self.bind(
                    {
                        "input_ids": self.tokens[start:stop],
                        "position_ids": self.positions[start:stop],
                        "logits": self.logits[start:stop],
                        **named(self.cache(start, stop)),
                    }
                )
            self.calls[start, stop]()
        for slot in slots:
            self.lengths[slot] += 1
        return self.logits[where]

    def neighbours(self, slots: Sequence[int]) -> list[tuple[int, int]]:
        """The calls that serve these slots: from a slot to before another."""
        most = self.most if self.batched else 1
        inside = sorted(slots)
        if not inside:
            return []
        breaks = [at + 1 for at, (a, b) in enumerate(pairwise(inside)) if b != a + 1]
        return [
            (inside[at], inside[min(at + most, last) - 1] + 1)
            for first, last in pairwise([0, *breaks, len(inside)])
            for at in range(first, last, most)
        ]

    def _rows_agree(self, sizes: Sequence[int]) -> bool:
        slots, rows = len(self.lengths), max(sizes)
        tokens = torch.arange(rows, device=self.tokens.device)
        results = []
        for size in sizes:
            self.lengths[:] = [0] * slots
            for _ in range(min(2, self.capacity)):  # the second token sees the first one's keys
                for first in range(0, rows, size):
                    group = range(first, min(first + size, rows))
                    self.decode(group, tokens[first : group.stop])
            results.append(self.logits[:rows].clone())
        self.lengths[:] = [0] * slots
        return all(torch.equal(results[0], other) for other in results[1:])


def named(cache: Cache) -> dict[str, Tensor]:
    """The cache of neighbouring slots as a graph's inputs and, in the same memory, outputs."""
    return {
        f"{side}.{layer}.{kind}": tensor
        for layer, parts in enumerate(cache)
        for kind, tensor in zip(("key", "value"), parts, strict=True)
        for side in ("past_key_values", "present")
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheShape:
    """A cache of one slot: keys and values ``[layers, 2, H, length, hd]``."""

    layers: int
    heads: int
    length: int
    head_dim: int
    dtype: torch.dtype


class GraphBackend:
    """``Backend`` on a prefill and a decode graph; one slab ``[layers, 2, slots, H, length, hd]`` that both write in place.

    prefill, decode: ``SlotSteps``' ``bind``; most, trial: of its calls. classes: logits of a row.
    """

    def __init__(
        self,
        shape: CacheShape,
        slots: int,
        capacity: int,
        classes: int,
        device: torch.device,
        prefill: Bind,
        decode: Bind,
        *,
        most: int | None = None,
        trial: Sequence[int] = TRIAL,
    ) -> None:
        if slots < 1 or not 0 < capacity <= shape.length:
            raise UserError(f"expected at least one slot and 1 to {shape.length} positions, got {slots} and {capacity}")
        self.slots, self.capacity, self.device, self._bind_prefill = slots, capacity, device, prefill
        sizes = (shape.layers, 2, slots, shape.heads, shape.length, shape.head_dim)
        need = math.prod(sizes) * shape.dtype.itemsize
        with within_memory(f"a cache of {slots} rows of {shape.length} positions", need, device, rows=slots):
            self.slab = torch.zeros(sizes, dtype=shape.dtype, device=device)
        self._step = SlotSteps(decode, slots, capacity, classes, self._cache, most=most, trial=trial)
        self.slab.zero_()

    @property
    def lengths(self) -> list[int]:
        """Positions that each slot holds."""
        return self._step.lengths

    @property
    def batched(self) -> bool:
        """Whether neighbouring slots go through the graph together."""
        return self._step.batched

    def prefill(self, slot: int, text: Tensor, tokens: Sequence[int] = ()) -> Tensor:
        length = len(text) + len(tokens)
        if not len(text) or length > self.capacity:
            raise UserError(
                f"expected 1 to {self.capacity} positions of text and motion, text among them, got {len(text)} of text "
                f"and {len(tokens)} of motion"
            )
        self._fill(slot, text, tokens)
        return self._step.logits[slot].clone()

    def _fill(self, slot: int, text: Tensor, tokens: Sequence[int]) -> None:
        """Text and tokens into a slot; its row of ``logits`` becomes those after the last."""
        features = text.detach().to(self.device, torch.float32).contiguous()[None]
        lengths = torch.tensor([len(text)], device=self.device)
        self._start(slot, len(text), {"text_features": features, "text_lengths": lengths})
        for token in tokens:
            self._step.decode([slot], torch.tensor([token], device=self.device))

    def _start(self, slot: int, length: int, inputs: Mapping[str, Tensor]) -> None:
        """Run the prefill, which leaves ``length`` positions, on an empty slot."""
        logits = self._step.logits[slot : slot + 1]
        run = self._bind_prefill({**inputs, "logits": logits, **named(self._cache(slot, slot + 1))})
        # What is masked still counts as zero times its value: an earlier row's NaN must not come back.
        self.slab[:, :, slot] = 0
        run()
        self.lengths[slot] = length

    def decode(self, slots: Sequence[int], tokens: Tensor) -> Tensor:
        return self._step.decode(slots, tokens)

    def copy(self, source: int, target: int) -> None:
        length = self.lengths[source]
        self.slab[:, :, target, :, :length] = self.slab[:, :, source, :, :length]
        self.lengths[target] = length

    def _cache(self, start: int, stop: int) -> Cache:
        return [[part[start:stop] for part in layer] for layer in self.slab]
