"""Wavelet transforms in fp32, mostly channels-last as the model has them: ``bench_wavelet.py --json FILE``.

The other routes get their input in the layout they are best at, ``[clips, channels, frames]``, made outside the clock:
PyWavelets (on a CPU, where it is installed), and the grouped convolution that the released code makes of a level.
PyWavelets' orthonormal scale is left as it is, and the lows and highs of its last level are left apart.
"""

from importlib.util import find_spec

import numpy as np
import torch
from harness import Bench, Case, Route, main, pytest_entry
from torch import Tensor
from torch.nn import functional as F

from kinetok.kernels.wavelet import dwt, idwt, reference

Size = tuple[int, int, int, str, int, bool]  # clips, frames, channels, wavelet, levels, channels last
SIZES: dict[str, Size] = {
    "256 clips of 96, haar": (256, 96, 272, "haar", 1, True),
    "256 clips of 96, haar, channels first": (256, 96, 272, "haar", 1, False),
    "256 clips of 96, haar, 2 levels": (256, 96, 272, "haar", 2, True),
    "256 clips of 96, db2": (256, 96, 272, "db2", 1, True),
    "1024 clips of 300, haar": (1024, 300, 272, "haar", 1, True),
    "1024 clips of 300, haar, 2 levels": (1024, 300, 272, "haar", 2, True),
    "1024 clips of 300, db4": (1024, 300, 272, "db4", 1, True),
}
SMALL = [name for name, size in SIZES.items() if size[0] < 1024]


def filters(wavelet: str, like: Tensor) -> tuple[Tensor, Tensor]:
    low = like.new_tensor(reference.SCALING[wavelet])
    return low, low.flip(0) * (-1.0) ** torch.arange(len(low), device=like.device)


def grouped(x: Tensor, wavelet: str, levels: int) -> Tensor:
    """The transform of ``x [B, C, T]`` as one grouped convolution a level."""
    low, high = filters(wavelet, x)
    for _ in range(levels):
        side = len(low) // 2 - 1
        if side:
            x = F.pad(x, (side, side), mode="circular")
        channels = x.shape[1]
        both = torch.stack((low, high))[:, None].repeat(channels, 1, 1)
        y = F.conv1d(x, both, stride=2, groups=channels).unflatten(1, (channels, 2))
        x = y.transpose(1, 2).flatten(1, 2) / 2
    return x


def grouped_back(y: Tensor, wavelet: str, levels: int) -> Tensor:
    """Its inverse for Haar, as one transposed grouped convolution a level."""
    low, high = filters(wavelet, y)
    for _ in range(levels):
        channels = y.shape[1] // 2
        pairs = y.unflatten(1, (2, channels)).transpose(1, 2).flatten(1, 2)
        both = torch.stack((low, high))[:, None].repeat(channels, 1, 1)
        y = F.conv_transpose1d(pairs, both, stride=2, groups=channels) * 2
    return y


def with_pywavelets(x: Tensor, wavelet: str, levels: int, inverse: bool) -> dict[str, Route]:
    if x.is_cuda or find_spec("pywt") is None:
        return {}
    import pywt

    array, mode = x.numpy(), "reflect" if wavelet == "haar" else "periodization"

    def analysis(*_: Tensor) -> tuple[np.ndarray, np.ndarray]:
        bands = pywt.dwt(array, wavelet, mode=mode, axis=-1)
        for _ in range(levels - 1):
            bands = pywt.dwt(np.concatenate(bands, axis=1), wavelet, mode=mode, axis=-1)
        return bands

    def synthesis(*_: Tensor) -> np.ndarray:
        y = array
        for _ in range(levels):
            y = pywt.idwt(*np.split(y, 2, axis=1), wavelet, mode=mode, axis=-1)
        return y

    return {"PyWavelets": synthesis if inverse else analysis}


def build(size: Size, device: torch.device) -> Case:
    clips, frames, channels, wavelet, levels, last = size
    mode, gain = "reflect" if wavelet == "haar" else "periodic", 0.5
    x = torch.randn(clips, frames, channels, device=device)
    first = x.transpose(1, 2).contiguous()
    return Case(
        args=(x if last else first,),
        ours=lambda x: dwt(x, levels, wavelet, mode, channels_last=last),
        eager=lambda x: reference.dwt(x, levels, wavelet, mode, gain, "packet", last),
        library={
            **with_pywavelets(first, wavelet, levels, False),
            "grouped convolution": lambda x: grouped(first, wavelet, levels),
        },
        moved=2 * x.nbytes,
        tolerance=1e-6,
    )


def build_back(size: Size, device: torch.device) -> Case:
    clips, frames, channels, wavelet, levels, last = size
    y = torch.randn(clips, frames >> levels, channels << levels, device=device)
    first = y.transpose(1, 2).contiguous()
    library = with_pywavelets(first, wavelet, levels, True)
    if wavelet == "haar":
        library["grouped convolution"] = lambda y: grouped_back(first, wavelet, levels)
    return Case(
        args=(y if last else first,),
        ours=lambda y: idwt(y, levels, wavelet, channels_last=last),
        eager=lambda y: reference.idwt(y, levels, wavelet, 2.0, "packet", last),
        library=library,
        moved=2 * y.nbytes,
        tolerance=1e-6,
    )


DWT = Bench("dwt", SIZES, build, cpu=SMALL, quick=SMALL[:1])
IDWT = Bench("idwt", SIZES, build_back, cpu=SMALL, quick=SMALL[:1])
test_wavelet = pytest_entry(DWT, IDWT)

if __name__ == "__main__":
    main(DWT, IDWT)
