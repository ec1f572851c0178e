"""What is measured: a model that is read, or a preset's shape with random weights made on the device."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.packed import KINDS, Quantisation, quantise, unpacked
from kinetok.model.presets import DECODERS, decoder_preset
from kinetok.model.pretrained import ModelBundle, build, load_pretrained
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion.skeleton import CANONICAL_OFFSETS

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPES = (*FLOATS, *KINDS)
INT4_GROUP = 64


def check_dtype(name: str) -> None:
    if name not in DTYPES:
        raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")


def activations(dtype: str, device: torch.device) -> torch.dtype:
    """Of a model in ``dtype``: its own, and beside quantised weights bf16 on a GPU, fp32 on a CPU."""
    return FLOATS.get(dtype, torch.bfloat16 if device.type == "cuda" else torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Subject:
    """model: what kinetok runs; plain: the same values as plain weights, which peers run and which answers are checked
    by. load_s: seconds to read or make (and quantise) the weights."""

    name: str
    dtype: str
    model: ModelBundle
    plain: MotionDecoder
    load_s: float

    @property
    def device(self) -> torch.device:
        return self.plain.embed.weight.device

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.plain.parameters())


class _RandomText:
    """Features of the right shape for a model with random weights, whatever the text."""

    bank = None

    def __init__(self, length: int, dim: int) -> None:
        self.features = torch.randn(length, dim, generator=torch.Generator().manual_seed(1))

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        return [self.features for _ in texts]


def random_text(model: ModelBundle, length: int) -> _RandomText:
    """In place of an engine's text encoder."""
    return _RandomText(length, model.decoder.config.text_dim)


def random_decoder(config: DecoderConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> MotionDecoder:
    """A decoder with random weights made on the device, in its dtype: products keep the size of what goes in."""
    decoder = build(lambda: MotionDecoder(config), device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, value in decoder.named_parameters():
            if value.ndim == 1:
                value.fill_(0 if name.endswith("bias") else 1)
            else:
                value.normal_(0, 1 if name == "embed.weight" else value.shape[1] ** -0.5, generator=generator)
    return decoder


def random_model(config: DecoderConfig, device: torch.device, dtype: torch.dtype, *, causal: bool) -> ModelBundle:
    """A decoder of that shape behind a tokenizer of the released shape, causal or as released; all weights random."""
    torch.manual_seed(0)
    with device:
        tokenizer = MotionTokenizer(TokenizerConfig(causal=causal)).eval()
    return ModelBundle(
        tokenizer=tokenizer,
        decoder=random_decoder(config, device, dtype),
        mean=np.zeros(272),
        std=np.full(272, 0.01),
        offsets=np.asarray(CANONICAL_OFFSETS),
        text_encoder={"type": "none", "name": "random"},
        sampling={},
        provenance={},
        licence="none",
        bank=None,
        directory=Path("random"),
    )


def name_of_model(model: str) -> str:
    """For the results: a folder's name, since where it lies is nobody's business, or a hub id."""
    return Path(model).name if Path(model).is_dir() else model


def load(preset: str, model: str | None, device: torch.device, dtype: str, *, causal: bool = False) -> Subject:
    """A model directory (or "default"), else a preset with random weights; quantised where ``dtype`` says so."""
    check_dtype(dtype)
    began = time.perf_counter()
    floats = activations(dtype, device)
    if model is not None or preset == "default":
        bundle = load_pretrained(model, device, floats)
    else:
        if preset not in DECODERS:
            raise UserError(f"preset: expected default or one of {', '.join(DECODERS)}, got {preset!r}")
        bundle = random_model(decoder_preset(preset), device, floats, causal=causal)
    name = f"{preset}, causal tokenizer" if causal and preset != "default" else preset
    if model is not None:
        name = name_of_model(model)
    if dtype in FLOATS:
        if bundle.quantisation is not None:
            raise UserError(
                f"{name} is quantised: measure it with --dtype {bundle.quantisation.kind}, or its original with {dtype}"
            )
        return Subject(name=name, dtype=dtype, model=bundle, plain=bundle.decoder, load_s=time.perf_counter() - began)
    if bundle.quantisation is None:
        quantisation = Quantisation(kind=dtype, group=INT4_GROUP if dtype == "int4" else 0)
        bundle = replace(bundle, decoder=quantise(bundle.decoder, quantisation), quantisation=quantisation)
    elif bundle.quantisation.kind != dtype:
        raise UserError(f"{name} is quantised to {bundle.quantisation.kind}, got --dtype {dtype}")
    load_s = time.perf_counter() - began
    return Subject(name=name, dtype=dtype, model=bundle, plain=unpacked(bundle.decoder), load_s=load_s)


def own_copy(model: ModelBundle) -> ModelBundle:
    """With a decoder of its own where a backend lays weights out anew, which peers must neither gain nor lose by."""
    if model.decoder.embed.weight.device.type != "cpu":
        return model
    return replace(model, decoder=copy.deepcopy(model.decoder))
