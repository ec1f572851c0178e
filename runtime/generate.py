"""The decode loops: greedy as the reference does it, and sampled with guidance."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels.sampling import draw, guide, gumbel
from kinetok.model.decoder import MotionDecoder
from kinetok.runtime.sampling import SamplingParams

NOISE_AHEAD = 1 << 16  # numbers drawn at once: a small head's noise costs as much for one position as for fifty
ENDED_AT_ONCE = [1]  # what the reference returns when the end token comes first


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
    return tokens or list(ENDED_AT_ONCE)


@torch.inference_mode()
def sample_tokens(
    decoder: MotionDecoder,
    text_features: Tensor,
    params: SamplingParams,
    *,
    budget: tuple[int, int],
    request: int = 0,
    empty_features: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[int]:
    """Tokens of one clip for text features ``[L, D]``; ``params`` without None (``SamplingParams.resolve``).

    budget: fewest and most tokens; the end token is banned before the fewest. With guidance other than 1 a second row
    with ``empty_features`` runs along. The draw at a position depends on the seed, the position and ``request`` alone.
    """
    least, most = budget
    config = decoder.config
    guided = params.guidance != 1.0
    rows: Sequence[Tensor] = [text_features]
    if guided:
        if empty_features is None:
            raise UserError("guidance needs the features of the empty text")
        rows = [text_features, empty_features]
    assert params.guidance is not None and params.temperature is not None
    assert params.top_k is not None and params.top_p is not None
    cache = decoder.new_cache(len(rows), max(map(len, rows)) + most)
    logits = decoder.prefill(rows, cache)
    seed = torch.tensor([params.seed - (params.seed >> 63 << 64)], device=logits.device)
    name = torch.tensor([request], device=logits.device)
    noise = _noise(logits.shape[1], most, seed, name) if params.temperature else None
    tokens: list[int] = []
    while len(tokens) < most:
        scores = guide(logits[:1], logits[1:], params.guidance) if guided else logits.float()
        if config.tie_weights:
            scores[:, config.pad_id] = -torch.inf
        if len(tokens) < least:
            scores[:, config.end_id] = -torch.inf
        try:
            token = draw(
                scores,
                next(noise) if noise is not None else None,
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
            )
        except ValueError as error:
            raise UserError(f"at token {len(tokens)}: {error}; are the model's weights whole?") from error
        if int(token) == config.end_id:
            break
        tokens.append(int(token))
        if progress is not None:
            progress(len(tokens), most)
        if len(tokens) < most:
            logits = decoder.decode_step(token.expand(len(rows)), cache)
    return tokens or list(ENDED_AT_ONCE)


def _noise(classes: int, most: int, seed: Tensor, request: Tensor) -> Iterator[Tensor]:
    """Gumbel noise ``[1, classes]`` of the positions 0 to most - 1, drawn several at a time."""
    ahead = max(1, NOISE_AHEAD // classes)
    for first in range(0, most, ahead):
        positions = torch.arange(first, min(first + ahead, most), device=seed.device)
        yield from gumbel(classes, seed, positions, request).split(1)
