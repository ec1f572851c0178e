"""Training items as the paper's data has them, without the data: 60 to 300 frames, captions of 8 to 40 features."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class SyntheticSequences:
    """Stands for ``Sequences``: lengths uniform in 30 to 150 tokens, random tokens and features."""

    def __init__(self, *, codebook: int, text_dim: int, clips: int = 2000, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.folder, self.text_dim = Path("synthetic"), text_dim
        self.lengths: NDArray[np.int64] = rng.integers(30, 151, clips)
        self.text_lengths: NDArray[np.int64] = rng.integers(8, 41, clips)
        self.splits = np.where(np.arange(clips) % 20, "train", "val")
        self._tokens = rng.integers(codebook, size=(clips, 150))
        self._text = rng.standard_normal((40, text_dim)).astype(np.float32)

    def tokens(self, clip: int) -> Tensor:
        return torch.from_numpy(self._tokens[clip, : self.lengths[clip]])

    def caption(self, clips: NDArray[np.int64], chance: NDArray[np.float64]) -> NDArray[np.int64]:
        return clips

    def text(self, caption: int) -> Tensor:
        return torch.from_numpy(self._text[: self.text_lengths[caption]])

    def rows(
        self,
        captions: NDArray[np.int64],
        text_lengths: NDArray[np.int64],
        clips: NDArray[np.int64],
        first: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> tuple[Tensor, Tensor]:
        text = [self._text[:count] for count in text_lengths]
        tokens = [self._tokens[clip, at : at + count] for clip, at, count in zip(clips, first, counts, strict=True)]
        return torch.from_numpy(np.concatenate(text)), torch.from_numpy(np.concatenate(tokens))
