"""What a model does so far: pictures of a few held-out captions or clips, in the middle of its training."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from kinetok.model.decoder import MotionDecoder
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion import Motion
from kinetok.motion.skeleton import CANONICAL_OFFSETS, FPS
from kinetok.runtime.generate import generate_tokens
from kinetok.train.loop import OneProcess
from kinetok.train.packing import PackedDecoder

SECONDS = 4.0


class Samples:
    """Greedy clips of at most 4 s of ``texts`` (caption to features ``[L, D]``), as ``folder/step-N-i.png`` and ``.npz``.

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
        for number, (caption, features) in enumerate(self.texts.items()):
            most = min(
                round(SECONDS * self.tokenizer.config.tokens_per_second), decoder.config.block_size - len(features)
            )
            tokens = generate_tokens(decoder, features, most)
            with torch.inference_mode():
                frames = self.tokenizer.decode(torch.tensor([tokens]))[0].double() * self.std + self.mean
            _draw(frames, caption, self.folder / f"step-{step:08d}-{number}")


class Reconstructions:
    """Clips of at most 4 s as a tokenizer gives them back: ``folder/step-N-i.png`` and ``.npz``, once ``clip-i`` as they are.

    ``clips`` are normalised frames ``[T, 272]``; what the module returns first are its frames for ``[B, T, 272]``. Every
    process takes part, the first one writes.
    """

    def __init__(
        self, processes: OneProcess, clips: Mapping[str, Tensor], mean: Tensor, std: Tensor, folder: Path
    ) -> None:
        self.processes, self.mean, self.std, self.folder = processes, mean, std, folder
        self.clips = {name: frames[: round(SECONDS * FPS)] for name, frames in clips.items()}

    @torch.no_grad()
    def __call__(self, module: nn.Module, step: int) -> None:
        for number, (name, frames) in enumerate(self.clips.items()):
            made = module(frames[None].to(self.processes.device))[0][0]
            if self.processes.rank:
                continue
            original = self.folder / f"clip-{number}"
            if not original.with_suffix(".npz").exists():
                _draw(frames * self.std + self.mean, name, original)
            _draw(made.cpu().double() * self.std + self.mean, name, self.folder / f"step-{step:08d}-{number}")


def _draw(frames: Tensor, text: str, path: Path) -> None:
    motion = Motion.from_features(frames.double().numpy(), offsets=CANONICAL_OFFSETS, text=text)
    for suffix in ("npz", "png"):
        motion.save(path.with_name(f"{path.name}.{suffix}"))
