"""Ids of random captions: the C++ tokenizer of sentences against Python's. A command for many; the tests do a few.

python benchmarks/runtime/captions.py --count 10000 --json benchmarks/results/captions_cpp.json
"""

import argparse
import json
import random
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SEED = 7
_WORDS = [
    "a",
    "person",
    "walks",
    "Forward,",
    "slowly;",
    "turns-left",
    "&",
    "right",
    "(twice)...",
    "naïve",
    "café",
    "İstanbul",
    "日本語",
    "한국어",
    "straße",
    "ДОМ",
]
_ODD = ["[SEP]", "[MASK]", "[sep]", "\u200b", "e\u0301", "\ufb01", "👩\u200d👩\u200d👧", "…", "ﷺ", "ǆ"]
_ODD += ["x" * 101, "\u3000", "\t", "\r\n", "\u0085", "\u00a0"]
_SCRIPTS = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE00), (0x1E00, 0x2100)]
_SCRIPTS += [(0x3000, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0xE000, 0x10000), (0x10000, 0x20000)]
_SCRIPTS += [(0x2F800, 0x2FA20)]


def captions(count: int) -> list[str]:
    """Sentences, and what nobody would write: all scripts, marks, odd spaces, special tokens, endless words and texts."""
    from kinetok.model.text_minilm import MiniLM

    pieces = sorted(piece.removeprefix("##") for piece in MiniLM().tokenizer.get_vocab())
    rng, found = random.Random(SEED), []
    for _ in range(count):
        parts = []
        for _ in range(rng.choice([1, 1, 3, 3, 8, 8, 20, 20, 80])):
            kind = rng.random()
            if kind < 0.35:
                parts.append(rng.choice(pieces))
            elif kind < 0.7:
                parts.append(rng.choice(_WORDS) + rng.choice(["", "", "s", "ing", "ed", "!"]))
            elif kind < 0.85:
                parts.append(rng.choice(_ODD))
            else:
                low, high = rng.choice(_SCRIPTS)
                parts.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 6))))
        found.append(rng.choice([" ", " ", "  ", ""]).join(parts))
    return found


def ids_of_cpp(probe: Path, bundle: Path, texts: list[str]) -> list[list[int]]:
    """What runtime/cpp's kinetok_probe makes of the texts."""
    data = b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)
    done = subprocess.run([probe, "ids", bundle], input=data, capture_output=True, check=True)
    return [[int(word) for word in line.split()] for line in done.stdout.decode().splitlines()]


def ids_of_python(texts: list[str]) -> list[list[int]]:
    """The ids that MiniLM's encoder takes in, cut as it cuts them."""
    from kinetok.model.text_minilm import MiniLM

    tokenizer = MiniLM().tokenizer
    return [tokenizer.encode(text).ids[:149] for text in texts]


def compare(probe: Path, bundle: Path, count: int) -> dict[str, Any]:
    """How many captions have the same ids in both, and the first that has not."""
    texts = captions(count)
    theirs, ours = ids_of_python(texts), ids_of_cpp(probe, bundle, texts)
    wrong = [text for text, a, b in zip(texts, theirs, ours, strict=True) if a != b]
    ids = [number for row in theirs for number in row]
    return {"captions": count, "seed": SEED, "ids": len(ids), "different_ids": len(set(ids)),
            "longest": max(map(len, theirs)), "unlike": len(wrong), "first_unlike": wrong[0] if wrong else None}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from kinetok.export.bundle import export_bundle
    from kinetok.files import whole_file
    from kinetok.model.pretrained import load_pretrained

    build = ROOT / "build" / "cpp-probe"
    subprocess.run(["cmake", "-S", ROOT / "runtime" / "cpp", "-B", build, "-DKINETOK_TESTS=ON"], check=True)
    subprocess.run(["cmake", "--build", build, "--target", "kinetok_probe"], check=True)
    with tempfile.TemporaryDirectory() as folder:
        bundle = export_bundle(load_pretrained(None, "cpu", "float32"), Path(folder) / "bundle", check=False)
        result = compare(build / "tests" / "kinetok_probe", bundle, options.count)
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        with whole_file(options.json) as file:
            file.write_text(text + "\n", encoding="utf-8")
    return 1 if result["unlike"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
