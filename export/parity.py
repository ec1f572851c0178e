"""How far a model's graphs are from the model itself: logits, greedy tokens, decoded joints."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinetok.export.bundle import export_bundle
from kinetok.model.pretrained import ModelBundle
from kinetok.motion import Motion
from kinetok.runtime.backends.onnx import OnnxBackend, OnnxDetokenizer
from kinetok.runtime.bundle import read_bundle

LOGITS = 1e-4
TIE = 1e-3  # a token may differ where the two best logits are closer than this
METRES = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """differing counts positions where the greedy tokens differ beyond a tie; ties those where they differ within one.

    logits: largest difference at equal histories. metres: largest distance of a joint, of the model's own greedy clips.
    """

    prompts: int
    steps: int
    logits: float
    largest_logit: float
    differing: int
    ties: int
    metres: float

    @property
    def passed(self) -> bool:
        return self.logits <= LOGITS and not self.differing and self.metres <= METRES

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


@torch.inference_mode()
def compare(model: ModelBundle, texts: Sequence[Tensor], steps: int, *, opset: int = 23) -> Parity:
    """Export ``model`` as fp32 and run both on text features ``[L_i, D]``, all together, for ``steps`` greedy tokens each.

    Both get the tokens that the model chose (the end token is banned, so that every clip is as long), so that a tie does
    not make two clips of one.
    """
    config, decoder, rows = model.decoder.config, model.decoder, range(len(texts))
    worst = largest = 0.0
    differing = ties = 0
    with tempfile.TemporaryDirectory() as folder:
        bundle = read_bundle(export_bundle(model, Path(folder) / "bundle", opset=opset, text=False, check=False))
        capacity = max(map(len, texts)) + steps
        backend, detokenizer = OnnxBackend(bundle, len(texts), capacity), OnnxDetokenizer(bundle)
        cache = decoder.new_cache(len(texts), capacity)
        wanted = decoder.prefill(texts, cache)
        got = torch.stack([backend.prefill(row, text) for row, text in enumerate(texts)])
        chosen: list[Tensor] = []
        while True:
            difference = float((wanted - got).abs().max())
            worst = max(worst, difference if math.isfinite(difference) else math.inf)
            largest = max(largest, float(wanted.abs().max()))
            own = wanted[:, : config.codebook]
            tokens, other = own.argmax(1), got[:, : config.codebook].argmax(1)
            gaps = (own.amax(1) - own.gather(1, other[:, None])[:, 0])[other != tokens]
            ties, differing = ties + int((gaps < TIE).sum()), differing + int((gaps >= TIE).sum())
            chosen.append(tokens)
            if len(chosen) == steps:
                break
            wanted, got = decoder.decode_step(tokens, cache), backend.decode(rows, tokens)
        far = max(_distance(model, row.tolist(), detokenizer) for row in torch.stack(chosen, dim=1))
    return Parity(
        prompts=len(texts),
        steps=steps,
        logits=worst,
        largest_logit=largest,
        differing=differing,
        ties=ties,
        metres=far,
    )


def _distance(model: ModelBundle, tokens: Sequence[int], detokenizer: OnnxDetokenizer) -> float:
    """Metres between the joints of the two decoded clips, at most."""
    own = model.tokenizer.decode(torch.tensor([list(tokens)]))[0].double().numpy() * model.std + model.mean
    joints = [
        Motion.from_features(x, offsets=model.offsets).joints
        for x in (own, np.asarray(detokenizer.decode(tokens), np.float64))
    ]
    distance = float(np.linalg.norm(np.asarray(joints[0]) - np.asarray(joints[1]), axis=-1).max())
    return distance if math.isfinite(distance) else math.inf
