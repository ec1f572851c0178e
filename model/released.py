"""The released key layout: tables between its names and ours, and the sizes that can be told from shapes.

(MotionMillion, section 1.) The list index of the reference counts every layer, ReLUs included, so the tables depend on
the configuration. A convolution is stored there as ``[out, in, taps]`` and here as ``[out, taps, in]``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.model.config import FSQ_LEVELS, DecoderConfig, TokenizerConfig
from kinetok.model.tensor_files import Pieces

FEATURES = 272
NAMED = 20
"""How many keys of each kind an error names before it counts."""


@dataclass(frozen=True, slots=True)
class Row:
    """One of our tensors: the released ones laid along its first axis, each with its taps moved before its inputs."""

    ours: str
    released: tuple[str, ...]
    convolution: bool = False


def _both(ours: str, released: str, *, convolution: bool = False) -> list[Row]:
    return [Row(f"{ours}.weight", (f"{released}.weight",), convolution), Row(f"{ours}.bias", (f"{released}.bias",))]


def tokenizer_rows(config: TokenizerConfig) -> list[Row]:
    """The tokenizer's table; released names without their ``vqvae.``."""
    plain = ".conv" if config.causal else ""
    shift = 0 if config.patcher == "none" else 1
    down = config.down_t
    rows = _both("encoder.first", f"encoder.model.{shift}{plain}", convolution=True)
    for s in range(down):
        there = f"encoder.model.{shift + 2 + s}"
        rows += _both(f"encoder.stages.{s}.conv", f"{there}.0{plain}", convolution=True)
        rows += _residual_rows(config, f"encoder.stages.{s}.blocks", f"{there}.1.model")
    rows += _both("encoder.last", f"encoder.model.{shift + 2 + down}{plain}", convolution=True)
    rows += _both("decoder.first", f"decoder.model.0{plain}", convolution=True)
    for s in range(down):
        there = f"decoder.model.{2 + s}"
        rows += _residual_rows(config, f"decoder.stages.{s}.blocks", f"{there}.0.model")
        rows += _both(f"decoder.stages.{s}.conv", f"{there}.2{plain}", convolution=True)
    rows += _both("decoder.middle", f"decoder.model.{2 + down}{plain}", convolution=True)
    rows += _both("decoder.last", f"decoder.model.{4 + down}{plain}", convolution=True)
    if config.code_dim != len(config.levels):
        rows += _both("project_in", "quantizer.project_in") + _both("project_out", "quantizer.project_out")
    return rows


def _residual_rows(config: TokenizerConfig, ours: str, released: str) -> list[Row]:
    rows = []
    for i in range(config.depth):
        for name in () if config.norm == "none" else ("norm1", "norm2"):
            rows += _both(f"{ours}.{i}.{name}", f"{released}.{i}.{name}")
            if config.norm == "BN":
                state = ("running_mean", "running_var", "num_batches_tracked")
                rows += [Row(f"{ours}.{i}.{name}.{s}", (f"{released}.{i}.{name}.{s}",)) for s in state]
        for name in ("conv1", "conv2"):
            rows += _both(f"{ours}.{i}.{name}", f"{released}.{i}.{name}", convolution=True)
    return rows


def tokenizer_constants(config: TokenizerConfig) -> frozenset[str]:
    """Released buffers that hold no weights: the wavelet filter, which is built here."""
    if config.patcher == "none":
        return frozenset()
    places = ("encoder.model.0", f"decoder.model.{5 + config.down_t}")
    return frozenset(f"{place}.{name}" for place in places for name in ("wavelets", "_arange"))


def infer_tokenizer(keys: Mapping[str, Tensor], codebook: int | None = None) -> dict[str, Any]:
    """The ``TokenizerConfig`` fields that released tensors (without ``vqvae.``) show; what they do not show is absent.

    The dilation growth and the activation leave no trace in a file; two level sets of equal length are told apart by
    the decoder's ``codebook`` only.
    """
    keys = {name: value for name, value in keys.items() if value.ndim}
    found: dict[str, Any] = {}
    patched = "encoder.model.0.wavelets" in keys
    first = f"encoder.model.{int(patched)}"
    found["causal"] = f"{first}.conv.weight" in keys
    plain = ".conv" if found["causal"] else ""
    weight = keys.get(f"{first}{plain}.weight")
    if weight is None or weight.ndim != 3:
        return {}
    found["width"], inputs, found["kernel_size"] = weight.shape
    found["patcher"] = "none"
    if patched:
        wavelets = keys["encoder.model.0.wavelets"]
        found["patcher"] = "rearrange" if wavelets.numel() and float(wavelets.flatten()[0]) == 1 else "haar"
        if inputs and inputs % FEATURES == 0:
            found["patch_size"] = inputs // FEATURES
    stage = int(patched) + 2
    down = 0
    while f"encoder.model.{stage + down}.0{plain}.weight" in keys:
        down += 1
    found["down_t"] = down
    last = keys.get(f"encoder.model.{stage + down}{plain}.weight")
    if last is not None:
        found["code_dim"] = last.shape[0]
    if down:
        found["stride_t"] = keys[f"encoder.model.{stage}.0{plain}.weight"].shape[-1] // 2
        blocks = f"encoder.model.{stage}.1.model"
        depth = 0
        while f"{blocks}.{depth}.conv1.weight" in keys:
            depth += 1
        found["depth"] = max(depth, 1)
        if f"{blocks}.0.norm1.weight" not in keys:
            found["norm"] = "none"
        elif f"{blocks}.0.norm1.running_mean" in keys:
            found["norm"] = "BN"
    project = keys.get("quantizer.project_in.weight")
    count = project.shape[0] if project is not None else found.get("code_dim")
    codes = [TokenizerConfig(nb_code=code) for code, levels in FSQ_LEVELS.items() if len(levels) == count]
    codes = [config for config in codes if codebook in (None, config.codebook)]
    if len(codes) == 1:
        found["nb_code"] = codes[0].nb_code
    elif len(codes) > 1:
        found["nb_code"] = tuple(config.nb_code for config in codes)
    return found


