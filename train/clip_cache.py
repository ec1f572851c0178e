"""An engine that keeps what it generated, so that an interrupted evaluation goes on where it stopped."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kinetok.errors import UserError
from kinetok.model.bank import BankedEncoder
from kinetok.motion import Motion
from kinetok.runtime import Engine, SamplingParams


def model_digest(folder: str | Path) -> str:
    """SHA-256 over the names and bytes of a model directory's files, hexadecimal."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class _Remembering(BankedEncoder):
    """Encodes a sentence once."""

    def __init__(self, encoder: BankedEncoder) -> None:
        super().__init__(encoder.bank, encoder.spec, encoder.dim)
        self._seen: dict[str, Tensor] = {}

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        for text in texts:
            if text not in self._seen:
                self._seen[text] = super().encode([text])[0]
        return [self._seen[text] for text in texts]


class CachedEngine(Engine):
    """``Engine`` whose single clips are files in ``folder``: one a model, sentence and sampling parameters.

    A change of the code does not show in a file's name: empty the folder after one. told is called after each clip.
    """

    def __init__(self, engine: Engine, folder: str | Path, told: Callable[[], None] = lambda: None) -> None:
        super().__init__(engine.model)
        self.text = _Remembering(engine.text)
        self.digest = model_digest(engine.model.directory)
        self.folder = Path(folder) / self.digest[:16]
        self.told = told

    def generate(
        self,
        prompts: str | Sequence[str],
        params: SamplingParams | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        **keywords: Any,
    ) -> list[Motion]:
        """One clip of one sentence, as ``Engine.generate`` gives it; ``UserError`` for several sentences."""
        if not isinstance(prompts, str):
            raise UserError(f"expected one sentence at a time, got {type(prompts).__name__}")
        chosen = replace(params or SamplingParams(), **keywords).resolve(self.model.sampling)
        key = json.dumps([self.digest, prompts, asdict(chosen)], sort_keys=True)
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
        if path.exists():
            motion = Motion.load(path)
            motion.text = prompts
        else:
            (motion,) = super().generate(prompts, chosen, progress=progress)
            motion.save(path)
        self.told()
        # From the features in both cases, so that a clip is the same whether it was generated or read.
        return [Motion.from_features(np.asarray(motion.features), offsets=self.model.offsets, text=prompts)]
