"""What a decoder does so far: pictures of a few captions, in the middle of its training."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from kinetok.model.decoder import MotionDecoder
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion import Motion
from kinetok.motion.skeleton import CANONICAL_OFFSETS
from kinetok.runtime.generate import generate_tokens
from kinetok.train.loop import OneProcess
from kinetok.train.packing import PackedDecoder

SECONDS = 4.0


class Samples:
    """Greedy clips of at most 4 s of ``texts`` (caption to features ``[L, D]``), as ``folder/step-N-i.png`` and ``.bvh``.

    Called by every process with the module; the first one generates, from a whole copy on the CPU.
    """

    def __init__(
        self,
        processes: OneProcess,
        tokenizer: MotionTokenizer,
        mean: Tensor,
        std: Tensor,
        texts: Mapping[str, Tensor],
        folder: Path,
    ) -> None:
        self.processes, self.tokenizer, self.mean, self.std = processes, tokenizer, mean, std
        self.texts, self.folder = dict(texts), folder

    def __call__(self, module: nn.Module, step: int) -> None:
        whole = module.decoder if isinstance(module, PackedDecoder) else module
        assert isinstance(whole, MotionDecoder)
        state = self.processes.whole(whole.state_dict())
        if self.processes.rank:
            return
        with torch.device("meta"):
            decoder = MotionDecoder(whole.config)
        decoder.load_state_dict({name: value.cpu() for name, value in state.items()}, assign=True)
        decoder.eval()
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, (caption, features) in enumerate(self.texts.items()):
            most = min(
                round(SECONDS * self.tokenizer.config.tokens_per_second), decoder.config.block_size - len(features)
            )
            tokens = generate_tokens(decoder, features, most)
            with torch.inference_mode():
                frames = self.tokenizer.decode(torch.tensor([tokens]))[0].double() * self.std + self.mean
            motion = Motion.from_features(frames.numpy(), offsets=CANONICAL_OFFSETS, text=caption)
            for suffix in ("png", "npz"):
                motion.save(self.folder / f"step-{step:08d}-{number}.{suffix}")
