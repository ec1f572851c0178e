"""Sizes of the two models: everything needed to build them, nothing else (MotionMillion, sections 1 to 3)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod
from typing import Any, Literal, Self

from kinetok.errors import UserError

FSQ_LEVELS: dict[int, tuple[int, ...]] = {
    256: (8, 6, 5),
    512: (8, 8, 8),
    1024: (8, 5, 5, 5),
    2048: (8, 8, 6, 5),
    4096: (7, 5, 5, 5, 5),
    16384: (8, 8, 8, 6, 5),
    65536: (8, 8, 8, 5, 5, 5),
}
FRAME_RATE = 30


class _Config:
    """Shared reading of configurations: unknown keys are errors, so a misspelt option is never ignored."""

    __slots__ = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"{cls.__name__}: unknown keys {unknown}, expected some of {sorted(known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"{cls.__name__}: {error}") from error


def _positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{type(config).__name__}: expected {name} to be a positive whole number, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig(_Config):
    """The motion tokenizer; the defaults are the released one (11.35 M parameters, 15 tokens a second).

    nb_code names the level set (``FSQ_LEVELS``); the real codebook size is ``codebook``.
    patcher "none" leaves the wavelet stage out; the others fold ``patch_size`` frames into channels. db2, db3 and db4 wrap
    around the ends of a clip and reach over the edges of a patch, so a causal network with them still looks ahead.
    """

    nb_code: int = 65536
    code_dim: int = 512
    width: int = 512
    down_t: int = 1
    stride_t: int = 2
    depth: int = 3
    dilation_growth_rate: int = 3
    activation: Literal["relu", "silu", "gelu"] = "relu"
    norm: Literal["LN", "GN", "BN", "none"] = "LN"
    kernel_size: int = 3
    patcher: Literal["none", "haar", "db2", "db3", "db4", "rearrange"] = "haar"
    patch_size: int = 1
    causal: bool = False
    input_dim: int = 272

    def __post_init__(self) -> None:
        _positive(self, "code_dim", "width", "stride_t", "depth", "dilation_growth_rate", "kernel_size")
        _positive(self, "patch_size", "input_dim")
        for name, allowed in (
            ("nb_code", tuple(FSQ_LEVELS)),
            ("down_t", tuple(range(7))),
            ("activation", ("relu", "silu", "gelu")),
            ("norm", ("LN", "GN", "BN", "none")),
            ("patcher", ("none", "haar", "db2", "db3", "db4", "rearrange")),
            ("causal", (True, False)),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"TokenizerConfig: expected {name} to be one of {allowed}, got {getattr(self, name)!r}")
        if self.patch_size & (self.patch_size - 1) or self.patch_size > 64:
            raise UserError(f"TokenizerConfig: expected patch_size to be 1, 2, 4, ... 64, got {self.patch_size}")
        if self.patcher == "none" and self.patch_size != 1:
            raise UserError(f"TokenizerConfig: patch_size {self.patch_size} needs a patcher, got patcher 'none'")
        if self.kernel_size % 2 == 0:
            raise UserError(f"TokenizerConfig: expected an odd kernel_size, got {self.kernel_size}")
        if self.down_t and self.stride_t != 2 and not (self.stride_t == 1 and self.causal):
            # The reference always upsamples by two. A stage without a stride (the wavelet shortens time in its place) keeps
            # its length in the causal network only, where the even kernel is padded on one side.
            raise UserError(f"TokenizerConfig: expected stride_t 2 (or 1 in a causal network), got {self.stride_t}")

    @property
    def levels(self) -> tuple[int, ...]:
        """FSQ levels per dimension."""
        return FSQ_LEVELS[self.nb_code]

    @property
    def codebook(self) -> int:
        """Number of distinct tokens."""
        return prod(self.levels)

    @property
    def frames_per_token(self) -> int:
        """Frames that one token decodes to."""
        return self.patch_size * self.stride_t**self.down_t

    @property
    def tokens_per_second(self) -> float:
        """Token rate at 30 frames a second."""
        return FRAME_RATE / self.frames_per_token

    @classmethod
    def from_released(cls, values: Mapping[str, Any]) -> Self:
        """Read the option names of the released training code; keys that do not concern the tokenizer are ignored.

        Understood beside this class's own names: ``vq_act``, ``vq_norm`` (None for none), ``use_patcher``,
        ``patch_method``, ``use_attn`` (refused when on: no released model has it).
        """
        if values.get("use_attn") not in (None, False):
            raise UserError("use_attn: the tokenizer's attention variant was never released and is not supported")
        own = {field.name for field in fields(cls)}
        result = {key: value for key, value in values.items() if key in own}
        if "vq_act" in values:
            result["activation"] = values["vq_act"]
        if "vq_norm" in values:
            result["norm"] = values["vq_norm"]
        if "norm" in result and result["norm"] in (None, "none", "None"):
            result["norm"] = "none"
        if "use_patcher" in values or "patch_method" in values:
            result["patcher"] = values.get("patch_method", "haar") if values.get("use_patcher", True) else "none"
        return cls(**result)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig(_Config):
    """The LLaMA-style decoder over ``codebook`` motion tokens, one end token and one pad token.

    rope "fp32" builds the rotary table exactly; "bf16" reproduces the table that a pure-bf16 run of the reference
    builds (section 3), to try on the 7B whose training may have used it.
    """

    n_layer: int
    n_head: int
    n_embd: int
    codebook: int = 64000
    text_dim: int = 2048
    block_size: int = 301
    tie_weights: bool = False
    rope: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        _positive(self, "n_layer", "n_head", "n_embd", "codebook", "text_dim", "block_size")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise UserError(
                f"DecoderConfig: expected n_embd to be n_head times an even head size, got {self.n_embd} and {self.n_head}"
            )
        if self.rope not in ("fp32", "bf16"):
            raise UserError(f"DecoderConfig: expected rope to be 'fp32' or 'bf16', got {self.rope!r}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        """Smallest multiple of 256 that is at least floor(8 n_embd / 3)."""
        return -(-(8 * self.n_embd // 3) // 256) * 256

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: motion tokens, end, pad."""
        return self.codebook + 2

    @property
    def head_rows(self) -> int:
        """Rows of the head: motion tokens and end; a tied head also has the pad row."""
        return self.codebook + (2 if self.tie_weights else 1)

    @property
    def end_id(self) -> int:
        return self.codebook

    @property
    def pad_id(self) -> int:
        return self.codebook + 1

    @classmethod
    def from_released(cls, values: Mapping[str, Any]) -> Self:
        """Read released option names (``clip_dim`` is the text width); keys that do not concern it are ignored."""
        own = {field.name for field in fields(cls)}
        result = {key: value for key, value in values.items() if key in own}
        if "clip_dim" in values:
            result["text_dim"] = values["clip_dim"]
        if "vocab" in values and "codebook" not in values:
            result["codebook"] = values["vocab"] - 2
        try:
            return cls(**result)
        except TypeError as error:
            raise UserError(f"DecoderConfig: {error}") from error
