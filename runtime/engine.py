"""``Engine``: a loaded model that turns sentences into motion."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.model.bank import BankedEncoder, PromptBank
from kinetok.model.packed import pack_in_place, parameter_count, unpack_in_place, unpacked_bytes
from kinetok.model.pretrained import ModelBundle, choose_device, load_pretrained, weight_bytes
from kinetok.model.text import check_prompt
from kinetok.motion import Motion
from kinetok.runtime.backends import check_backend, check_names, open_backend
from kinetok.runtime.backends.auto import Chosen, choose_backend
from kinetok.runtime.character import Job
from kinetok.runtime.crowd import Crowd, Update
from kinetok.runtime.generate import sample_tokens
from kinetok.runtime.memory import bytes_available, memory_plan, within_memory
from kinetok.runtime.sampling import CARRIED_SECONDS, KEPT_SECONDS, TRAINED_SECONDS, SamplingParams, token_budget
from kinetok.runtime.scheduler import Scheduler
from kinetok.runtime.stream import Stream

T = TypeVar("T")
LATEST = 1e9  # seconds, thirty years: a number that a clock can be added to
ATTENTION = {
    "torch": "torch scaled_dot_product_attention",
    "fused": "kinetok decode_attention and prefix_attention",
}


def load(path_or_id: str | Path | None = None, device: str = "auto", dtype: str = "auto", **limits: Any) -> "Engine":
    """Load a model: a directory, a hub id ``owner/name``, or None for the default model in the package.

    device "auto" is CUDA where there is one; dtype "auto" is the stored one on CUDA and float32 on a CPU. limits:
    ``Engine``'s other parameters. On a CPU quantised weights become the values that they stand for, once; where there is no
    memory for those they stay packed, which is slow. For the backend fused all weights are packed here, without a second
    copy. Raises ``UserError`` for what is not an intact model, and, saying what would fit, where the memory is not there.
    """
    check_names(limits.get("backend", "auto"), limits.get("kv", "auto"))  # before reading gigabytes
    need = weight_bytes(path_or_id, device, dtype)
    with within_memory(f"the model {path_or_id or 'default'}", need, choose_device(device)):
        model = load_pretrained(path_or_id, device, dtype)
    place, free = model.decoder.embed.weight.device, bytes_available(model.decoder.embed.weight.device)
    if limits.get("backend") == "fused":
        with memory_plan("packing the decoder's weights", place):
            pack_in_place(model.decoder)
    elif place.type == "cpu" and (free is None or unpacked_bytes(model.decoder) <= free):
        unpack_in_place(model.decoder)
    return Engine(model, **limits)


class Engine:
    """Sentences in, motion out: whole clips (``generate``), frames as they come (``stream``), a crowd (``submit`` and on).

    A character's tokens depend on its prompt, its parameters and its request number, and on nothing else: they are the
    same, to the bit, by whichever of the three ways and in whatever company (docs/numerics.md).

    backend: "auto" (``choose_backend``) or what ``open_backend`` takes. kv: how keys and values are kept, "auto" for the
    weights' dtype, or "fp8", half of bf16's memory, with the backend fused. characters: how many of a crowd run at once
    (twice as many without guidance); positions: of text and motion a character or a clip may need, the model's own limit by
    default; queue: how many may wait. A crowd's memory is taken, all of it, by ``warm_up`` or the first ``submit``.
    warm: with the backend fused on a GPU, the graphs of all steps are captured then, and when a first stream is opened; False
    leaves each to its first use, in the middle of a crowd, and starts sooner. ``timings`` holds the seconds that each stage
    of the last ``generate`` took: text, decode, detokenize, motion.
    Raises ``UserError`` for limits that no model has, and for a backend or kv that this one cannot have.
    """

    def __init__(
        self,
        model: ModelBundle,
        *,
        backend: str = "auto",
        kv: str = "auto",
        characters: int = 16,
        positions: int | None = None,
        queue: int = 64,
        warm: bool = True,
    ) -> None:
        most = model.decoder.config.block_size
        positions = most if positions is None else positions
        for name, value, high in (
            ("characters", characters, 2**31),
            ("positions", positions, most),
            ("queue", queue, 2**31),
        ):
            if type(value) is not int or not 1 <= value <= high:
                raise UserError(f"{name}: expected a whole number from 1 to {high}, got {value!r}")
        self.model = model
        chosen = choose_backend(model.decoder) if backend == "auto" else Chosen(backend, "asked for")
        self.backend, self.backend_reason = chosen
        check_backend(self.backend, model, kv)
        self.characters, self.queue, self.kv = characters, queue, kv
        self.positions, self.warm = positions, warm
        bank = PromptBank.load(model.bank) if model.bank is not None else None
        self.text = BankedEncoder(bank, model.text_encoder, model.decoder.config.text_dim)
        self.timings: dict[str, float] = {}
        self._spare: list[Scheduler] = []
        self._stages: list[Crowd] = []  # of streams that are over
        self._crowd: Crowd | None = None
        self._making = Lock()

    @contextmanager
    def _timed(self, stage: str):  # type: ignore[no-untyped-def]
        began = time.perf_counter()
        yield
        self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - began

    def generate(
        self,
        prompts: str | Sequence[str],
        params: SamplingParams | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        **keywords: Any,
    ) -> list[Motion]:
        """One clip a prompt.

        keywords are ``SamplingParams`` fields and win over ``params``. Clip i of a list is request i, so the same prompt
        several times gives several variants; a clip depends on its prompt, the seed and its place in the list, and
        not on the other prompts. progress is told (tokens, of at most) of each clip as it grows. Raises ``UserError``
        for prompts or parameters that cannot be used.
        """
        chosen = self._params(params, keywords)
        if chosen.seconds == math.inf:
            raise UserError("seconds: a clip ends; use stream for one that does not")
        if not isinstance(prompts, str | Iterable):
            raise UserError(f"expected a sentence, or several, got {type(prompts).__name__}")
        texts = [check_prompt(text) for text in ([prompts] if isinstance(prompts, str) else prompts)]
        self.timings = {}
        return [self._clip(text, request, chosen, progress) for request, text in enumerate(texts)]

    def _clip(
        self, text: str, request: int, params: SamplingParams, progress: Callable[[int, int], None] | None
    ) -> Motion:
        model = self.model
        with self._timed("text"):
            job = self._job(text, params, request)
        with self._timed("decode"):
            # Kept from clip to clip: its slots are memory, and two threads must not share them.
            scheduler = _taken(self._spare, self._alone)
            try:
                tokens = sample_tokens(scheduler, job, progress)
            finally:
                self._spare.append(scheduler)
        with self._timed("detokenize"):
            x = self.decode_tokens(tokens)
        with self._timed("motion"):
            return Motion.from_features(x, offsets=model.offsets, text=text)

    def _alone(self) -> Scheduler:
        backend = open_backend(self.backend, self.model, 2, self.positions, self.kv)
        return Scheduler(backend, self.model.decoder.config, queue=1)

    def stream(self, prompt: str, params: SamplingParams | None = None, *, request: int = 0, **keywords: Any) -> Stream:
        """Frames as they come: an iterator of ``Motion`` blocks that go on from one another (``Stream``).

        Put together they are ``generate``'s clip of the same parameters, tokens to the bit and frames to 1e-5; seconds may
        be infinity here. A block comes with every token, the first one after as many as the tokenizer looks ahead
        (``kinetok.model.streaming``). Raises ``UserError`` for what ``generate`` refuses, and for a tokenizer that cannot
        stream.
        """
        chosen, text = self._params(params, keywords), check_prompt(prompt)

        def redirected(other: str, written: int) -> Job:
            return self._job(check_prompt(other), chosen, request, written=written)

        job = self._job(text, chosen, request)
        return Stream(_taken(self._stages, self._stage), self._stages.append, job, text, redirected, self._carried)

    def _stage(self) -> Crowd:
        return Crowd(self.model, self.backend, 1, self.positions, queue=1, kv=self.kv, warm=self.warm)

    def warm_up(self) -> None:
        """Do now what the first ``submit`` would wait for: take the crowd's memory, capture the graphs of its steps."""
        self._start()

    def submit(
        self,
        prompt: str,
        params: SamplingParams | None = None,
        *,
        request: int = 0,
        deadline: float | None = None,
        **keywords: Any,
    ) -> int:
        """Let a character join the crowd; returns its handle. ``step`` moves everyone on, ``poll`` reads frames.

        deadline: seconds from now after which it is given up. The others of a crowd neither change a character's tokens
        nor overtake it in the queue. Raises ``UserError`` when the queue is full, when too many that are over lie unread,
        and for a prompt or parameters that cannot be used.
        """
        crowd = self._start()
        chosen, text = self._params(params, keywords), check_prompt(prompt)
        number = isinstance(deadline, int | float) and not isinstance(deadline, bool)
        if deadline is not None and not (number and 0 < deadline <= LATEST):
            raise UserError(
                f"deadline: expected seconds from now, more than 0 and at most {LATEST:g}, got {deadline!r}"
            )
        limit = None if deadline is None else time.monotonic() + deadline
        return crowd.submit(self._job(text, chosen, request, deadline=limit), text)

    def step(self) -> int:
        """One token for every character that runs and is read; returns how many, 0 when there is nothing to do.

        Whatever is raised here (a failing backend, Ctrl-C) leaves the crowd whole: the next step repeats what was cut off.
        """
        return self._start().step()

    def poll(self, handle: int) -> Update:
        """A character's new frames and its state (``Update``). ``UserError`` for one that was told to be over before."""
        return self._start().poll(handle)

    def cancel(self, handle: int) -> None:
        """Take a character out at once, its unread frames too. ``UserError`` for one that is not there any more."""
        self._start().cancel(handle)

    def fork(self, handle: int, *, request: int | None = None, seed: int | None = None) -> int:
        """A twin of a running character, with a draw of its own from here on: the prompt is prefilled once for all twins.

        Right after ``submit`` it is the clip that ``submit(prompt, request=...)`` would give. request, seed: None keeps
        the first one's. Raises ``UserError`` when the character waits or is over, no slots are free, or too many that are over
        lie unread.
        """
        crowd = self._start()
        job = crowd.job(handle)
        params = job.params if seed is None else replace(job.params, seed=seed)
        return crowd.fork(handle, replace(job, params=params, request=job.request if request is None else request))

    def redirect(self, handle: int, prompt: str) -> None:
        """Give a character another prompt from its next token on; its pose goes on, its length counts anew from here.

        The new text and the last ``CARRIED_SECONDS`` of motion are prefilled, so the old text leaves nothing in the cache.
        """
        crowd, text = self._start(), check_prompt(prompt)
        job = crowd.job(handle)
        written = crowd.written(handle)
        new = self._job(text, job.params, job.request, deadline=job.deadline, written=written)
        crowd.redirect(handle, new, self._carried, text)

    @property
    def _carried(self) -> int:
        return round(CARRIED_SECONDS * self.model.tokenizer.config.tokens_per_second)

    def _start(self) -> Crowd:
        if self._crowd is not None:  # a signal handler must not wait for the lock of its own thread
            return self._crowd
        with self._making:
            if self._crowd is None:
                self._crowd = Crowd(
                    self.model, self.backend, self.characters, self.positions, self.queue, self.kv, warm=self.warm
                )
            return self._crowd

    def _params(self, params: SamplingParams | None, keywords: dict[str, Any]) -> SamplingParams:
        names = [field.name for field in fields(SamplingParams)]
        if not isinstance(params, SamplingParams | None):
            raise UserError(
                f"params: expected SamplingParams, got {type(params).__name__}; several prompts are one list"
            )
        unknown = sorted(set(keywords) - set(names))
        if unknown:
            raise UserError(f"unknown sampling parameters {unknown}: expected some of {names}")
        return replace(params or SamplingParams(), **keywords).resolve(self.model.sampling)

    def _job(
        self,
        text: str,
        params: SamplingParams,
        request: int,
        *,
        deadline: float | None = None,
        written: int = 0,
    ) -> Job:
        """What a character is to do from its token ``written`` on."""
        rate = self.model.tokenizer.config.tokens_per_second
        features = self._features(text)
        empty = self._features("") if params.guidance != 1.0 else None
        room = self.positions - max(len(features), len(empty) if empty is not None else 0)
        least, most = token_budget(params, self.model.sampling, rate, room)
        window = min(round(TRAINED_SECONDS * rate), room)
        return Job(
            text=features,
            empty=empty,
            params=params,
            least=written + least,
            most=written + most,
            request=request,
            window=window,
            keep=max(1, min(round(KEPT_SECONDS * rate), window // 2)),
            deadline=deadline,
        )

    def _features(self, text: str) -> Tensor:
        return self.text.encode([text])[0].to(self.model.decoder.embed.weight.device)

    @torch.inference_mode()
    def decode_tokens(self, tokens: Sequence[int]) -> np.ndarray:
        """Tokens to features ``[T, 272]``, not normalised. ``UserError`` when the model decodes to NaN or infinity."""
        model = self.model
        device = model.tokenizer.decoder.last.weight.device
        scale, shift = (torch.from_numpy(x).to(device, torch.float32) for x in (model.std, model.mean))
        x = model.tokenizer.decode(torch.tensor([list(tokens)], device=device), scale, shift)[0].double().cpu().numpy()
        if not np.isfinite(x).all():
            raise UserError("the model decoded to NaN or infinity; are its weights whole?")
        return x

    def describe(self) -> dict[str, Any]:
        """What is loaded, and where it runs."""
        model = self.model
        config = model.tokenizer.config
        weight = model.decoder.embed.weight
        return {
            "model": str(model.directory),
            "parameters": parameter_count(model.tokenizer) + parameter_count(model.decoder),
            "device": str(weight.device),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "quantisation": model.quantisation.kind if model.quantisation is not None else None,
            "tokens_per_second": config.tokens_per_second,
            "codebook": config.codebook,
            "text_encoder": model.text_encoder.get("name"),
            "banked_prompts": len(self.text.bank.prompts) if self.text.bank is not None else 0,
            "backend": self.backend,
            "kv": self.kv,
            "backend_reason": self.backend_reason,
            "attention": ATTENTION.get(self.backend.partition(":")[0], "the graph's own"),
        }


def _taken(spare: list[T], make: Callable[[], T]) -> T:
    """One that nobody uses, or a new one; another thread may be quicker."""
    try:
        return spare.pop()
    except IndexError:
        return make()
