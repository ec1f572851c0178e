"""The form of a result file as a JSON Schema (draft 2020-12), and a check of the few keywords that it uses."""

from collections.abc import Mapping
from typing import Any

FORMAT = "kinetok-bench"
VERSION = 2
KEY = ("kind", "model", "dtype", "kv", "batch", "tokens", "text", "context", "route", "threads")
SPREADS = ("ttft", "ramp", "tpot", "itl", "e2el", "ttff", "block")
SHARES = ("mean", "median", "std", "p50", "p95", "p99")

_TEXT, _WHOLE, _COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "integer", "minimum": 1}
_FIGURE, _RATE = {"type": "number", "minimum": 0}, {"type": "number", "exclusiveMinimum": 0}
_SECONDS = {"type": "array", "minItems": 2, "items": _RATE}
_BYTES = {"type": ["integer", "null"]}

_CHECK = {
    "type": "object",
    "required": ["passed"],
    "properties": {
        "passed": {"const": True},
        "margin": _FIGURE,
        "allowed": _FIGURE,
        "near_ties": _WHOLE,
        "distinct_tokens": _WHOLE,
    },
}


def _spread(*names: str) -> dict[str, Any]:
    return {f"{share}_{name}_ms": _FIGURE for name in names for share in SHARES}


def _kind(kind: str, *required: str, spreads: tuple[str, ...]) -> dict[str, Any]:
    """What a row of that kind must have besides what all rows have."""
    return {
        "if": {"properties": {"kind": {"const": kind}}},
        "then": {"required": [*required, *_spread(*spreads)]},
    }


_STEP = ("output_throughput", "real_time_factor", "gb_per_s", "mbu", "mbu_read", "mfu", "check", "text")

ROW: dict[str, Any] = {
    "type": "object",
    "required": [
        *("kind", "model", "dtype", "kv", "batch", "tokens", "route", "threads", "load_s", "seconds"),
        *("peak_memory_bytes", "steady_memory_bytes"),
    ],
    "properties": {
        "kind": {"enum": ["decode", "step", "stream", "crowd", "tokenizer"]},
        **dict.fromkeys(("model", "dtype", "kv", "route", "backend"), _TEXT),
        **dict.fromkeys(("batch", "tokens", "total_output_tokens", "first_frame_tokens", "block_frames"), _COUNT),
        **dict.fromkeys(("text", "context", "threads"), _WHOLE),
        **dict.fromkeys(("load_s", "setup_s", "compile_s"), _FIGURE),
        **dict.fromkeys(("output_throughput", "frames_per_s", "real_time_factor"), _RATE),
        **dict.fromkeys(("gb_per_s", "mbu", "mbu_read", "mfu", "cost_over_first"), _RATE),
        **dict.fromkeys(("ours_is_faster", "ours_is_faster_in_cpu_seconds"), _RATE),
        **dict.fromkeys(("peak_memory_bytes", "steady_memory_bytes"), _BYTES),
        **_spread(*SPREADS),
        "seconds": _SECONDS,
        "cpu_seconds": {"type": "array", "items": _FIGURE},
        "itl_ms_by_position": {"type": "array", "items": _FIGURE},
        "check": _CHECK,
    },
    "allOf": [
        _kind(
            "decode",
            *(*_STEP, "setup_s", "compile_s", "total_output_tokens", "itl_ms_by_position"),
            spreads=("ttft", "tpot", "itl", "e2el"),
        ),
        _kind("step", *_STEP, "context", "cost_over_first", spreads=("itl",)),
        _kind("stream", "output_throughput", "real_time_factor", "block_frames", "check", spreads=("ttff", "block")),
        _kind("crowd", "output_throughput", "real_time_factor", "check", spreads=("ttft", "itl")),
        _kind("tokenizer", "frames_per_s", "real_time_factor", "mfu", "check", spreads=("e2el",)),
    ],
}

REPORT: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "A report of kinetok bench",
    "type": "object",
    "required": ["format", "schema", "note", "machine", "measured", "parameters", "rows", "cannot_run"],
    "properties": {
        "format": {"const": FORMAT},
        "schema": {"const": VERSION},
        "note": _TEXT,
        "machine": {"type": "object", "required": ["device", "torch", "python", "platform", "commit"]},
        "measured": {
            "type": "object",
            "required": ["copy_gb_per_s", "read_gb_per_s", "matmul_tflop_per_s"],
            "properties": dict.fromkeys(("copy_gb_per_s", "read_gb_per_s", "matmul_tflop_per_s"), _RATE),
        },
        "parameters": _WHOLE,
        "rows": {"type": "array", "items": ROW},
        "cannot_run": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["route", "batch", "reason"],
                "properties": {"route": _TEXT, "batch": _COUNT, "reason": _TEXT},
            },
        },
        "characters_in_real_time": {"type": "object", "required": ["16.6_ms", "66.7_ms"]},
    },
}

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}


def violation(value: Any, schema: Mapping[str, Any], where: str = "the report") -> str | None:
    """Where and how a value breaks a schema made of the keywords above; None where it keeps to it."""
    if "const" in schema and value != schema["const"]:
        return f"{where}: expected {schema['const']!r}, got {value!r}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where}: expected one of {schema['enum']}, got {value!r}"
    if "type" in schema:
        names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        # A bool is an int to Python, and none to JSON.
        if isinstance(value, bool) or not any(isinstance(value, _TYPES[name]) for name in names):
            return f"{where}: expected {' or '.join(names)}, got {_short(value)}"
    if isinstance(value, int | float):
        # Written so that NaN breaks a limit.
        if "minimum" in schema and not value >= schema["minimum"]:
            return f"{where}: expected at least {schema['minimum']}, got {value!r}"
        if "exclusiveMinimum" in schema and not value > schema["exclusiveMinimum"]:
            return f"{where}: expected more than {schema['exclusiveMinimum']}, got {value!r}"
    if isinstance(value, dict):
        for name in schema.get("required", ()):
            if name not in value:
                return f"{where} lacks {name}"
        for name, part in schema.get("properties", {}).items():
            if name in value and (found := violation(value[name], part, f"{where}, {name}")):
                return found
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            return f"{where}: expected at least {schema['minItems']} values, got {len(value)}"
        if "items" in schema:
            for at, item in enumerate(value):
                if found := violation(item, schema["items"], f"{where}, number {at + 1}"):
                    return found
    for part in schema.get("allOf", ()):
        applies = "if" not in part or violation(value, part["if"]) is None
        if applies and (found := violation(value, part.get("then", part), where)):
            return found
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:37]}..."
