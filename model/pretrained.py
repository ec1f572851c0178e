"""Model directories: ``kinetok.json``, sharded safetensors, statistics and skeleton; nothing in them is code."""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from kinetok.errors import UserError, missing_package
from kinetok.files import check_directory, whole_directory, whole_file
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.packed import Quantisation, hollow
from kinetok.model.released import check_keys
from kinetok.model.tensor_files import Pieces, parse_json, read_safetensors, shard, write_safetensors
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion.features import FEATURES
from kinetok.motion.skeleton import JOINT_NAMES, JOINTS, PARENTS

MANIFEST = "kinetok.json"
STATS = "stats.safetensors"
KIND = "a kinetok model"  # what an older folder must be to be replaced
BANK = "bank.safetensors"
VERSION = 1
SHARD_BYTES = 2_000_000_000
DEFAULT_MODEL = Path(__file__).parent / "default"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHARD = re.compile(r"(tokenizer|decoder)-\d{5}-of-\d{5}\.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelBundle:
    """Everything that a model directory holds, ready to run.

    mean, std ``[272]`` and offsets ``[22, 3]`` (metres) are float64 arrays; both networks are in evaluation mode.
    bank is the path of the shipped prompt bank, None where there is none.
    """

    tokenizer: MotionTokenizer
    decoder: MotionDecoder
    mean: np.ndarray
    std: np.ndarray
    offsets: np.ndarray
    text_encoder: dict[str, Any]
    sampling: dict[str, Any]
    provenance: dict[str, Any]
    licence: str
    bank: Path | None
    directory: Path
    quantisation: Quantisation | None = None


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module with shared tensors once, under their first name."""
    seen: set[int] = set()
    result = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            result[name] = value
    return result


def build(make: Callable[[], Module], device: torch.device | str, dtype: torch.dtype) -> Module:
    """Build a module with uninitialised weights on a device: no random numbers, and no second copy in another dtype."""
    with torch.device("meta"):
        module = make()
    made: dict[int, Any] = {}
    for owner in module.modules():
        for name, value in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if id(value) not in made:
                made[id(value)] = nn.Parameter(torch.empty_like(value, device=device, dtype=dtype))
            setattr(owner, name, made[id(value)])
        for name, buffer in list(owner.named_buffers(recurse=False)):
            # Only the running statistics of a batch norm are buffers, and they are loaded like weights.
            setattr(owner, name, torch.empty_like(buffer, device=device))
    return module.eval()


@torch.no_grad()
def fill(module: nn.Module, tensors: Iterable[Pieces]) -> None:
    """Copy checked tensors into a module, converting to its dtype and device one part at a time."""
    state = own_tensors(module)
    for tensor in tensors:
        target, first = state[tensor.name], 0
        for part in tensor.parts:
            if part.ndim == 0:
                target.copy_(part)
            else:
                target[first : first + part.shape[0]].copy_(part)
                first += part.shape[0]


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The narrowest floating type that holds all of the given ones; float32 for none."""
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return reduce(torch.promote_types, floating) if floating else torch.float32


def read_stats(values: Any, name: str) -> np.ndarray:
    """A checked mean or std: ``[272]`` finite float64, a std positive throughout. ``UserError`` otherwise."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: expected {FEATURES} numbers, got {type(values).__name__}") from error
    if array.shape != (FEATURES,):
        raise UserError(f"{name}: expected {FEATURES} numbers, one per feature, got the shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise UserError(f"{name}: expected finite numbers, got {int((~np.isfinite(array)).sum())} NaN or infinite ones")
    if name.endswith("std") and not (array > 0).all():
        raise UserError(f"{name}: expected positive numbers, got {int((array <= 0).sum())} that are zero or negative")
    return array


def _read_offsets(values: Any) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"skeleton offsets: expected {JOINTS} x 3 numbers in metres") from error
    if array.shape != (JOINTS, 3) or not np.isfinite(array).all():
        raise UserError(f"skeleton offsets: expected {JOINTS} x 3 finite numbers in metres, got {list(array.shape)}")
    return array


def _replaceable(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    ours = {MANIFEST, STATS, BANK}
    return MANIFEST in names and all(name in ours or _SHARD.fullmatch(name) for name in names)


def check_target(out: str | Path) -> None:
    """``UserError`` where no model directory can be written for what is there, said before long work for one."""
    check_directory(Path(out), _replaceable, KIND)


def write_directory(
    out: str | Path,
    *,
    tokenizer: tuple[TokenizerConfig, Iterable[Pieces]],
    decoder: tuple[DecoderConfig, Iterable[Pieces]],
    mean: Any,
    std: Any,
    skeleton_offsets: Any,
    text_encoder: Mapping[str, Any],
    sampling: Mapping[str, Any],
    provenance: Mapping[str, Any],
    licence: str,
    bank: str | Path | None = None,
    quantisation: Quantisation | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write a model directory, whole or not at all. Tensors are streamed: memory stays at one chunk."""
    if bank is not None and not Path(bank).is_file():
        raise UserError(f"expected bank to be the path of a prompt bank, but there is no file {bank}")
    stats = {name: read_stats(values, name) for name, values in (("mean", mean), ("std", std))}
    offsets = _read_offsets(skeleton_offsets)
    parts = {
        name: shard(tensors, shard_bytes) for name, (_, tensors) in (("tokenizer", tokenizer), ("decoder", decoder))
    }
    files = {
        name: [f"{name}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        for name, shards in parts.items()
    }
    manifest = {
        "format": "kinetok-model",
        "version": VERSION,
        "tokenizer": asdict(tokenizer[0]),
        "decoder": asdict(decoder[0]),
        "text_encoder": dict(text_encoder),
        "skeleton": {"names": JOINT_NAMES, "parents": PARENTS, "offsets": offsets.tolist()},
        "sampling": dict(sampling),
        "provenance": dict(provenance),
        "licence": licence,
        "files": {**files, **({"bank": [BANK]} if bank is not None else {})},
    }
    if quantisation is not None:
        manifest["quantisation"] = quantisation.to_json()
    try:
        text = json.dumps(manifest, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"expected text_encoder, sampling and provenance to be plain JSON values: {error}") from error
    with whole_directory(Path(out), _replaceable, KIND) as folder:
        for name, shards in parts.items():
            for file, tensors in zip(files[name], shards, strict=True):
                if progress is not None:
                    progress(f"writing {file}")
                write_safetensors(folder / file, tensors)
        write_safetensors(folder / STATS, [Pieces(name, (torch.from_numpy(a),)) for name, a in stats.items()])
        if bank is not None:
            with whole_file(folder / BANK) as temporary:
                shutil.copyfile(bank, temporary)
        with whole_file(folder / MANIFEST) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    return Path(out)


def save_pretrained(
    out: str | Path,
    tokenizer: MotionTokenizer,
    decoder: MotionDecoder,
    mean: Any,
    std: Any,
    skeleton_offsets: Any,
    text_encoder: Mapping[str, Any],
    sampling: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    licence: str = "unknown",
    bank: str | Path | None = None,
    quantisation: Quantisation | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model directory that ``load_pretrained`` reads back bit by bit, in the dtypes of the modules.

    mean, std ``[272]``, skeleton_offsets ``[22, 3]`` in metres, bank the path of a prompt bank to carry along;
    quantisation says how the decoder was packed (``kinetok.model.packed``), if it was. An existing model directory is
    replaced. Raises ``UserError`` for bad statistics, an unwritable folder or a full disk.
    """

    def pieces(module: nn.Module) -> Iterator[Pieces]:
        return (Pieces(name, (value,)) for name, value in own_tensors(module).items())

    return write_directory(
        out,
        tokenizer=(tokenizer.config, pieces(tokenizer)),
        decoder=(decoder.config, pieces(decoder)),
        mean=mean,
        std=std,
        skeleton_offsets=skeleton_offsets,
        text_encoder=text_encoder,
        sampling=sampling or {},
        provenance=provenance or {},
        licence=licence,
        bank=bank,
        quantisation=quantisation,
        shard_bytes=shard_bytes,
    )


def find_model(path_or_id: str | Path | None) -> Path:
    """The folder of a model: a path, a hub id ``owner/name`` (fetched when it is not in the cache), None: the default.

    Raises ``UserError`` when there is no such model or the hub cannot be reached.
    """
    if path_or_id is None:
        if not (DEFAULT_MODEL / MANIFEST).is_file():
            raise UserError("this copy of kinetok carries no default model: name a model directory")
        return DEFAULT_MODEL
    path = Path(path_or_id)
    if path.is_dir():
        return path
    if path.exists() or not _HUB_ID.fullmatch(str(path_or_id)):
        raise UserError(f"unknown model {str(path_or_id)!r}: expected a model directory or a hub id such as owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise missing_package("huggingface_hub", "text", f"fetching the model {path_or_id}") from error
    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=[MANIFEST, "*.safetensors"]))
    except (OSError, ValueError) as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(
            f"unknown model {path_or_id!r}: no such folder, and the hub did not give it: {detail}"
        ) from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = parse_json((folder / MANIFEST).read_bytes(), folder / MANIFEST)
    except OSError as error:
        raise UserError(f"{folder} is no kinetok model: cannot read {MANIFEST} ({error.strerror or error})") from error
    if manifest.get("format") != "kinetok-model" or manifest.get("version") != VERSION:
        got = f"{manifest.get('format')!r} version {manifest.get('version')!r}"
        raise UserError(f"{folder / MANIFEST}: expected the format 'kinetok-model' version {VERSION}, got {got[:80]}")
    return manifest


def read_text_encoder(path_or_id: str | Path | None = None) -> dict[str, Any]:
    """The text encoder that a model names, without loading the model."""
    folder = find_model(path_or_id)
    return _section(_read_manifest(folder), "text_encoder", folder)


def weight_bytes(
    path_or_id: str | Path | None = None, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> int:
    """Bytes of the weights that ``load_pretrained`` with the same arguments makes, without making them."""
    folder = find_model(path_or_id)
    manifest, place = _read_manifest(folder), choose_device(device)
    total = 0
    for name, config in (("tokenizer", TokenizerConfig), ("decoder", DecoderConfig)):
        sizes = config.from_dict(_section(manifest, name, folder))
        stored = {value.dtype: 0 for value in _read_shards(folder, manifest, name).values()}
        kind = _decoder_dtype(dtype, place, widest(stored))
        if name == "tokenizer" and dtype != "stored":
            kind = torch.float32
        with torch.device("meta"):
            module = MotionTokenizer(sizes) if isinstance(sizes, TokenizerConfig) else _decoder(sizes, manifest)
        floats = sum(value.numel() for value in module.parameters())
        total += kind.itemsize * floats + sum(value.nbytes for value in module.buffers())
    return total


def load_pretrained(
    path_or_id: str | Path | None = None, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> ModelBundle:
    """Load a model directory, a hub id, or the default model (None).

    device "auto" is CUDA where there is one. dtype concerns the decoder: "auto" is as stored on CUDA and float32 on the
    CPU, "stored" is as stored everywhere; a name or a torch dtype sets it. The tokenizer runs in float32 (section 2)
    unless dtype is "stored". Raises ``UserError`` for anything that is not an intact model.
    """
    folder = find_model(path_or_id)
    manifest = _read_manifest(folder)
    place = choose_device(device)
    tensors = {name: _read_shards(folder, manifest, name) for name in ("tokenizer", "decoder")}
    stored = {name: widest(value.dtype for value in values.values()) for name, values in tensors.items()}
    dtypes = {"tokenizer": torch.float32, "decoder": _decoder_dtype(dtype, place, stored["decoder"])}
    if dtype == "stored":
        dtypes["tokenizer"] = stored["tokenizer"]
    tokenizer_config = TokenizerConfig.from_dict(_section(manifest, "tokenizer", folder))
    decoder_config = DecoderConfig.from_dict(_section(manifest, "decoder", folder))
    stats = read_safetensors(folder / STATS)
    if set(stats) != {"mean", "std"}:
        raise UserError(f"{folder / STATS}: expected the tensors mean and std, got {sorted(stats)[:5]}")
    skeleton = _section(manifest, "skeleton", folder)
    if skeleton.get("names") != list(JOINT_NAMES) or skeleton.get("parents") != list(PARENTS):
        raise UserError(f"{folder / MANIFEST}: expected the skeleton of {JOINTS} joints in this package's order")
    return ModelBundle(
        tokenizer=_load(
            lambda: MotionTokenizer(tokenizer_config), tensors["tokenizer"], place, dtypes["tokenizer"], folder
        ),
        decoder=_load(lambda: _decoder(decoder_config, manifest), tensors["decoder"], place, dtypes["decoder"], folder),
        mean=read_stats(stats["mean"].double().numpy(), "mean").copy(),
        std=read_stats(stats["std"].double().numpy(), "std").copy(),
        offsets=_read_offsets(skeleton.get("offsets")),
        text_encoder=_section(manifest, "text_encoder", folder),
        sampling=_section(manifest, "sampling", folder),
        provenance=_section(manifest, "provenance", folder),
        licence=str(manifest.get("licence", "unknown")),
        bank=folder / BANK if (folder / BANK).is_file() else None,
        directory=folder,
        quantisation=_quantisation(manifest),
    )


def _quantisation(manifest: Mapping[str, Any]) -> Quantisation | None:
    found = manifest.get("quantisation")
    if found is None:
        return None
    if not isinstance(found, dict):
        raise UserError(f"expected quantisation to be an object, got {type(found).__name__}")
    return Quantisation.from_dict(found)


def _decoder(config: DecoderConfig, manifest: Mapping[str, Any]) -> MotionDecoder:
    decoder, quantisation = MotionDecoder(config), _quantisation(manifest)
    return decoder if quantisation is None else hollow(decoder, quantisation)


def _section(manifest: Mapping[str, Any], name: str, folder: Path) -> dict[str, Any]:
    value = manifest.get(name)
    if not isinstance(value, dict):
        raise UserError(f"{folder / MANIFEST}: expected {name!r} to be an object, got {type(value).__name__}")
    return value


def choose_device(device: str | torch.device) -> torch.device:
    """ "auto" is CUDA where there is one. ``UserError`` for a device that torch does not see."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda" if count else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise UserError(f"expected device to be 'auto', 'cpu', 'cuda' or 'cuda:0' and so on, got {str(device)!r}")
    if place.type == "cuda" and (place.index or 0) >= count:
        raise UserError(f"device {str(device)!r}: torch sees {count} CUDA devices on this machine; use 'cpu' or 'auto'")
    return place


def _decoder_dtype(dtype: str | torch.dtype, device: torch.device, stored: torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return stored if device.type == "cuda" else torch.float32
    if dtype == "stored":
        return stored
    if dtype not in _DTYPES:
        raise UserError(f"expected dtype to be 'auto', 'stored' or one of {list(_DTYPES)}, got {dtype!r}")
    return _DTYPES[dtype]


def _read_shards(folder: Path, manifest: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    files = _section(manifest, "files", folder).get(name)
    if not isinstance(files, list) or not files:
        raise UserError(f"{folder / MANIFEST}: expected a list of {name} files")
    tensors: dict[str, Tensor] = {}
    for file in files:
        # The list comes from a file that anyone may have written: it must not lead out of the folder.
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise UserError(f"{folder / MANIFEST}: {str(file)[:80]!r} is not the name of a {name} file")
        for key, value in read_safetensors(folder / file).items():
            if key in tensors:
                raise UserError(f"{folder / file}: {key} is in an earlier file too")
            tensors[key] = value
    return tensors


def _load(
    make: Callable[[], Module], tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype, folder: Path
) -> Module:
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in own_tensors(make()).items()}
    check_keys(tensors, wanted, frozenset(), str(folder))
    for name, value in tensors.items():
        if name.endswith("packed_words") and value.dtype != torch.int32:
            raise UserError(f"{folder}: {name}: expected packed words as int32, got {value.dtype}")
    module = build(make, device, dtype)
    fill(module, (Pieces(name, (value,)) for name, value in tensors.items()))
    return module
