"""The decode loops of one clip: greedy as the reference does it, and sampled."""

from collections.abc import Callable

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.model.decoder import MotionDecoder
from kinetok.runtime.character import Job
from kinetok.runtime.scheduler import ENDED_AT_ONCE, Scheduler


@torch.inference_mode()
def generate_tokens(decoder: MotionDecoder, text_features: Tensor, max_tokens: int = 50) -> list[int]:
    """Greedy tokens for text features ``[L, D]``: arg-max without a softmax, one position a step (section 3).

    Stops before the end token or at ``max_tokens``; the end token on the very first step gives [1], as in the reference.
    Raises ``UserError`` when text and motion do not fit into the model.
    """
    if text_features.ndim != 2 or not len(text_features):
        raise UserError(f"expected text features of shape [L, D], L > 0, got {list(text_features.shape)}")
    if max_tokens < 1:
        raise UserError(f"max_tokens: expected at least 1, got {max_tokens}")
    # The last token is never fed back, so it takes no position.
    cache = decoder.new_cache(1, len(text_features) + max_tokens - 1)
    logits = decoder.prefill([text_features], cache)
    tokens: list[int] = []
    while (token := int(logits.argmax())) != decoder.config.end_id:
        tokens.append(token)
        if len(tokens) == max_tokens:
            return tokens
        logits = decoder.decode_step(torch.tensor([token], device=logits.device), cache)
    return tokens or [ENDED_AT_ONCE]


def sample_tokens(scheduler: Scheduler, job: Job, progress: Callable[[int, int], None] | None = None) -> list[int]:
    """Tokens of one clip, alone on ``scheduler``. Raises ``UserError`` where the model's logits are no numbers.

    progress is told (tokens, of at most) as the clip grows. Whatever interrupts it, the scheduler's slots are free again.
    """
    character = scheduler.submit(job)
    try:
        while not character.over:
            scheduler.step()
            if progress is not None and character.state != "failed":
                progress(len(character.tokens), int(job.most))
    finally:
        scheduler.cancel(character)
    if character.error is not None:
        raise UserError(character.error)
    return character.tokens
