"""Foot clean-up on clips of the default model and of people: ``python benchmarks/motion/bench_cleanup.py --json FILE``.

Prints the table of docs/cleanup.md.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import kinetok
from kinetok.motion import Motion
from kinetok.motion.cleanup import clean_feet
from kinetok.train.data.store import read_clips

PROMPTS = ("a person walks forward", "a person runs", "a person jumps", "a person dances salsa")
WORDS = ("walk", "run", "jump", "salsa")
FRAMES = 90  # least length of a recorded clip


def clips(data: Path, seeds: int) -> Iterator[tuple[str, Motion]]:
    engine = kinetok.load()
    for prompt in PROMPTS:
        for seed in range(seeds):
            yield f"{prompt}, seed {seed}", engine.generate(prompt, seconds=6, seed=seed)[0]
    recorded = read_clips(data)
    for word in WORDS:
        clip = next(x for x in recorded if any(word in text for text in x.captions) and len(x.features) >= FRAMES)
        yield f"recorded {word} {clip.id}", Motion.from_features(clip.features)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/cmu"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| clip | contacts | frames changed | largest displacement, cm | slide in contact, cm/frame |", end="")
    print(" foot skate, cm/frame | jerk ratio | second time, cm | ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, motion in clips(options.data, options.seeds):
        _ = motion.joints
        began = time.perf_counter()
        cleaned, report = clean_feet(motion)
        spent = 1000 * (time.perf_counter() - began)
        again = clean_feet(cleaned)[1].largest_displacement_cm
        rows.append({"clip": name, **report.to_json(), "second_time_cm": round(again, 4), "ms": round(spent, 1)})
        print(
            f"| {name} | {report.contacts} | {report.frames_changed} of {report.frames} |"
            f" {report.largest_displacement_cm:.1f} | {report.slide_before:.2f} → {report.slide_after:.2f} |"
            f" {report.skate_before:.2f} → {report.skate_after:.2f} | {report.jerk_ratio:.2f} | {again:.1f} | {spent:.0f} |"
        )
    if options.json:
        options.json.write_text(json.dumps({"clips": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
