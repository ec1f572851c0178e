"""Decode and draw in fused kernels on packed weights; on a GPU a step is one CUDA graph."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kinetok.errors import UserError
from kinetok.kernels.linear.packing import FLOATS
from kinetok.kernels.sampling import Draw, SamplingState
from kinetok.kernels.sampling.state import FAILED, FULL, HELD, RUNNING
from kinetok.model.decode_step import FusedDecoderStep
from kinetok.model.decoder import MotionDecoder
from kinetok.runtime.backends.torch import TorchBackend
from kinetok.runtime.memory import within_memory

FLOAT8, LARGEST = torch.float8_e4m3fn, 448.0
LEAST_REACH = 64  # positions: a part of the attention kernel
_PACKED: WeakKeyDictionary[MotionDecoder, FusedDecoderStep] = WeakKeyDictionary()


def packed_step(decoder: MotionDecoder) -> FusedDecoderStep:
    """The step of a decoder; plain weights are packed once, for all backends on it, and quantised ones are used as they lie.

    What happens to plain weights afterwards is not seen. Raises ``UserError`` for weights that the kernels do not take, and
    where there is no memory for the packed copy.
    """
    if decoder not in _PACKED:
        weight = decoder.embed.weight
        kinds = {value: name for name, value in FLOATS.items()}
        if weight.dtype not in kinds:
            raise UserError(
                f"backend fused: expected quantised or plain weights in {', '.join(FLOATS)}; use the backend torch"
            )
        products = (layer for part in (*decoder.blocks, decoder.head) for layer in part.modules())
        need = sum(layer.weight.nbytes for layer in products if isinstance(layer, nn.Linear))
        with within_memory("a packed copy of the decoder's weights", need, weight.device):
            _PACKED[decoder] = FusedDecoderStep(decoder, kinds[weight.dtype])
    return _PACKED[decoder]


def kv_scale_of(x: Tensor) -> Tensor:
    """The scales ``[..., H]`` in which slots hold keys or values, from their first ones ``x [..., H, T, hd]`` in fp32
    (docs/numerics.md).

    Powers of two, so that dividing by them rounds nothing; the largest number becomes one from 16 to 32, so what follows
    may be 14 times as large before it is clamped, and what is a thousandth keeps all its digits.
    """
    exponent = torch.frexp(x.abs().amax((-2, -1))).exponent
    return torch.ldexp(torch.ones_like(x[..., 0, 0]), exponent - 5)


class Drawn:
    """``Reading`` of neighbouring rows: copies that the device makes while it goes on."""

    def __init__(self, first: int, tokens: Tensor, status: Tensor) -> None:
        self._first = first
        self._arrived: torch.cuda.Event | None = None
        self._tokens, self._status = _on_its_way(tokens), _on_its_way(status)
        self._read: list[int | None] | None = None
        if tokens.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def token(self, slot: int) -> int | None:
        if self._read is None:
            if self._arrived is not None:
                self._arrived.synchronize()
            both = zip(self._tokens.tolist(), self._status.tolist(), strict=True)
            self._read = [None if status == FAILED else token for token, status in both]
        return self._read[slot - self._first]


def _doublings(least: int, most: int) -> list[int]:
    """least, twice as much and so on, cut off at most."""
    found = [least]
    while found[-1] < most:
        found.append(2 * found[-1])
    return [*found[:-1], most]


def _on_its_way(x: Tensor) -> Tensor:
    if not x.is_cuda:
        return x.clone()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


class FusedBackend(TorchBackend):
    """``DrawingBackend`` on ``FusedDecoderStep``, with weights packed once.

    Newest token, next position, draw and state of every slot are tensors on the device, which a step reads and moves on:
    decode, guidance, draw, position and end are one captured graph, and nothing in it waits for the host. A step
    runs the first 1, 2, 4, ... slots and looks at the first 64, 128, 256, ... positions, so that a few graphs serve every
    crowd; ``warm_up`` captures them. A slot among them that does not take part feeds the token that it has to feed next, and
    draws nothing: its own next step writes the same position again. On a CPU the same step runs by its definition: right,
    slow, and tested.
    **Never run on a GPU yet.**

    float8: keys and values are e4m3 codes, half the memory of bf16; a scale for each slot, layer and head is fixed when the
    slot is prefilled (docs/numerics.md). Raises ``UserError`` where memory is short.
    """

    def __init__(self, decoder: MotionDecoder, slots: int, capacity: int, *, float8: bool = False) -> None:
        super().__init__(decoder, slots, capacity, FLOAT8 if float8 else None)
        self._step = packed_step(decoder)
        shape = (decoder.config.n_layer, 2, slots, decoder.config.n_head)
        self._kv_scale = torch.ones(shape, device=self.device) if float8 else None
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self._at = torch.zeros_like(self._tokens)  # where a slot's newest token goes
        self._leader = torch.arange(slots, device=self.device)  # whose draw a slot takes
        self._empty = torch.arange(slots, device=self.device)  # where the logits of its empty text are
        self._state = SamplingState.start([Draw(most=1)] * slots, self.device)
        self._state.status.fill_(FULL)
        self._slots_of: dict[int, list[int]] = {}
        self._draws: dict[int, Draw] = {}
        self._taking_part: list[int] | None = None  # of the last step; None: to be told again
        self._graphs: dict[tuple[str, int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def prefill(self, slot: int, text: Tensor, tokens: Sequence[int] = ()) -> Tensor:
        return self.prefill_all([(slot, text, tokens)])[0]

    @torch.inference_mode()
    def prefill_all(self, rows: Sequence[tuple[int, Tensor, Sequence[int]]]) -> Tensor:
        for _, text, tokens in rows:
            self._check_prefill(text, tokens)
        decoder = self.decoder
        # A product of torch's own for each text: one of all of them would sum in an order that depends on the others.
        parts = [decoder.text_proj(text.to(self.device, decoder.text_proj.weight.dtype)) for _, text, _ in rows]
        motion = decoder.embed(self._sent([token for _, _, tokens in rows for token in tokens]))
        behind = motion.split([len(tokens) for _, _, tokens in rows])
        x = nn.utils.rnn.pad_sequence([torch.cat(both) for both in zip(parts, behind, strict=True)], batch_first=True)
        lengths = [len(text) + len(tokens) for _, text, tokens in rows]

        slots, raw = self._sent([slot for slot, _, _ in rows]), self.slab
        if self._kv_scale is not None:
            raw = raw.view(torch.uint8)  # not everything that copies knows float8

        def hold(layer: int, k: Tensor, v: Tensor) -> None:
            # Padding is zeros in every layer, and overwritten before it is seen.
            for part, x in enumerate((k.transpose(1, 2), v.transpose(1, 2))):
                if self._kv_scale is not None:
                    scale = kv_scale_of(x.float())
                    self._kv_scale[layer, part, slots] = scale
                    x = (x / scale[..., None, None]).clamp(-LARGEST, LARGEST).to(FLOAT8).view(torch.uint8)
                raw[part, layer][slots, :, : x.shape[2]] = x

        texts = self._sent([len(text) for _, text, _ in rows])
        logits = self._step.prefill(x, texts, self._sent(lengths), hold)
        for (slot, _, _), length in zip(rows, lengths, strict=True):
            self._place(slot, length)
        return logits

    @torch.inference_mode()
    def copy(self, source: int, target: int) -> None:
        super().copy(source, target)
        if self._kv_scale is not None:
            self._kv_scale[:, :, target] = self._kv_scale[:, :, source]
        self._place(target, self.lengths[target])

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], tokens: Tensor) -> Tensor:
        self._check_room(slots)
        if not slots:
            return self._tokens.new_zeros((0, self._step.config.head_rows), dtype=torch.float32)
        rows, reach = self._buckets(slots)
        where = self._sent(list(slots))
        self._at[where] = self._sent([self.lengths[slot] for slot in slots])
        self._tokens[where] = tokens
        logits = self._run(
            ("logits", rows, reach), lambda: self._step.logits(*self._rows(rows), reach, self._scales(rows))
        )[where]
        for slot in slots:
            self.lengths[slot] += 1
        return logits

    @torch.inference_mode()
    def warm_up(self) -> None:
        """On a GPU capture the graphs of all draws, on a CPU nothing. ``decode``'s come when one is needed: only what was cut
        off is decoded without a draw."""
        if self._pool is None:
            return
        for rows, reach in product(_doublings(1, self.slots), _doublings(LEAST_REACH, self.capacity)):
            for kind in ("greedy", "plain", *(("guided",) if rows > 1 else ())):
                self._captured((kind, rows, reach), partial(self._drawn, kind, rows, reach))

    @torch.inference_mode()
    def begin(self, slots: Sequence[int], lengths: Sequence[int], draw: Draw, written: int, logits: Tensor) -> Drawn:
        first = slots[0]
        self._join(slots, lengths, draw, written)
        state = self._state.rows(slice(first, first + 1))
        token = self._step.draw(logits[:1], state, logits[1:] if len(slots) == 2 else None)
        for slot in slots:
            self._tokens[slot : slot + 1] = token
        return Drawn(first, token, state.status)

    @torch.inference_mode()
    def resume(self, slots: Sequence[int], lengths: Sequence[int], draw: Draw, written: int, token: int) -> None:
        self._join(slots, lengths, draw, written)
        for slot in slots:
            self._tokens[slot].fill_(token)

    @torch.inference_mode()
    def decode_and_draw(self, characters: Sequence[int]) -> Drawn:
        slots = [slot for first in characters for slot in self._slots_of[first]]
        self._check_room(slots)
        rows, reach = self._buckets(slots)
        if self._taking_part != list(characters):
            self._choose(characters)
        guided = any(len(self._slots_of[first]) == 2 for first in characters)
        greedy = not guided and all(self._draws[first].temperature == 0 for first in characters)
        kind = "guided" if guided else "greedy" if greedy else "plain"
        tokens = self._run((kind, rows, reach), partial(self._drawn, kind, rows, reach))
        for slot in slots:
            self.lengths[slot] += 1
        return Drawn(0, tokens, self._state.status[:rows])

    def _drawn(self, kind: str, rows: int, reach: int) -> Tensor:
        """One step of the first ``rows`` slots, all of it on the device; the tokens ``[rows]`` that were drawn."""
        tokens, at, slab = self._rows(rows)
        state = self._state.rows(slice(rows))
        if kind == "greedy":
            drawn = self._step.greedy(tokens, at, slab, state, reach, self._scales(rows))
        else:
            empty_at = self._empty[:rows] if kind == "guided" else None
            drawn = self._step.sample(tokens, at, slab, state, reach, self._scales(rows), empty_at=empty_at)
        taken = drawn[self._leader[:rows]]
        moved = taken != self._step.config.end_id
        torch.where(moved, taken, tokens, out=tokens)
        # A full slot can only start anew, so it does not matter where it stands.
        at.add_(moved).clamp_(max=self.capacity - 1)
        return drawn

    def _rows(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._tokens[:rows], self._at[:rows], self.slab[:, :, :rows]

    def _scales(self, rows: int) -> Tensor | None:
        return None if self._kv_scale is None else self._kv_scale[:, :, :rows]

    def _join(self, slots: Sequence[int], lengths: Sequence[int], draw: Draw, written: int) -> None:
        first = slots[0]
        for slot, length in zip(slots, lengths, strict=True):
            self._place(slot, length)
        self._state.put(first, draw, written)
        self._slots_of[first], self._draws[first] = list(slots), draw

    def _place(self, slot: int, length: int) -> None:
        """What the slot holds from now on, and that nobody is to draw for it."""
        self.lengths[slot] = length
        self._taking_part = None
        self._at[slot].fill_(min(length, self.capacity - 1))
        self._state.status[slot].fill_(FULL)

    def _choose(self, characters: Sequence[int]) -> None:
        """Let these characters draw, and hold the others."""
        self._taking_part = None
        leader, empty, part = list(range(self.slots)), list(range(self.slots)), [0] * self.slots
        for first in characters:
            part[first] = 1
            for slot in self._slots_of[first]:
                leader[slot], empty[first] = first, slot
        told = self._sent([leader, empty, part])
        self._leader.copy_(told[0])
        self._empty.copy_(told[1])
        status, chosen = self._state.status, told[2] == 1
        held, running = chosen & (status == HELD), ~chosen & (status == RUNNING)
        status.masked_fill_(held, RUNNING).masked_fill_(running, HELD)
        self._taking_part = list(characters)

    def _check_room(self, slots: Sequence[int]) -> None:
        if any(self.lengths[slot] >= self.capacity for slot in slots):
            raise UserError(f"a slot holds {self.capacity} positions and is full")

    def _buckets(self, slots: Sequence[int]) -> tuple[int, int]:
        """How many slots a step runs, and how many positions it looks at, so that there are few kinds of steps."""
        last, longest = max(slots), max(self.lengths[slot] for slot in slots)
        rows = next(n for n in _doublings(1, self.slots) if n > last)
        return rows, next(n for n in _doublings(LEAST_REACH, self.capacity) if n > longest)

    def _sent(self, numbers: list[int] | list[list[int]]) -> Tensor:
        """int64 on the device; the host does not wait."""
        x = torch.tensor(numbers, dtype=torch.int64)
        return (
            x.to(self.device)
            if self._pool is None or not numbers
            else x.pin_memory().to(self.device, non_blocking=True)
        )

    def _run(self, key: tuple[str, int, int], call: Callable[[], Tensor]) -> Tensor:
        """The result of ``call``, on a GPU from its graph: it is overwritten by the next run."""
        if self._pool is None:
            return call()
        graph, result = self._captured(key, call)
        graph.replay()
        return result

    def _captured(self, key: tuple[str, int, int], call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        if key not in self._graphs:
            # Kernels are compiled, and their scratch memory taken, before the capture and beside the current stream.
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side), self._nobody_draws():
                call()
            torch.cuda.current_stream(self.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = call()
            self._graphs[key] = (graph, result)
        return self._graphs[key]

    @contextmanager
    def _nobody_draws(self) -> Iterator[None]:
        status = self._state.status.clone()
        self._state.status.fill_(HELD)
        try:
            yield
        finally:
            self._state.status.copy_(status)
