"""Released checkpoints: the authors' ``.pth`` files and the safetensors layout (MotionMillion, sections 1 and 9)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels.kinematics import forward_kinematics
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.presets import DECODERS
from kinetok.model.pretrained import SHARD_BYTES, build, fill, own_tensors, read_stats, write_directory
from kinetok.model.released import (
    Row,
    check_keys,
    decoder_rows,
    infer_decoder,
    infer_tokenizer,
    released_shapes,
    to_ours,
    tokenizer_constants,
    tokenizer_rows,
)
from kinetok.model.restricted import read_tensors
from kinetok.model.tensor_files import map_file, parse_json
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion.features import joints_from_positions, rotations_from_features
from kinetok.motion.skeleton import JOINTS, PARENTS

STATS_BYTES = 1 << 20
_LIMITS = {"n_layer": 1000, "depth": 64, "kernel_size": 255, "codebook": 1 << 31}
_LIMIT = 1 << 20
ARTIFACT_FORMATS = ("hftrainer-motionmillion-v1", "motius-motionmillion-v1")


@dataclass(frozen=True, slots=True)
class Released:
    """One network of a released file: its configuration, and its tensors, checked, under the released names."""

    config: Any
    rows: list[Row]
    tensors: dict[str, Tensor]


def load_released_tokenizer(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **config: Any
) -> MotionTokenizer:
    """The tokenizer of a released file (top-level ``net``, or a plain state dictionary), in evaluation mode.

    config takes the released option names (``nb_code``, ``code_dim``, ``vq_act``, ``use_patcher``, ...; unused ones are
    accepted); what is not given is told from the shapes, and is as released where shapes do not show it. Raises
    ``UserError`` naming every key that is missing, unexpected or mis-shaped.
    """
    found = open_tokenizer(path, config)
    module = build(lambda: MotionTokenizer(found.config), device, dtype)
    fill(module, to_ours(found.rows, found.tensors))
    return module


def load_released_decoder(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **config: Any
) -> MotionDecoder:
    """The decoder of a released file (top-level ``trans``, or a plain state dictionary), in evaluation mode.

    config takes the released option names (``n_head``, ``clip_dim``, ``block_size``, ...; unused ones are accepted).
    The number of heads leaves no trace in a file: it is looked up for the released sizes and must be given for others.
    Raises ``UserError`` as ``load_released_tokenizer`` does.
    """
    found = open_decoder(path, config)
    module = build(lambda: MotionDecoder(found.config), device, dtype)
    fill(module, to_ours(found.rows, found.tensors))
    return module


def _state(path: str | Path, top: str) -> dict[str, Any]:
    """The entries under ``top`` with ``module.`` removed wherever it occurs, as the reference does."""
    values: Any = read_tensors(path)
    if top in values:
        values = values[top]
    elif not any(isinstance(value, Tensor) for value in values.values()):
        keys = ", ".join(str(key)[:40] for key in list(values)[:8])
        raise UserError(f"{path}: expected the weights under {top!r}, got the top-level keys {keys or 'none'}")
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected {top!r} to be a dictionary of tensors, got {type(values).__name__}")
    state: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("module.", "")
        if name in state:
            raise UserError(f"{path}: two keys are called {name[:100]!r} once 'module.' is removed")
        state[name] = value
    return state


def _usable(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.numel()}


def _sane(found: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    for name, value in found.items():
        limit = _LIMITS.get(name, _LIMIT)
        if type(value) is int and name != "nb_code" and not 0 <= value <= limit:
            raise UserError(f"{path}: its shapes say {name} {value}, expected at most {limit}: damaged or hostile")
    return dict(found)


def open_tokenizer(path: str | Path, config: Mapping[str, Any], codebook: int | None = None) -> Released:
    """Read and check a released tokenizer without building it; its tensors stay in the mapped file."""
    state = {name.removeprefix("vqvae."): value for name, value in _state(path, "net").items()}
    found = _sane(infer_tokenizer(_usable(state), codebook), path)
    if isinstance(found.get("nb_code"), tuple):
        options = found.pop("nb_code")
        if "nb_code" not in config:
            raise UserError(f"{path}: its shapes fit several codebooks: give nb_code, one of {list(options)}")
    chosen = TokenizerConfig.from_released({**found, **config})
    rows = tokenizer_rows(chosen)
    constants = tokenizer_constants(chosen)
    with torch.device("meta"):
        wanted = released_shapes(rows, own_tensors(MotionTokenizer(chosen)))
    check_keys(state, wanted, constants, str(path))
    return Released(chosen, rows, {name: state[name] for name in wanted})


def open_decoder(path: str | Path, config: Mapping[str, Any]) -> Released:
    """Read and check a released decoder without building it; its tensors stay in the mapped file."""
    state = _state(path, "trans")
    values = {**_sane(infer_decoder(_usable(state)), path), **config}
    for name, key in (("n_layer", "transformer.h.0.*"), ("n_embd", "transformer.wte.weight")):
        if not values.get(name):
            raise UserError(f"{path}: missing: {key}, which tells {name}; expected a released transformer")
    if "n_head" not in values:
        sizes = {(size["n_layer"], size["n_embd"]): size["n_head"] for size in DECODERS.values()}
        heads = sizes.get((values["n_layer"], values["n_embd"]))
        if heads is None:
            got = f"{values['n_layer']} layers of width {values['n_embd']}"
            raise UserError(f"{path}: {got} is not a released size, so the number of heads is not known: give n_head")
        values["n_head"] = heads
    chosen = DecoderConfig.from_released(values)
    rows = decoder_rows(chosen)
    with torch.device("meta"):
        wanted = released_shapes(rows, own_tensors(MotionDecoder(chosen)))
    tied = frozenset({"lm_head.weight", "transformer.wte.weight"} - set(wanted)) if chosen.tie_weights else frozenset()
    check_keys(state, wanted, tied, str(path))
    if tied and "lm_head.weight" in state and not _same(state["lm_head.weight"], state["transformer.wte.weight"]):
        raise UserError(f"{path}: the head is tied to the embedding, but the file holds two different tensors")
    return Released(chosen, rows, {name: state[name] for name in wanted})


def _same(first: Any, second: Any) -> bool:
    return isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second)


def read_stats_file(path: str | Path, name: str) -> np.ndarray:
    """``mean.npy`` or ``std.npy``: a checked float64 ``[272]``. Raises ``UserError``, naming the file."""
    if len(map_file(path)) > STATS_BYTES:
        raise UserError(f"{path}: expected a .npy file of 272 numbers, got more than {STATS_BYTES} bytes")
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        detail = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: expected a .npy file of 272 numbers, got something else ({detail})") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        raise UserError(f"{path}: expected a .npy file of 272 numbers")
    return read_stats(np.array(values), f"{path}: {name}")


@torch.no_grad()
def estimate_offsets(
    tokenizer: MotionTokenizer, mean: np.ndarray, std: np.ndarray, tokens: Tensor | None = None
) -> np.ndarray:
    """Rest offsets ``[22, 3]`` in metres of the body that a tokenizer decodes to (section 9).

    The average over decoded frames of G_parent^T (p_j - p_parent), with G from the rotations and p from the positions
    of the same frame; the pelvis is 0. tokens ``[B, n]`` should come from the model itself, the more varied the better;
    without them the mean motion and slow departures from it (at most one deviation) are sent through the tokenizer.
    """
    if tokens is None:
        generator = torch.Generator().manual_seed(0)
        ends = torch.randn(16, 2, tokenizer.config.input_dim, generator=generator) * 0.3
        ends[0] = 0
        ramp = torch.linspace(0, 1, 96)[None, :, None]
        tokens = tokenizer.encode((ends[:, :1] * (1 - ramp) + ends[:, 1:] * ramp).clamp(-1, 1))
    total = np.zeros((JOINTS, 3))
    frames = 0
    for row in tokens:
        x = tokenizer.decode(row[None])[0].double().numpy() * std + mean
        if not np.isfinite(x).all():
            raise UserError(
                "cannot estimate the skeleton: the tokenizer decodes to NaN or infinity; are its weights whole?"
            )
        joints = joints_from_positions(x)
        rotations, root = (torch.from_numpy(value) for value in rotations_from_features(x))
        _, turned = forward_kinematics(rotations, root, torch.zeros(JOINTS, 3, dtype=torch.float64), PARENTS)
        parents = list(PARENTS[1:])
        bones = joints[:, 1:] - joints[:, parents]
        total[1:] += np.einsum("tjba,tjb->ja", turned.numpy()[:, parents], bones)
        frames += len(x)
    return total / frames


def import_checkpoint(
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    decoder: str | Path | None = None,
    mean: str | Path | None = None,
    std: str | Path | None = None,
    artifact: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    text_encoder: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    licence: str = "unknown",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Turn released files into one model directory ``out``, which ``kinetok.load`` opens; returns it.

    Give the four files, or ``artifact``, a folder in the safetensors layout of section 9 (files given beside it win).
    config: released option names that shapes do not show (``n_head``, ``nb_code``, ``vq_act``, ...). Tensors keep their
    dtype and are streamed from the mapped file, so memory stays small whatever the size. The skeleton is estimated
    with ``estimate_offsets``. Raises ``UserError`` and leaves nothing behind when anything is wrong.
    """
    options = dict(config or {})
    files: dict[str, str | Path | None] = {"tokenizer": tokenizer, "decoder": decoder, "mean": mean, "std": std}
    if artifact is not None:
        given, options = _read_artifact(Path(artifact), options)
        files = {name: files[name] or given.get(name) for name in files}
    absent = [name for name, path in files.items() if path is None]
    if absent:
        raise UserError(f"importing needs a tokenizer, a decoder, a mean and a std; missing: {', '.join(absent)}")
    paths = {name: Path(path) for name, path in files.items() if path is not None}

    def say(text: str) -> None:
        if progress is not None:
            progress(text)

    statistics = {name: read_stats_file(paths[name], name) for name in ("mean", "std")}
    say(f"reading {paths['decoder']}")
    decoder_part = open_decoder(paths["decoder"], options)
    say(f"reading {paths['tokenizer']}")
    tokenizer_part = open_tokenizer(paths["tokenizer"], options, decoder_part.config.codebook)
    if tokenizer_part.config.codebook != decoder_part.config.codebook:
        got = f"{tokenizer_part.config.codebook} and {decoder_part.config.codebook}"
        raise UserError(f"expected the tokenizer and the decoder to have the same codebook, got {got} codes")
    say("estimating the skeleton from decoded motion")
    network = build(lambda: MotionTokenizer(tokenizer_part.config), "cpu", torch.float32)
    fill(network, to_ours(tokenizer_part.rows, tokenizer_part.tensors))
    offsets = estimate_offsets(network, statistics["mean"], statistics["std"])
    sources = {f"{name} file": path.name for name, path in paths.items()}
    return write_directory(
        out,
        tokenizer=(tokenizer_part.config, to_ours(tokenizer_part.rows, tokenizer_part.tensors)),
        decoder=(decoder_part.config, to_ours(decoder_part.rows, decoder_part.tensors)),
        mean=statistics["mean"],
        std=statistics["std"],
        skeleton_offsets=offsets,
        text_encoder=text_encoder or _text_encoder(decoder_part.config.text_dim),
        sampling={"temperature": 0.0} if sampling is None else sampling,  # greedy, as the reference
        provenance={"skeleton": "estimated from decoded motion", **sources, **(provenance or {})},
        licence=licence,
        shard_bytes=shard_bytes,
        progress=progress,
    )


