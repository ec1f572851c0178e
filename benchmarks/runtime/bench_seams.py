"""Does a stream jump where its window slides, or where the prompt changes? ``python benchmarks/runtime/bench_seams.py``,
with ``--json FILE`` and ``--pictures docs/images`` for what docs/streaming.md shows. Ten minutes of one core.

Change of a frame: of the root's velocity (metres a second), and of the joints seen from the root (root mean square, metres).
At a seam the largest of the four changes that follow counts; it is given as a multiple of the clip's median change, and beside
it the same multiple for windows of four changes anywhere in the clip: their 95th percentile. A new prompt's clip has two
halves with different medians, so its largest change is also given as it is, beside the largest away from the seam.

And does it stand still in the end? "still" is the share of the frames in which the joints move by less than two millimetres,
in the first and in the last ten seconds, and the seconds of the longest such stretch in the whole clip.
"""

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kinetok
from kinetok.files import whole_file
from kinetok.motion import Motion
from kinetok.motion.skeleton import FPS

FOLLOWING = 4
SETTLING = 30  # frames after a new prompt that are neither of the old motion nor of the new one
STILL = 0.002  # metres a frame, averaged over five
LONG = ["a person walks forward", "a person runs", "a person dances", "a person waves"]
HELD = ["a person waves", "a person punches", "a person practices karate", "a person kicks", "a person dances"]
CHANGES = [
    ("a person walks forward", "a person runs"),
    ("a person runs", "a person walks forward"),
    ("a person walks forward", "a person jumps"),
    ("a person runs", "a person stands still"),
    ("a person stands still", "a person runs"),
]


def changes(features: np.ndarray) -> dict[str, np.ndarray]:
    """Frame-to-frame changes ``[T - 1]`` of features ``[T, 272]``."""
    return {
        "root_velocity": FPS * np.linalg.norm(np.diff(features[:, :2], axis=0), axis=1),
        "pose": np.sqrt(np.square(np.diff(features[:, 8:74], axis=0)).mean(1) * 3),
    }


def at_seams(series: np.ndarray, seams: list[int]) -> dict[str, Any]:
    """Multiples of the median change; a seam is the number of frames before it."""
    median = float(np.median(series))
    largest = np.lib.stride_tricks.sliding_window_view(series, FOLLOWING).max(1)
    anywhere = float(np.percentile(largest, 95))
    values = [float(series[seam - 1 : seam - 1 + FOLLOWING].max()) for seam in seams]
    return {
        "median_change": median,
        "seams_over_median": [round(value / median, 2) if median else None for value in values],
        # None: the model stands frozen, and there is nothing to compare with.
        "anywhere_95th_percentile_over_median": round(anywhere / median, 2) if median else None,
    }


def still(features: np.ndarray) -> list[float]:
    """Shares of the frames that hardly move, in the first and in the last ten seconds, and the longest hold in seconds."""
    held = np.convolve(changes(features)["pose"], np.ones(5) / 5, "same") < STILL
    longest = max((len(list(run)) for moves, run in itertools.groupby(held) if moves), default=0)
    ends = (held[: round(10 * FPS)], held[-round(10 * FPS) :])
    return [*(round(float(part.mean()), 3) for part in ends), round(longest / FPS, 2)]


def long_stream(engine: kinetok.Engine, prompt: str, seconds: float, seed: int) -> tuple[Motion, list[int]]:
    """The whole clip, and the frames before each slide."""
    stream = engine.stream(prompt, seconds=seconds, seed=seed)
    backend, written, seams = stream._crowd.scheduler.backend, [0], []
    prefill = backend.prefill

    def noticed(slot: int, text: torch.Tensor, tokens: Any = ()) -> torch.Tensor:
        if len(tokens):
            seams.append(written[0])
        return prefill(slot, text, tokens)

    backend.prefill = noticed  # type: ignore[method-assign]
    blocks = []
    for block in stream:
        blocks.append(block)
        written[0] += len(block)
    return joined(blocks, prompt), sorted(set(seams))


def joined(blocks: Sequence[Motion], text: str) -> Motion:
    """Successive blocks of a stream as one motion."""
    parts = {name: np.concatenate([getattr(b, name) for b in blocks]) for name in ("features", "root", "rotations")}
    motion = Motion(rotations=parts["rotations"], root=parts["root"], offsets=blocks[0].offsets, text=text)
    motion.features = parts["features"]
    return motion


def excerpt(motion: Motion, begin: int, end: int, text: str) -> Motion:
    """Frames from one to before another."""
    return Motion(rotations=motion.rotations[begin:end], root=motion.root[begin:end], offsets=motion.offsets, text=text)


