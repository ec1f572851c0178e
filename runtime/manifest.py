"""What a bundle's manifest must be (docs/bundle.md): types and limits, checked before anything relies on them.

A manifest is a stranger's. Keys that are not known are left alone; the first one that is wrong is named.
"""

import re
from pathlib import Path
from typing import Any

from kinetok.errors import UserError
from kinetok.model.tensor_files import natural, parse_json, possible_shape
from kinetok.runtime.schema import MANY, Rule, anything, each, either, fields, flag, mapping, real, rule, text, whole

MANIFEST = "kinetok_bundle.json"
FORMAT, VERSION = "kinetok-bundle", 1
TENSOR_DTYPES = ("float32", "int32", "int64")
MANIFEST_BYTES = 64 << 20
INTACT = "export the model again, or fetch an intact copy"
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def parsed(path: Path) -> dict[str, Any]:
    """The JSON object of a manifest. ``UserError`` for anything else, ``OSError`` where it cannot be read."""
    data = path.read_bytes()
    try:
        return parse_json(data, path)
    except UserError as error:
        raise UserError(f"{error}: {INTACT}") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked manifest of a bundle; its files are not looked at. ``UserError`` for anything else or a newer version."""
    path = folder / MANIFEST
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: expected a file")
        if (size := path.stat().st_size) > MANIFEST_BYTES:
            raise UserError(f"{path}: expected at most {MANIFEST_BYTES} bytes, got {size}")
        manifest = parsed(path)
    except OSError as error:
        raise UserError(
            f"{folder} is no bundle: cannot read {MANIFEST} ({error.strerror or error}); make one with kinetok export onnx"
        ) from error
    version = manifest.get("version")
    if manifest.get("format") != FORMAT or type(version) is not int or version < 1:
        raise UserError(f"{path}: expected the format {FORMAT!r}, got {str(manifest.get('format'))[:40]!r}: {INTACT}")
    if version > VERSION:
        raise UserError(
            f"{path}: version {version} is newer than this kinetok reads ({VERSION}): update kinetok, or export the model "
            "again with this one"
        )
    found = _BUNDLE(manifest)
    wrong = f"{found[0]} to be {found[1]}" if found else _across(manifest)
    if wrong:
        raise UserError(f"{path}: expected {wrong}: {INTACT}")
    return manifest


def tensor(dtype: str, axes: int) -> Rule:
    """A reference to a plain tensor."""

    def possible(shape: Any) -> bool:
        return isinstance(shape, list) and len(shape) == axes and possible_shape(shape) and all(shape)

    shape = rule(possible, f"a shape of {axes} axes, none empty")
    return fields(file=file_name, dtype=text(dtype), shape=shape, offset=rule(natural, "an offset in bytes"))


file_name = rule(lambda value: isinstance(value, str) and FILE_NAME.fullmatch(value) is not None, "a plain file name")
axis = rule(lambda value: isinstance(value, str) or natural(value), "a number or the name of an axis")
_SIZE = whole(1)
_VALUES = each(fields(name=text(), dtype=text(), shape=each(axis)))
_STATE = fields(input=text(), output=text())
_DRAW = fields(
    seed=whole(0, (1 << 63) - 1),
    request=whole(0, (1 << 32) - 1),
    guidance=real(-100, 100),
    temperature=real(1e-4, 100),
    top_k=whole(0, 1 << 31),
    top_p=real(1e-4, 1),
    least=whole(),
    most=whole(1),
    tokens=tensor("int32", 1),
)
_FIXTURE = fields(
    ("ids",),
    text=text(),
    features=tensor("float32", 2),
    first_logits=tensor("float32", 1),
    last_logits=tensor("float32", 1),
    greedy=tensor("int32", 1),
    most=whole(1),
    sampled=_DRAW,
    empty=either(tensor("float32", 2)),
    frames=tensor("float32", 2),
    ids=tensor("int32", 1),
)
_TOLERANCE = real(0, 1)
_BUNDLE = fields(
    kinetok=text(),
    opset=whole(1, 1000),
    domains=each(text("", "com.microsoft")),
    precision=text("fp32", "fp16", "int8", "int4"),
    kv_dtype=text("float32", "float16"),
    files=mapping(fields(sha256=text(), bytes=whole(0, 1 << 46)), file_name),
    graphs=mapping(
        fields(
            ("states", "delay_frames"),
            file=file_name,
            inputs=_VALUES,
            outputs=_VALUES,
            states=each(_STATE),
            delay_frames=whole(0, 1 << 16),
        )
    ),
    absent=mapping(text()),
    decoder=fields(
        layers=whole(1, 4096),
        heads=whole(1, 4096),
        head_dim=whole(1, 4096),
        width=whole(1, MANY),
        codebook=_SIZE,
        logits=_SIZE,
        end_id=whole(),
        banned_ids=each(whole()),
        positions=whole(2),
        text_dim=_SIZE,
        max_text=_SIZE,
    ),
    probe=each(real()),
    tokenizer=fields(
        codebook=_SIZE,
        frame_rate=whole(1, 1000),
        frames_per_token=whole(1, 64),
        tokens_per_second=real(1e-3, 1000),
        features=_SIZE,
        causal=flag,
        past_tokens=whole(),
        look_ahead_tokens=whole(),
        look_ahead_frames=whole(),
    ),
    features=fields(layout=mapping(each(whole(), 2)), mean=each(real()), std=each(real(0))),
    skeleton=fields(names=each(text()), parents=each(whole(-1)), offsets=each(each(real(), 3))),
    sampling=fields(
        temperature=real(0, 100),
        top_k=whole(0, 1 << 31),
        top_p=real(1e-4, 1),
        guidance=real(-100, 100),
        min_seconds=real(0, 3600),
        max_seconds=real(0, 3600),
    ),
    text=fields(("vocab", "tokenizer"), max_features=_SIZE, vocab=file_name, tokenizer=file_name),
    bank=either(
        fields(
            encoder=text(),
            features=tensor("float32", 2),
            prompts=each(fields(text=text(), row=whole(0, 1 << 31), rows=whole(1, 1 << 16))),
        )
    ),
    golden=each(_FIXTURE),
    golden_tolerance=fields(logits=_TOLERANCE, frames=_TOLERANCE, features=_TOLERANCE, weights=_TOLERANCE),
    agreement=either(mapping(anything)),
)


def _across(manifest: dict[str, Any]) -> str | None:
    """What parts say of one another."""
    files, decoder, tokenizer = manifest["files"], manifest["decoder"], manifest["tokenizer"]
    features, skeleton, bank = manifest["features"], manifest["skeleton"], manifest["bank"]
    named = [about["file"] for about in manifest["graphs"].values()]
    named += [manifest["text"][key] for key in ("vocab", "tokenizer") if key in manifest["text"]]
    if missing := next((name for name in named if name not in files), None):
        return f"{missing[:60]!r} to be among the files"
    if missing := next((name for name in ("prefill", "decode", "detokenize") if name not in manifest["graphs"]), None):
        return f"a graph {missing!r}"
    if decoder["end_id"] >= decoder["logits"] or any(banned >= decoder["logits"] for banned in decoder["banned_ids"]):
        return "'end_id' and 'banned_ids' to be less than 'logits'"
    if decoder["end_id"] in decoder["banned_ids"] or tokenizer["codebook"] != decoder["codebook"]:
        return "one codebook, and an end that can be drawn"
    if len(features["mean"]) != tokenizer["features"] or len(features["std"]) != tokenizer["features"]:
        return f"{tokenizer['features']} numbers in 'mean' and in 'std'"
    joints = len(skeleton["names"])
    if len(skeleton["parents"]) != joints or len(skeleton["offsets"]) != joints:
        return "as many names, parents and offsets in 'skeleton'"
    if any(parent >= joint for joint, parent in enumerate(skeleton["parents"])):
        return "an earlier joint, or -1, as each joint's parent"
    rows = bank["features"]["shape"][0] if bank is not None else 0
    if bank is not None and any(prompt["row"] + prompt["rows"] > rows for prompt in bank["prompts"]):
        return f"the bank's prompts to lie within its {rows} rows"
    if wrong := _interfaces(manifest):
        return wrong
    return next((wrong for case in manifest["golden"] if (wrong := _fixture(case, manifest))), None)


def interface(manifest: dict[str, Any], graph: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs and outputs of a graph that follow from the model's sizes: name to (dtype, shape), free axes as None."""
    decoder, features = manifest["decoder"], manifest["tokenizer"]["features"]
    kv = manifest["kv_dtype"], (None, decoder["heads"], None, decoder["head_dim"])
    past, present = (
        {f"{side}.{layer}.{kind}": kv for layer in range(decoder["layers"]) for kind in ("key", "value")}
        for side in ("past_key_values", "present")
    )
    logits = {"logits": ("float32", (None, decoder["logits"]))}
    if graph == "prefill":
        text_features = "float32", (None, None, decoder["text_dim"])
        return {"text_features": text_features, "text_lengths": ("int64", (None,)), **past}, logits | present
    if graph == "decode":
        return {"input_ids": ("int64", (None, 1)), "position_ids": ("int64", (None, 1)), **past}, logits | present
    if graph == "text_encoder":
        return {"input_ids": ("int64", (1, None))}, {"text_features": ("float32", (1, None, decoder["text_dim"]))}
    clip = {name: ("int64", (None,)) for name in ("position", "end")} if graph == "detokenize_ahead" else {}
    states = manifest["graphs"][graph].get("states", [])
    shapes = {value["name"]: tuple(value["shape"][1:]) for value in manifest["graphs"][graph]["inputs"]}
    before = {state["input"]: ("float32", (None, *shapes.get(state["input"], ()))) for state in states}
    after = {state["output"]: before[state["input"]] for state in states}
    frames = {"features": ("float32", (None, None, features))}
    return {"tokens": ("int64", (None, None)), **clip, **before}, frames | after


