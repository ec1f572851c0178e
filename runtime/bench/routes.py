"""The ways to write a clip's tokens that ``kinetok bench decode`` compares.

Each is greedy over the motion tokens (the end token is banned, so that all write as many), takes text features
``[B, L, D]``, calls ``mark`` after each token, and returns tokens ``[B, n]``. The rows' texts are equally long.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kinetok.errors import UserError
from kinetok.kernels.norm import rms_norm
from kinetok.kernels.rotary import apply_rotary
from kinetok.kernels.sampling import Draw
from kinetok.model.config import DecoderConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.pretrained import ModelBundle, build
from kinetok.runtime.backends import Backend, DrawingBackend, Reading, open_backend
from kinetok.runtime.backends.auto import choose_backend
from kinetok.runtime.backends.threads import threads_for
from kinetok.runtime.bench.subject import own_copy

Mark = Callable[[], None]


class CannotRun(Exception):
    """Why a peer does not run here; the results carry the sentence."""


def own_backend(decoder: MotionDecoder) -> str:
    """The backend that kinetok is measured with unless somebody names another: the fused kernels on a GPU, and on a CPU the
    one that an engine chooses."""
    return "fused" if decoder.embed.weight.is_cuda else choose_backend(decoder).name


def _pick(logits: Tensor, config: DecoderConfig) -> Tensor:
    return logits[..., : config.codebook].argmax(-1)


class Uncached:
    """The authors' algorithm: the whole sequence anew for each token, logits of all positions, fp32 as released."""

    kv = None

    def __init__(self, decoder: MotionDecoder) -> None:
        self.decoder = decoder
        if decoder.embed.weight.dtype != torch.float32:
            self.decoder = build(lambda: MotionDecoder(decoder.config), decoder.embed.weight.device, torch.float32)
            self.decoder.load_state_dict(decoder.state_dict())

    @torch.inference_mode()
    def run(self, features: Tensor, count: int, mark: Mark) -> Tensor:
        config = self.decoder.config
        rows = torch.full(features.shape[:2], config.pad_id, device=features.device)
        mask = torch.ones(features.shape[:2], device=features.device)
        for _ in range(count):
            token = _pick(self.decoder(rows, features, mask)[:, -1], config)
            rows = torch.cat((rows, token[:, None]), 1)
            mark()
        return rows[:, features.shape[1] :]


class Backended:
    """A backend as an engine drives it: prefill and steps, all characters at once, without sampling."""

    def __init__(self, backend: Backend, decoder: MotionDecoder) -> None:
        self.backend, self.decoder = backend, decoder

    @property
    def kv(self) -> torch.dtype:
        return self.backend.slab.dtype  # type: ignore[attr-defined]  # every backend's, though the seam does not ask for it

    @classmethod
    def ours(cls, model: ModelBundle, name: str, batch: int, capacity: int, kv: str = "auto") -> "Backended":
        """The backend of that name on a copy of the weights where it may lay them out anew."""
        model = own_copy(model)
        return cls(open_backend(name, model, batch, capacity, kv), model.decoder)

    @classmethod
    def onnx(cls, model: ModelBundle, folder: str, batch: int, capacity: int) -> "Backended":
        """ONNX Runtime on a bundle of the same weights, or on a graph of them that is made in memory."""
        try:
            return cls.ours(model, f"onnx:{folder}" if folder else "onnx", batch, capacity)
        except UserError as error:
            raise CannotRun(str(error)) from error

    @torch.inference_mode()
    def run(self, features: Tensor, count: int, mark: Mark) -> Tensor:
        if isinstance(self.backend, DrawingBackend):
            return self._drawn(self.backend, features, count, mark)
        with threads_for(self.backend):
            return self._picked(self.backend, features, count, mark)

    def _picked(self, backend: Backend, features: Tensor, count: int, mark: Mark) -> Tensor:
        config, slots = self.decoder.config, range(len(features))
        logits = torch.stack([backend.prefill(slot, features[slot]) for slot in slots])
        tokens = [_pick(logits, config)]
        mark()
        while len(tokens) < count:
            tokens.append(_pick(backend.decode(slots, tokens[-1]), config))
            mark()
        return torch.stack(tokens, 1)

    def _drawn(self, backend: DrawingBackend, features: Tensor, count: int, mark: Mark) -> Tensor:
        """Where the device draws, nothing waits for the host, which reads at the end."""
        slots = range(len(features))
        firsts = []
        for slot in slots:
            logits = backend.prefill(slot, features[slot])
            firsts.append(backend.begin([slot], [features.shape[1]], greedy_draw(count), 0, logits[None]))
        mark()
        readings = []
        for _ in range(count - 1):
            readings.append(backend.decode_and_draw(slots))
            mark()
        begun = torch.cat([told(first, [slot], features.device) for slot, first in zip(slots, firsts, strict=True)])
        return torch.stack([begun, *(told(reading, slots, features.device) for reading in readings)], 1)


