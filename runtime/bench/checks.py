"""No speed without a check: what a route wrote must be what the model's plain weights choose."""

from typing import Any

import torch
from torch import Tensor

from kinetok.model.decoder import MotionDecoder

# How far below the best a chosen token's logit may lie. Rounding decides between tokens nearer than that: in half precision a
# logit of a few units moves by hundredths with the order of a sum, and with fp8 keys and values by some more (0.03 and 0.08
# seen in 8 layers). A token that has nothing to do with the weights lies whole units below.
MARGINS = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2.5e-1}
FP8_MARGIN = 5e-1


@torch.inference_mode()
def greedy(
    plain: MotionDecoder, features: Tensor, tokens: Tensor, *, given: int = 0, kv: torch.dtype | None = None
) -> dict[str, Any]:
    """Whether each of ``tokens [B, n]`` from number ``given`` on is the best motion token behind those before it.

    The whole sequence goes through the layout without a cache (section 3), text ``features [B, L, D]`` in front. kv: of the
    cache that wrote them. margin: the largest distance to the best logit, allowed: how large it may be; near_ties: how
    many tokens were not the best themselves.
    """
    config, length = plain.config, features.shape[1]
    dtype = plain.embed.weight.dtype
    allowed = FP8_MARGIN if kv is not None and kv.itemsize == 1 else MARGINS[dtype]
    margin, ties = 0.0, 0
    for row in range(len(tokens)):
        prefix = torch.cat((tokens.new_full((length,), config.pad_id), tokens[row, :-1]))
        logits = plain(prefix[None], features[row : row + 1], features.new_ones(1, length))[0, length - 1 + given :]
        logits = logits[:, : config.codebook].float()
        below = logits.max(1).values - logits.gather(1, tokens[row, given:, None])[:, 0]
        ties += int((below != 0).sum())
        # NaN must not pass: max() of Python's would lose it.
        margin = float(torch.maximum(below.max(), below.new_tensor(margin)))
    return {
        "passed": margin <= allowed,
        "margin": margin if margin == margin else None,
        "allowed": allowed,
        "near_ties": ties,
        "distinct_tokens": len(tokens[:, given:].unique()),
    }
