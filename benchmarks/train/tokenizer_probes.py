"""Which real clips still show their action after the tokenizer: ``python benchmarks/train/tokenizer_probes.py --json FILE``.

For each row of the probes, over the training clips with such captions: how many pass its predicate, how many still do when
encoded and decoded, and how many tokens are in use. About a minute on one core.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from kinetok.files import whole_file
from kinetok.model.pretrained import load_pretrained
from kinetok.motion.features import joints_from_rotations
from kinetok.motion.skeleton import CANONICAL_OFFSETS
from kinetok.runtime.bench.machine import machine
from kinetok.train.data.store import read_clips
from kinetok.train.probes import PROBES, window
from kinetok.train.reconstruction import reconstruct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory; the default model without it")
    parser.add_argument("--data", type=Path, default=Path("data/cmu"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_pretrained(arguments.model, "cpu")
    clips = [clip for clip in read_clips(arguments.data) if clip.split == "train" and not clip.heading_flips]
    results = reconstruct(model.tokenizer, model.mean, model.std, clips)
    offsets, rows = np.array(CANONICAL_OFFSETS), {}
    for probe in PROBES:
        mine = [result for result in results if probe.describes(result.clip.captions)]
        passed = [
            [probe.passes(joints_from_rotations(window(x.astype(np.float32)), offsets)) for x in (r.real, r.decoded)]
            for r in mine
        ]
        rows[probe.name] = {
            "clips": len(mine),
            "real": sum(real for real, _ in passed),
            "of_them_decoded": sum(real and decoded for real, decoded in passed),
        }
        print(probe.name, rows[probe.name], flush=True)
    used = len(np.unique(np.concatenate([result.tokens for result in results])))
    report = {
        "schema": 1,
        "machine": machine(torch.device("cpu")),
        "codebook": model.tokenizer.config.codebook,
        "codes_in_use": used,
        "clips": len(results),
        "rows": rows,
    }
    print(f"{used} of {model.tokenizer.config.codebook} codes in use over {len(results)} clips")
    if arguments.json:
        with whole_file(arguments.json) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