def decoder_rows(config: DecoderConfig) -> list[Row]:
    """The decoder's table; gate and up are one matrix here, and a tied head is the embedding."""
    rows = [Row("embed.weight", ("transformer.wte.weight",)), *_both("text_proj", "llama_proj")]
    for layer in range(config.n_layer):
        ours, there = f"blocks.{layer}", f"transformer.h.{layer}"
        rows += [
            Row(f"{ours}.attn_norm.scale", (f"{there}.rms_1.scale",)),
            Row(f"{ours}.mlp_norm.scale", (f"{there}.rms_2.scale",)),
            Row(f"{ours}.qkv.weight", (f"{there}.attn.c_attn.weight",)),
            Row(f"{ours}.attn_out.weight", (f"{there}.attn.c_proj.weight",)),
            Row(f"{ours}.gate_up.weight", (f"{there}.mlp.c_fc1.weight", f"{there}.mlp.c_fc2.weight")),
            Row(f"{ours}.down.weight", (f"{there}.mlp.c_proj.weight",)),
        ]
    rows.append(Row("norm.scale", ("transformer.ln_f.scale",)))
    return rows if config.tie_weights else [*rows, Row("head.weight", ("lm_head.weight",))]


def infer_decoder(keys: Mapping[str, Tensor]) -> dict[str, Any]:
    """The ``DecoderConfig`` fields that released tensors show; the number of heads is not among them."""
    found: dict[str, Any] = {}
    embedding, head, text = (
        keys.get(name) for name in ("transformer.wte.weight", "lm_head.weight", "llama_proj.weight")
    )
    if embedding is not None and embedding.ndim == 2:
        found["codebook"], found["n_embd"] = embedding.shape[0] - 2, embedding.shape[1]
        if head is not None and head.ndim:
            found["tie_weights"] = head.shape[0] == embedding.shape[0]
    if text is not None and text.ndim == 2:
        found["text_dim"] = text.shape[1]
    layers = {name.split(".")[2] for name in keys if name.startswith("transformer.h.")}
    found["n_layer"] = sum(layer.isdecimal() for layer in layers)
    return found


def released_shapes(rows: Sequence[Row], ours: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape that each released tensor must have for a module whose state (on any device) is ``ours``."""
    shapes = {}
    for row in rows:
        shape = tuple(ours[row.ours].shape)
        if row.convolution:
            shape = (shape[0], shape[2], shape[1])
        for name in row.released:
            shapes[name] = (shape[0] // len(row.released), *shape[1:]) if shape else ()
    return shapes


def check_keys(
    found: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]], ignored: frozenset[str], source: str
) -> None:
    """Raise one ``UserError`` that names every missing, unexpected and mis-shaped key."""
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted and name not in ignored]
    shaped = []
    for name in wanted.keys() & found.keys():
        value = found[name]
        if not isinstance(value, Tensor):
            shaped.append(f"{name} (expected a tensor, got {type(value).__name__})")
        elif tuple(value.shape) != wanted[name]:
            shaped.append(f"{name} (expected {list(wanted[name])}, got {list(value.shape)})")
        elif not value.is_floating_point() and not name.endswith(("num_batches_tracked", "packed_words")):
            shaped.append(f"{name} (expected floating point, got {value.dtype})")
    problems = [
        f"{title}: {_listed(names)}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape or type", sorted(shaped)))
        if names
    ]
    if problems:
        raise UserError(f"{source}: the tensors do not fit the configuration; {'; '.join(problems)}")


def _listed(names: Sequence[str]) -> str:
    text = ", ".join("".join(c if c.isprintable() else "?" for c in name[:120]) for name in names[:NAMED])
    return text + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def to_ours(rows: Sequence[Row], released: Mapping[str, Tensor]) -> Iterator[Pieces]:
    """Our tensors as views of the released ones, nothing copied."""
    for row in rows:
        parts = tuple(released[name] for name in row.released)
        yield Pieces(row.ours, tuple(part.transpose(1, 2) for part in parts) if row.convolution else parts)


def to_released(rows: Sequence[Row], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the released names and in the released layout, as views."""
    result = {}
    for row in rows:
        value = ours[row.ours]
        parts = torch.chunk(value, len(row.released)) if len(row.released) > 1 else (value,)
        for name, part in zip(row.released, parts, strict=True):
            result[name] = part.transpose(1, 2) if row.convolution else part
    return result
