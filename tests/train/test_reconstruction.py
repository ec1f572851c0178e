"""Clips through a tokenizer and back."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.train.data.store import Clip
from kinetok.train.reconstruction import reconstruct


class Fake:
    """A token of four frames that is their mean; lives where its weight is, like a tokenizer on a GPU."""

    config = SimpleNamespace(frames_per_token=4)

    def __init__(self, device: str) -> None:
        self.decoder: Any = SimpleNamespace(last=SimpleNamespace(weight=torch.empty(1, device=device)))
        self.seen: list[Tensor] = []

    def encode(self, frames: Tensor) -> Tensor:
        self.seen.append(frames)
        return torch.arange(frames.shape[1] // 4)[None]

    def decode(self, tokens: Tensor) -> Tensor:
        return tokens[..., None].repeat_interleave(4, 1).expand(-1, -1, 272).float()


def clip(frames: int) -> Clip:
    x = np.ones((frames, 272), np.float32)
    return Clip(
        id="a", subject="", label="", split="test", captions=("a",), heading_flips=0, features=x, mirrored=x
    )  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_frames_go_where_the_tokenizer_is(device: str) -> None:
    fake = Fake(device)
    mean, std = np.full(272, 0.5), np.full(272, 2.0)
    (result,) = reconstruct(cast(MotionTokenizer, fake), mean, std, [clip(11)], most_frames=10)
    (frames,) = fake.seen
    assert frames.device.type == device and tuple(frames.shape) == (1, 8, 272)
    assert result.real.shape == result.decoded.shape == (8, 272) and result.tokens.tolist() == [0, 1]
    np.testing.assert_allclose(result.decoded[:, 0], [0.5] * 4 + [2.5] * 4)
    if device == "cpu":
        np.testing.assert_allclose(frames.numpy(), 0.25)


def test_an_empty_split_is_named() -> None:
    with pytest.raises(UserError, match="is the split empty"):
        reconstruct(cast(MotionTokenizer, Fake("cpu")), np.zeros(272), np.ones(272), [])
