"""``kinetok export onnx``: a model as graphs, weights and one manifest (docs/bundle.md), whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kinetok.errors import UserError
from kinetok.export.golden import banned_ids, golden_cases, tolerance
from kinetok.export.text_encoder import find_encoder, text_graph, write_tokenizer
from kinetok.files import whole_directory
from kinetok.model.bank import MAX_FEATURES, PromptBank
from kinetok.model.config import FRAME_RATE, DecoderConfig
from kinetok.model.graphs.builder import MICROSOFT, OPSETS, Graph, TensorProto, WeightFile, check_model
from kinetok.model.graphs.decoder import DecoderExport, module_tensors
from kinetok.model.graphs.detokenizer import DetokenizerExport, StreamGraph, context
from kinetok.model.graphs.precision import Precision
from kinetok.model.pretrained import ModelBundle
from kinetok.model.streaming import whole_clip_reason
from kinetok.motion.features import FEATURES, POSITIONS, ROTATIONS, VELOCITIES
from kinetok.motion.skeleton import JOINT_NAMES, PARENTS
from kinetok.runtime.backends.onnx import OnnxBackend, runtime_library
from kinetok.runtime.backends.torch import TorchBackend
from kinetok.runtime.bundle import ALIGNMENT, Bundle, file_digest, only_holds, probe
from kinetok.runtime.manifest import FORMAT, MANIFEST, VERSION
from kinetok.runtime.quantize import PROMPTS, compare, failures, trial
from kinetok.runtime.sampling import TRAINED_SECONDS, SamplingParams

KV_DTYPES = {"fp32": "float32", "fp16": "float16"}
_DTYPE_NAMES = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.INT64: "int64",
}
LAYOUT = {
    "root_velocity_xz": [0, 2],
    "heading_change_6d": [2, 8],
    "positions": [POSITIONS.start, POSITIONS.stop],
    "velocities": [VELOCITIES.start, VELOCITIES.stop],
    "rotations_6d": [ROTATIONS.start, ROTATIONS.stop],
}


class TensorFile:
    """A flat file of tensors, each at a multiple of 64 bytes."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name = file, name

    def put(self, array: np.ndarray) -> dict[str, Any]:
        """Append a float32, int32 or int64 array; returns the manifest's reference to it."""
        offset = -(-self.file.tell() // ALIGNMENT) * ALIGNMENT
        self.file.write(b"\0" * (offset - self.file.tell()))
        self.file.write(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes())
        return {"file": self.name, "dtype": array.dtype.name, "shape": list(array.shape), "offset": offset}


def export_bundle(
    model: ModelBundle,
    out: str | Path,
    *,
    dtype: str = "fp32",
    kv: str | None = None,
    opset: int = OPSETS[0],
    text: bool = True,
    check: bool = True,
    compared: bool = False,
    force: bool = False,
) -> Path:
    """Write a bundle of a model on the CPU; an older bundle at ``out`` is replaced.

    dtype: fp32, fp16, int8 or int4 (weights); kv: the cache, fp32 or fp16 (None: as the activations). text: with the
    text encoder, where it can be exported. check: replay the golden fixtures on ONNX Runtime before the bundle takes its
    place, which all but fp32 does anyway, whose tolerances are measured. compared: measure what another precision than fp32
    changes (``runtime.quantize.compare``), and write nothing where it is too much, but for force. Raises ``UserError`` for
    options and models that cannot be expressed.
    """
    precision = Precision(name=dtype)
    if kv is not None and kv not in KV_DTYPES:
        raise UserError(f"kv: expected one of {', '.join(KV_DTYPES)}, got {kv!r}")
    if opset not in OPSETS:
        raise UserError(f"opset: expected one of {', '.join(map(str, OPSETS))}, got {opset}")
    check_original(model)
    kv_dtype = np.dtype(KV_DTYPES[kv]) if kv is not None else precision.activations
    exact = precision.name == "fp32" and kv_dtype == np.float32
    if check or not exact:
        runtime_library()  # said now, not after a model of billions has been written
    with whole_directory(Path(out), lambda folder: only_holds(folder, MANIFEST), "a bundle") as folder:
        manifest = _write(model, folder, precision, kv_dtype, opset, text)
        found: dict[str, float] = {}
        if check or not exact:
            from kinetok.export.replay import deviation, judge, run

            bundle = Bundle(folder, manifest)
            outputs = run(bundle)
            found = deviation(outputs)
            first = judge(bundle, outputs, tolerance(exact, found)).divergence
            if first is not None:
                raise UserError(
                    f"the exported graphs disagree with the model, nothing was written: {first.name}: {first.text}"
                )
        manifest["golden_tolerance"] = tolerance(exact, found)
        manifest["agreement"] = None
        if compared and not exact:
            agreement = _agreement(model, Bundle(folder, manifest))
            if (failed := failures(agreement)) and not force:
                raise UserError(
                    f"{dtype} changes this model too much: {'; '.join(failed)}; nothing was written (--force writes it)"
                )
            manifest["agreement"] = agreement
        text_form = json.dumps(manifest, indent=1, allow_nan=False, ensure_ascii=False)
        (folder / MANIFEST).write_text(text_form + "\n", encoding="utf-8")
    return Path(out)


def _agreement(model: ModelBundle, bundle: Bundle) -> dict[str, Any]:
    """What the bundle's graphs change, against the model as it was loaded."""
    parameters = sum(value.numel() for value in model.decoder.parameters())
    # A model of billions takes a second a token on a CPU.
    texts, count = trial(model, max(2, min(PROMPTS, 2 * 10**9 // parameters)))
    capacity = max(map(len, texts)) + count
    return compare(model, texts, count, TorchBackend(model.decoder, 1, capacity), OnnxBackend(bundle, 1, capacity))


def _write(
    model: ModelBundle, folder: Path, precision: Precision, kv_dtype: np.dtype, opset: int, text: bool
) -> dict[str, Any]:
    """Every file but the manifest, which is returned."""
    absent: dict[str, str] = {}
    stream: StreamGraph | None = None
    graphs: dict[str, Graph] = {}
    decoder = DecoderExport(
        config=model.decoder.config,
        tensors=module_tensors(model.decoder),
        precision=precision,
        kv_dtype=kv_dtype,
        opset=opset,
    )
    with (folder / "weights.bin").open("wb") as file:
        weights = WeightFile(file, "weights.bin")
        graphs["prefill"], graphs["decode"] = decoder.prefill(weights), decoder.decode(weights)
    detokenizer = DetokenizerExport(tokenizer=model.tokenizer, mean=model.mean, std=model.std, opset=opset)
    with (folder / "detokenizer.bin").open("wb") as file:
        weights = WeightFile(file, "detokenizer.bin")
        graphs["detokenize"] = detokenizer.whole(weights)
        reason = whole_clip_reason(model.tokenizer.config)
        if reason is None:
            stream = detokenizer.stream(weights)
            graphs[stream.graph.name] = stream.graph
        if "detokenize_stream" not in graphs:
            absent["detokenize_stream"] = reason or "the tokenizer looks ahead: detokenize_ahead streams it, late"
    text_section = {
        "type": model.text_encoder.get("type"),
        "name": model.text_encoder.get("name"),
        "max_features": MAX_FEATURES,
    }
    encoder = find_encoder(model.text_encoder) if text else "the bundle was exported without it"
    if isinstance(encoder, str):
        absent["text_encoder"] = encoder
    elif encoder.dim != model.decoder.config.text_dim:
        raise UserError(
            f"text encoder {encoder.name}: expected {model.decoder.config.text_dim} numbers a token, got {encoder.dim}"
        )
    else:
        with (folder / "text_encoder.bin").open("wb") as file:
            weights = WeightFile(file, "text_encoder.bin")
            graphs["text_encoder"] = text_graph(encoder, weights, precision.name, opset)
        text_section |= write_tokenizer(encoder, folder)
    described = {}
    for name, graph in graphs.items():
        path = folder / f"{name}.onnx"
        proto = graph.model()
        path.write_bytes(proto.SerializeToString())
        allowed = ("", MICROSOFT) if precision.bits and not name.startswith("detokenize") else ("",)
        check_model(path, allowed)
        described[name] = {"file": path.name, **_interface(proto)}
    if stream is not None:
        about = described[stream.graph.name]
        about["states"] = [{"input": before, "output": after} for before, after in stream.states]
        about["delay_frames"] = stream.delay_frames
    bank = PromptBank.load(model.bank) if model.bank is not None else None
    golden = golden_cases(model, precision, bank, None if isinstance(encoder, str) else encoder)
    with (folder / "golden.bin").open("wb") as file:
        tensors = TensorFile(file, "golden.bin")
        if not isinstance(encoder, str):
            for case in golden:
                case["ids"] = np.asarray(encoder.ids(case["text"]), np.int32)
        referred = [_referred(case, tensors) for case in golden]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **_facts(model, precision, kv_dtype, opset),
        "graphs": described,
        "absent": absent,
        "text": text_section,
        "bank": _write_bank(bank, folder) if bank is not None else None,
        "golden": referred,
        "licence": model.licence,
        "provenance": model.provenance,
    }
    files = {}
    for path in sorted(folder.iterdir()):
        digest, size = file_digest(path)
        files[path.name] = {"sha256": digest, "bytes": size}
    manifest["files"] = files
    return manifest


def check_original(model: ModelBundle) -> None:
    """Raise ``UserError`` for a quantised model, whose weights have been rounded once."""
    if model.quantisation is not None:
        raise UserError(
            f"{model.directory} is quantised already ({model.quantisation.kind}): export the original, --dtype int8 or int4"
        )


def decoder_facts(config: DecoderConfig) -> dict[str, Any]:
    """A manifest's section ``decoder``."""
    return {
        "layers": config.n_layer,
        "heads": config.n_head,
        "head_dim": config.head_dim,
        "width": config.n_embd,
        "codebook": config.codebook,
        "logits": config.head_rows,
        "end_id": config.end_id,
        "banned_ids": banned_ids(config),
        "positions": config.block_size,
        "text_dim": config.text_dim,
        "max_text": MAX_FEATURES,
    }


def _facts(model: ModelBundle, precision: Precision, kv_dtype: np.dtype, opset: int) -> dict[str, Any]:
    """What the manifest says of the model itself."""
    from kinetok import __version__

    decoder, tokenizer = model.decoder.config, model.tokenizer.config
    past, ahead = context(model.tokenizer)
    defaults = SamplingParams().resolve(model.sampling)
    return {
        "kinetok": __version__,
        "opset": opset,
        "domains": ["", MICROSOFT] if precision.bits else [""],
        "precision": precision.name,
        "kv_dtype": kv_dtype.name,
        "decoder": decoder_facts(decoder),
        "probe": probe(model.decoder),
        "tokenizer": {
            "codebook": tokenizer.codebook,
            "frame_rate": FRAME_RATE,
            "frames_per_token": tokenizer.frames_per_token,
            "tokens_per_second": tokenizer.tokens_per_second,
            "features": FEATURES,
            "causal": tokenizer.causal,
            "past_tokens": past,
            "look_ahead_tokens": ahead,
            "look_ahead_frames": ahead * tokenizer.frames_per_token,
        },
        "features": {"layout": LAYOUT, "mean": model.mean.tolist(), "std": model.std.tolist()},
        "skeleton": {"names": list(JOINT_NAMES), "parents": list(PARENTS), "offsets": model.offsets.tolist()},
        "axes": {"up": "+Y", "forward": "+Z", "left": "+X", "handedness": "right"},
        "units": {"length": "metre", "time": "second"},
        "sampling": {
            "temperature": defaults.temperature,
            "top_k": defaults.top_k,
            "top_p": defaults.top_p,
            "guidance": defaults.guidance,
            "min_seconds": float(model.sampling.get("min_seconds", 0.0)),
            "max_seconds": TRAINED_SECONDS,
        },
    }


def _interface(proto: Any) -> dict[str, Any]:
    """Names, dtypes and shapes of a graph's inputs and outputs."""

    def described(values: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": value.name,
                "dtype": _DTYPE_NAMES[value.type.tensor_type.elem_type],
                "shape": [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
            }
            for value in values
        ]

    return {"inputs": described(proto.graph.input), "outputs": described(proto.graph.output)}


def _referred(value: Any, tensors: TensorFile) -> Any:
    """The same with every array written and replaced by its reference."""
    if isinstance(value, np.ndarray):
        return tensors.put(value)
    if isinstance(value, Mapping):
        return {name: _referred(part, tensors) for name, part in value.items()}
    return value


def _write_bank(bank: PromptBank, folder: Path) -> dict[str, Any]:
    prompts, row = [], 0
    for text, features in bank.features.items():
        prompts.append({"text": text, "row": row, "rows": len(features)})
        row += len(features)
    with (folder / "bank.bin").open("wb") as file:
        rows = np.concatenate([features.numpy() for features in bank.features.values()])
        reference = TensorFile(file, "bank.bin").put(rows.astype(np.float32))
    return {"encoder": bank.name, "features": reference, "prompts": prompts}