def pictures(engine: kinetok.Engine, folder: Path, walk: Motion, seams: list[int]) -> None:
    """What docs/streaming.md shows: a minute of walking, a hold that a slide ends, a runner who is told to stand."""
    figure(folder / "stream_60s.svg", LONG[0], walk.features, seams)
    for seed in itertools.count():
        kicks, slides = long_stream(engine, "a person kicks", 60.0, seed)
        # Where the window slides before it is full.
        early = [after for before, after in itertools.pairwise([0, *slides]) if after - before < 8.5 * FPS]
        if early and 60 <= early[0] <= len(kicks.root) - 90:
            first = early[0]
            said = "kicks: held pose, slide at 2.0 s"
            excerpt(kicks, first - 60, first + 60, said).save(folder / "stream_held.png")
            break
    with engine.stream("a person runs", seconds=math.inf, seed=0) as stream:
        blocks = [next(stream) for _ in range(30)]
        stream.redirect("a person stands still")
        frames = sum(map(len, blocks))
        stops = joined([*blocks, *(next(stream) for _ in range(30))], "")
    excerpt(stops, frames - 6, frames + 10, "runs, then told to stand at 0.2 s").save(folder / "stream_stops.png")


def figure(path: Path, prompt: str, features: np.ndarray, seams: list[int]) -> None:
    """Root speed and pose change over time, with the slides as lines."""
    series = {
        "speed of the root, m/s": FPS * np.linalg.norm(features[1:, :2], axis=1),
        "change of the pose from frame to frame, mm": 1e3 * changes(features)["pose"],
    }
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 330" font-family="sans-serif" font-size="13">',
        '<rect width="900" height="330" fill="white"/>',
        f'<text x="50" y="20">"{prompt}", {len(features) / FPS:.0f} s; dashed: where the window slides</text>',
    ]
    for row, (title, values) in enumerate(series.items()):
        bottom, top = 165 + 145 * row, float(values.max())
        points = " ".join(f"{50 + 830 * i / len(values):.1f},{bottom - 95 * v / top:.1f}" for i, v in enumerate(values))
        parts += [
            f'<text x="50" y="{bottom - 103}">{title}</text>',
            f'<text x="44" y="{bottom}" text-anchor="end">0</text>',
            f'<text x="44" y="{bottom - 88}" text-anchor="end">{top:.1f}</text>',
            *(
                f'<path d="M{50 + 830 * s / len(values):.1f} {bottom - 97}V{bottom}" stroke="#c33" stroke-dasharray="4 3"/>'
                for s in seams
            ),
            f'<polyline fill="none" stroke="#226" stroke-width="0.8" points="{points}"/>',
            f'<path d="M50 {bottom}H880" stroke="#888"/>',
        ]
    parts += [
        f'<text x="{50 + 830 * s * FPS / len(features):.0f}" y="326" text-anchor="middle">{s} s</text>'
        for s in range(0, int(len(features) / FPS) + 1, 10)
    ]
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pictures", type=Path, help="the folder to draw docs/streaming.md's pictures into")
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine = kinetok.load(options.model, "cpu")
    report: dict[str, Any] = {
        "seconds": options.seconds,
        "following_changes": FOLLOWING,
        "slides": {},
        "still": {},
        "new_prompts": {},
    }
    for prompt in LONG:
        motion, seams = long_stream(engine, prompt, options.seconds, seed=0)
        thirds = np.array_split(np.linalg.norm(np.diff(motion.root[:, [0, 2]], axis=0), axis=1), 3)
        report["slides"][prompt] = {
            "at_s": [round(seam / FPS, 2) for seam in seams],
            "path_m_in_thirds": [round(float(third.sum()), 2) for third in thirds],
            **{name: at_seams(series, seams) for name, series in changes(motion.features).items()},
        }
        print(prompt, json.dumps(report["slides"][prompt]), flush=True)
        if options.pictures and prompt == LONG[0]:
            pictures(engine, options.pictures, motion, seams)
    for prompt in HELD:
        clips = (engine.generate(prompt, seconds=options.seconds, seed=seed)[0] for seed in range(2 * options.seeds))
        report["still"][prompt] = [still(clip.features) for clip in clips]
        print(prompt, "still", json.dumps(report["still"][prompt]), flush=True)
    for old, new in CHANGES:
        rows = []
        for seed in range(options.seeds):
            with engine.stream(old, seconds=math.inf, seed=seed) as stream:
                before = [next(stream) for _ in range(30)]
                stream.redirect(new)
                after = [next(stream) for _ in range(30)]
            features = np.concatenate([block.features for block in before + after])
            frames = sum(map(len, before))
            away = {
                name: max(series[: frames - 1].max(), series[frames + SETTLING :].max())
                for name, series in changes(features).items()
            }
            speeds = FPS * np.linalg.norm(features[:, :2], axis=1)
            rows.append(
                {
                    "seed": seed,
                    "mean_speed_before_and_in_the_last_second": [
                        round(float(speeds[:frames].mean()), 2),
                        round(float(speeds[-30:].mean()), 2),
                    ],
                    "largest_change_at_the_seam_and_away_from_it": {
                        name: [round(float(value), 4) for value in (series[frames - 1 :][:FOLLOWING].max(), away[name])]
                        for name, series in changes(features).items()
                    },
                    **{name: at_seams(series, [frames]) for name, series in changes(features).items()},
                }
            )
        report["new_prompts"][f"{old} -> {new}"] = rows
        print(old, "->", new, json.dumps(rows), flush=True)
    if options.json:
        with whole_file(options.json) as path:
            path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