GRAPHS = ("prefill", "decode", "detokenize", "detokenize_stream", "detokenize_ahead", "text_encoder")


def _interfaces(manifest: dict[str, Any]) -> str | None:
    """Graphs are described as the model's sizes say, and their states have sizes."""
    for graph, about in manifest["graphs"].items():
        if graph not in GRAPHS:
            continue
        if graph.startswith("detokenize_") and "delay_frames" not in about:
            return f"delay_frames of {graph}"
        for state in (value for value in about["inputs"] if value["name"].startswith("state")):
            numbers = state["shape"][1:]
            if len(numbers) != 2 or not all(type(size) is int and 0 < size <= 1 << 16 for size in numbers):
                return f"the state {state['name'][:40]!r} of {graph} to have two sizes behind the batch"
        for wanted, described in zip(interface(manifest, graph), (about["inputs"], about["outputs"]), strict=True):
            if sorted(wanted.items()) != sorted(plain(described).items()):
                return f"inputs and outputs of {graph} that go with the decoder's and the tokenizer's sizes"
    return None


def plain(described: Any) -> dict[str, Any]:
    """A manifest's list of inputs or outputs as ``interface`` gives them."""
    return {
        value["name"]: (value["dtype"], tuple(None if isinstance(size, str) else size for size in value["shape"]))
        for value in described
    }


def _fixture(case: dict[str, Any], manifest: dict[str, Any]) -> str | None:
    """Sizes of a golden fixture."""
    decoder, tokenizer = manifest["decoder"], manifest["tokenizer"]
    tokens = max(case["greedy"]["shape"][0], case["sampled"]["tokens"]["shape"][0])
    texts = [case["features"], *([case["empty"]] if case["empty"] is not None else [])]
    for text_shape in (part["shape"] for part in texts):
        if text_shape[1] != decoder["text_dim"] or text_shape[0] + tokens > decoder["positions"]:
            return (
                f"a fixture's text and tokens in {decoder['positions']} positions, {decoder['text_dim']} numbers a row"
            )
    if case["sampled"]["guidance"] != 1 and case["empty"] is None:
        return "a fixture with guidance to have features of the empty text"
    if any(case[name]["shape"][0] != decoder["logits"] for name in ("first_logits", "last_logits")):
        return f"a fixture's logits to be {decoder['logits']}"
    frames = [case["greedy"]["shape"][0] * tokenizer["frames_per_token"], tokenizer["features"]]
    return None if case["frames"]["shape"] == frames else f"a fixture's frames to be {frames}"