def _text_encoder(width: int) -> dict[str, Any]:
    name = {2048: "google/flan-t5-xl", 4096: "google/flan-t5-xxl"}.get(width)
    if name is None:
        # Features of another width still come from a prompt bank; guessing an encoder would give nonsense motion.
        return {"type": "none", "name": "none", "dim": width}
    return {"type": "flan-t5", "name": name, "dim": width}


def _read_artifact(folder: Path, options: dict[str, Any]) -> tuple[dict[str, Path], dict[str, Any]]:
    """Files and options of a folder in the layout of section 9; ``options`` win over its ``mm_config.json``."""
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder with fsq.safetensors, ar.safetensors, mean.npy and std.npy")
    names = {
        "tokenizer": ("fsq.safetensors", "fsq.pt"),
        "decoder": ("ar.safetensors", "ar.pt"),
        "mean": ("mean.npy",),
        "std": ("std.npy",),
    }
    files = {}
    for name, choices in names.items():
        there = [folder / choice for choice in choices if (folder / choice).is_file()]
        if there:
            files[name] = there[0]
    described: dict[str, Any] = {}
    if (folder / "mm_config.json").is_file():
        content = parse_json(map_file(folder / "mm_config.json")[: 1 << 20], folder / "mm_config.json")
        kind = content.get("artifact_format", ARTIFACT_FORMATS[0])
        if kind not in ARTIFACT_FORMATS:
            raise UserError(
                f"{folder}: expected artifact_format to be one of {list(ARTIFACT_FORMATS)}, got {str(kind)[:80]!r}"
            )
        sections = content.get("config", {})
        for name in ("vqvae", "ar"):
            section = sections.get(name, {}) if isinstance(sections, dict) else None
            if not isinstance(section, dict):
                raise UserError(f"{folder / 'mm_config.json'}: expected config.{name} to be an object")
            described.update(section)
    return files, {**described, **options}
