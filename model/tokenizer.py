"""The motion tokenizer: wavelet, convolutional encoder, FSQ, convolutional decoder (MotionMillion, section 2).

Everything is channels-last, ``[B, T, C]``: a convolution is then one matrix product over gathered taps and a layer norm
needs no transpose.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kinetok.errors import UserError
from kinetok.kernels.detokenizer import conv, conv_idwt, fold_projection, fsq_conv
from kinetok.kernels.fsq import fsq_encode
from kinetok.kernels.wavelet import Mode, dwt, idwt
from kinetok.model.config import TokenizerConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}
UP_KERNEL = 3  # the decoder's upsampling convolution, and residual ones of the causal network, ignore kernel_size


class Conv(nn.Module):
    """1-D convolution of ``[B, T, in]``; the weight is stored as ``[out, taps, in]``, the layout of its matrix product.

    causal pads on the left only, by (taps - 1) * dilation + 1 - stride; otherwise pads ``padding`` on both sides.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        taps: int,
        *,
        padding: int = 0,
        dilation: int = 1,
        stride: int = 1,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.dilation, self.stride = dilation, stride
        self.padding = ((taps - 1) * dilation + 1 - stride, 0) if causal else (padding, padding)
        self.weight = nn.Parameter(torch.empty(outputs, taps, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        bound = (taps * inputs) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, in]`` to ``[B, T', out]``."""
        return conv(x, self.weight, self.bias, self.padding, self.dilation, self.stride)


class _GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class _BatchNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).view_as(x)


def _norm(kind: str, width: int) -> nn.Module:
    if kind == "LN":
        return nn.LayerNorm(width, eps=1e-5)
    if kind == "GN":
        return _GroupNorm(32, width, eps=1e-6)
    if kind == "BN":
        return _BatchNorm(width, eps=1e-6)
    return nn.Identity()


class Residual(nn.Module):
    """x + conv2(act(norm2(conv1(act(norm1(x)))))); conv1 is dilated, conv2 is pointwise."""

    def __init__(self, config: TokenizerConfig, dilation: int) -> None:
        super().__init__()
        taps = UP_KERNEL if config.causal else config.kernel_size
        width = config.width
        self.act = ACTIVATIONS[config.activation]
        self.norm1, self.norm2 = _norm(config.norm, width), _norm(config.norm, width)
        self.conv1 = Conv(
            width, width, taps, padding=dilation * (taps - 1) // 2, dilation=dilation, causal=config.causal
        )
        self.conv2 = Conv(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act(self.norm2(self.conv1(self.act(self.norm1(x))))))


def _residuals(config: TokenizerConfig) -> nn.Sequential:
    """The widest dilation comes first, in the encoder as well as in the decoder."""
    growth, depth = config.dilation_growth_rate, config.depth
    return nn.Sequential(*(Residual(config, growth**i) for i in reversed(range(depth))))


def _plain(config: TokenizerConfig, inputs: int, outputs: int, taps: int) -> Conv:
    half = (taps - 1) // 2
    # The causal network of the reference takes the padding it is given for a dilation.
    return Conv(inputs, outputs, taps, padding=half, dilation=half if config.causal else 1, causal=config.causal)


class _Down(nn.Module):
    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        stride = config.stride_t
        self.conv = Conv(
            config.width, config.width, 2 * stride, padding=stride // 2, stride=stride, causal=config.causal
        )
        self.blocks = _residuals(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.conv(x))


class _Up(nn.Module):
    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.blocks = _residuals(config)
        self.stride = config.stride_t
        self.conv = _plain(config, config.width, config.width, UP_KERNEL)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.blocks(x).repeat_interleave(self.stride, dim=1))


