"""Parity of the exported graphs: 32 prompts, 150 greedy tokens each, on the default model and on the 7B's structure.

    python benchmarks/export/parity.py --json benchmarks/results/parity_onnx.json

The 7B's structure: 64,000 codes, Flan-T5-XL's text width, its tokenizer's shape, head sizes 64, 100 and 128 at a small
width, random weights. Exit code 1 where a limit of ``kinetok.export.parity`` is broken.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from kinetok.export.parity import LOGITS, METRES, TIE, compare
from kinetok.model.bank import PromptBank
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.pretrained import ModelBundle, load_pretrained
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.runtime.bench.machine import machine

PROMPTS, STEPS, LAYERS = 32, 150, 8


def structure(head_dim: int, default: ModelBundle) -> ModelBundle:
    """The 7B's structure at width 2 x head_dim, with the default model's statistics and skeleton."""
    torch.manual_seed(head_dim)
    tokenizer = MotionTokenizer(TokenizerConfig(width=64, code_dim=64)).eval()
    config = DecoderConfig(n_layer=LAYERS, n_head=2, n_embd=2 * head_dim)
    return ModelBundle(
        tokenizer=tokenizer,
        decoder=MotionDecoder(config).eval(),
        mean=default.mean,
        std=default.std,
        offsets=default.offsets,
        text_encoder={"type": "none"},
        sampling={},
        provenance={},
        licence="none",
        bank=None,
        directory=default.directory,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    default = load_pretrained(None, "cpu", "float32")
    assert default.bank is not None
    bank = PromptBank.load(default.bank)
    texts = bank.encode((bank.prompts * PROMPTS)[: arguments.prompts])
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(4 + i, 2048, generator=draw) for i in range(arguments.prompts)]
    results = {}
    for name, model, rows, opset in (
        ("default", default, texts, 23),
        ("default, opset 18", default, texts, 18),
        *((f"7B structure, heads of {size}", structure(size, default), made, 23) for size in (64, 100, 128)),
    ):
        began = time.perf_counter()
        parity = compare(model, rows, arguments.steps, opset=opset)
        results[name] = {"opset": opset, **parity.to_json()}
        print(f"{name:30} {parity}  {time.perf_counter() - began:.0f} s", flush=True)
    passed = all(result["passed"] for result in results.values())
    if arguments.json:
        limits = {"logits": LOGITS, "tie": TIE, "metres": METRES}
        text = json.dumps({"limits": limits, "results": results, "machine": machine(torch.device("cpu"))}, indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