def told(reading: Reading, slots: Sequence[int], device: torch.device) -> Tensor:
    """The tokens ``[B]`` of these slots. Raises ``CannotRun`` where one's logits were no numbers."""
    tokens = [reading.token(slot) for slot in slots]
    if None in tokens:
        raise CannotRun("its logits were no numbers")
    return torch.tensor(tokens, device=device)


def greedy_draw(count: int) -> Draw:
    """Exactly ``count`` tokens, each the best one: the end is banned until then."""
    return Draw(least=count, most=count, temperature=0.0)


class PlainStep:
    """One step in plain torch on static shapes, whose token and position live on the device: what a CUDA graph can hold.

    The recipe of a good hand-written loop: library products, attention over the whole cache under a mask.
    """

    def __init__(self, decoder: MotionDecoder, batch: int, capacity: int) -> None:
        self.decoder = decoder
        weight = decoder.embed.weight
        self.cache = decoder.new_cache(batch, capacity)
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self.keys = torch.arange(capacity, device=weight.device)
        self.table = decoder.rotary()

    def __call__(self) -> None:
        decoder, position = self.decoder, self.position
        x = F.embedding(self.tokens, decoder.embed.weight)[:, None]
        table = self.table[position][None]
        visible = (self.keys <= position)[None, None, None]
        for at, block in enumerate(decoder.blocks):
            qkv = F.linear(rms_norm(x, block.attn_norm.scale), block.qkv.weight)
            q, k, v = qkv.unflatten(-1, (3, block.heads, -1)).unbind(2)
            keys, values = self.cache.slab[0, at], self.cache.slab[1, at]
            keys.index_copy_(2, position, apply_rotary(k, table).transpose(1, 2))
            values.index_copy_(2, position, v.transpose(1, 2))
            q = apply_rotary(q, table).transpose(1, 2)
            x = x + block.mix(F.scaled_dot_product_attention(q, keys, values, attn_mask=visible))
            x = x + block.mlp(x)
        logits = decoder.head(decoder.norm(x[:, 0]))
        self.tokens.copy_(_pick(logits, decoder.config))
        position += 1


class Graph:
    """``PlainStep`` captured in a CUDA graph."""

    def __init__(self, decoder: MotionDecoder, batch: int, capacity: int, *, capture: bool = True) -> None:
        if capture and decoder.embed.weight.device.type != "cuda":
            raise CannotRun("a CUDA graph needs a CUDA device")
        self.step, self.decoder = PlainStep(decoder, batch, capacity), decoder
        self.kv = self.step.cache.slab.dtype
        self.replay: Callable[[], Any] = self.step
        if capture:
            with torch.inference_mode():
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    self.step()
                torch.cuda.current_stream().wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self.step()
            self.replay = graph.replay

    @torch.inference_mode()
    def run(self, features: Tensor, count: int, mark: Mark) -> Tensor:
        step, decoder = self.step, self.step.decoder
        logits = decoder.prefill(list(features), step.cache)
        step.tokens.copy_(_pick(logits, decoder.config))
        step.position.fill_(features.shape[1])
        tokens = [step.tokens.clone()]
        mark()
        while len(tokens) < count:
            self.replay()
            tokens.append(step.tokens.clone())
            mark()
        return torch.stack(tokens, 1)


def fits(config: DecoderConfig, text: int, count: int) -> None:
    """``UserError`` when a clip of ``count`` tokens does not fit behind ``text`` positions."""
    if text + count - 1 > config.block_size:
        raise UserError(
            f"tokens: {text} text positions and {count} tokens need {text + count - 1} positions, "
            f"but this model has {config.block_size}"
        )