class Encoder(nn.Module):
    """``[B, T, input_dim * patch_size]`` (patched) to ``[B, n, code_dim]``."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.first = _plain(config, config.input_dim * config.patch_size, config.width, config.kernel_size)
        self.stages = nn.ModuleList(_Down(config) for _ in range(config.down_t))
        self.last = _plain(config, config.width, config.code_dim, config.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        for stage in self.stages:
            x = stage(x)
        return self.last(x)


class Decoder(nn.Module):
    """``[B, n, code_dim]`` to ``[B, T, input_dim * patch_size]``."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.first = _plain(config, config.code_dim, config.width, config.kernel_size)
        self.stages = nn.ModuleList(_Up(config) for _ in range(config.down_t))
        self.middle = _plain(config, config.width, config.width, config.kernel_size)
        self.last = _plain(config, config.width, config.input_dim * config.patch_size, config.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        for stage in self.stages:
            x = stage(x)
        return self.last(F.relu(self.middle(x)))


class MotionTokenizer(nn.Module):
    """Normalised frames to tokens and back, in fp32.

    The stages are public so that training can act between them: ``latents`` -> ``project_in`` -> FSQ ->
    ``project_out`` -> ``frames``.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        dims = len(config.levels)
        same = config.code_dim == dims
        self.project_in: nn.Module = nn.Identity() if same else nn.Linear(config.code_dim, dims)
        self.project_out: nn.Module = nn.Identity() if same else nn.Linear(dims, config.code_dim)

    @property
    def wavelet_levels(self) -> int:
        return self.config.patch_size.bit_length() - 1

    def patch(self, frames: Tensor) -> Tensor:
        """Frames ``[B, T, d]`` to ``[B, ceil(T / p), d * p]``."""
        if self.config.patcher == "rearrange":
            p = self.config.patch_size
            if frames.shape[1] % p:
                raise UserError(f"expected a multiple of {p} frames for the rearranging patcher, got {frames.shape[1]}")
            return frames.unflatten(1, (-1, p)).transpose(2, 3).flatten(2)  # channel = c * p + phase
        if self.config.patcher == "none":
            return frames
        mode: Mode = "reflect" if self.config.patcher == "haar" else "periodic"
        return dwt(frames, self.wavelet_levels, self.config.patcher, mode, channels_last=True)

    def unpatch(self, patches: Tensor) -> Tensor:
        """``[B, n, d * p]`` to frames ``[B, n * p, d]``."""
        if self.config.patcher == "rearrange":
            return patches.unflatten(2, (-1, self.config.patch_size)).transpose(2, 3).flatten(1, 2)
        if self.config.patcher == "none":
            return patches
        return idwt(patches, self.wavelet_levels, self.config.patcher, channels_last=True)

    def latents(self, frames: Tensor) -> Tensor:
        """Normalised frames ``[B, T, 272]`` to latents ``[B, n, code_dim]`` before the projection."""
        return self.encoder(self.patch(frames))

    def frames(self, embedded: Tensor) -> Tensor:
        """Projected codes ``[B, n, code_dim]`` to normalised frames ``[B, n * frames_per_token, 272]``."""
        return self.unpatch(self.decoder(embedded))

    def encode(self, frames: Tensor) -> Tensor:
        """Normalised frames ``[B, T, 272]`` to int32 tokens ``[B, n]``, n = T / frames_per_token rounded down.

        An odd length before a wavelet level is extended by reflection instead (section 2). Raises ``UserError`` for a
        clip that is too short for one token or of another width.
        """
        config = self.config
        if frames.ndim != 3 or frames.shape[2] != config.input_dim:
            raise UserError(f"expected frames of shape [B, T, {config.input_dim}], got {list(frames.shape)}")
        if -(-frames.shape[1] // config.patch_size) < config.stride_t**config.down_t:
            raise UserError(f"expected at least {config.frames_per_token} frames (one token), got {frames.shape[1]}")
        project = self.project_in
        weight, bias = (project.weight, project.bias) if isinstance(project, nn.Linear) else (None, None)
        return fsq_encode(self.latents(frames), weight, bias, config.levels)

    def decode(self, indices: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Tokens ``[B, n]`` to frames ``[B, n * frames_per_token, 272]``, each row a clip of its own.

        The frames are normalised, or times scale plus shift ``[272]`` (the data's std and mean). On a GPU the first two
        layers are one kernel, and so are the last convolution, the wavelet and the scale; gradients do not pass there.
        """
        config = self.config
        if indices.ndim != 2 or indices.shape[1] == 0 or indices.is_floating_point():
            raise UserError(
                f"expected integer tokens of shape [B, n], n > 0, got {indices.dtype} {list(indices.shape)}"
            )
        if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < config.codebook):
            raise UserError(
                f"expected tokens from 0 to {config.codebook - 1}, got {int(indices.min())} to {int(indices.max())}"
            )
        first, last, project = self.decoder.first, self.decoder.last, self.project_out
        weight, bias = (project.weight, project.bias) if isinstance(project, nn.Linear) else (None, None)
        table = fold_projection(first.weight, weight, bias)
        x = fsq_conv(indices, table, first.bias, config.levels, first.padding, first.dilation)
        for stage in self.decoder.stages:
            x = stage(x)
        x = self.decoder.middle(x)
        end = partial(conv_idwt, x, last.weight, last.bias, padding=last.padding, dilation=last.dilation)
        if config.patcher in ("haar", "none"):
            return end(levels=self.wavelet_levels, scale=scale, shift=shift)
        frames = self.unpatch(end(levels=0))
        return frames if scale is None or shift is None else torch.addcmul(shift, frames, scale)
