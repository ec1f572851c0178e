"""The prompts of MotionMillion-Eval, and a page that shows what a model makes of them."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from kinetok.files import whole_file
from kinetok.model.text import read_prompts
from kinetok.motion import Motion, quality
from kinetok.motion.skeleton import JOINT_NAMES, PARENTS

DEFAULT = Path(str(files("kinetok.train"))) / "default"
STEP = 2  # frames from one drawn frame to the next; the page draws what is between
SCORES = {
    "duration_s": ("length, s", 1),
    "distance_m": ("path, m", 2),
    "speed_m_per_s": ("speed, m/s", 2),
    "jerk_m_per_s3": ("jerk, m/s³", 1),
    "foot_skate_cm_per_s": ("foot skate, cm/s", 1),
    "penetration_cm": ("below the floor, cm", 2),
    "left_contact": ("left foot down", 2),
    "right_contact": ("right foot down", 2),
}
"""The scores of ``quality.report`` on the page: heading and decimals."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A clip on the page."""

    prompt: str
    seed: int
    motion: Motion
    scores: Mapping[str, float]


def motionmillion_eval() -> list[str]:
    """The 126 prompts of MotionMillion-Eval in the order of the released file; two of them occur twice."""
    return read_prompts(DEFAULT / "motionmillion_eval_prompts.txt")


def scores(motion: Motion) -> dict[str, float]:
    """The physical scores of a clip (``quality.report``), those of the page."""
    report = quality.report(motion)
    return {name: report[name] for name in SCORES}


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, median, least and greatest of each score over the clips; empty for none."""
    measures: dict[str, Callable[[list[float]], Any]] = {
        "mean": np.mean,
        "median": np.median,
        "least": np.min,
        "greatest": np.max,
    }
    return {
        score: {name: float(measure([row[score] for row in rows])) for name, measure in measures.items()}
        for score in (SCORES if rows else ())
    }


def write_prompt_page(path: str | Path, clips: Sequence[Shown], about: str) -> None:
    """Write one HTML file that shows ``clips`` as moving stick figures with their scores; it needs no network.

    ``about`` is a plain sentence on what made them. Joints are whole centimetres, every ``STEP`` frames.
    """
    data = {
        "parents": list(PARENTS),
        "names": list(JOINT_NAMES),
        "clips": [{"fps": clip.motion.fps / STEP, "joints": _drawn(clip.motion)} for clip in clips],
    }
    parts = {
        "ABOUT": escape(about),
        "STEP": str(STEP),
        "SUMMARY": _summary_table(summary([clip.scores for clip in clips])),
        "CLIPS": _clip_table(clips),
        # Inside a script element only "</script" and "<!--" mean anything; neither can be written without "<".
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = (DEFAULT / "prompt_page.html").read_text(encoding="utf-8")
    # In one pass: a prompt may contain what looks like a mark.
    text = re.sub("@(" + "|".join(parts) + ")@", lambda found: parts[found[1]], template)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _drawn(motion: Motion) -> Any:
    return np.rint(100 * motion.joints[::STEP]).astype(int).reshape(-1, 3 * len(PARENTS)).tolist()


def _summary_table(figures: Mapping[str, Mapping[str, float]]) -> str:
    if not figures:
        return ""
    heads = "".join(f"<th>{SCORES[score][0]}</th>" for score in figures)
    lines = [f"<thead><tr><th></th>{heads}</tr></thead><tbody>"]
    for measure in next(iter(figures.values())):
        cells = "".join(f"<td>{values[measure]:.{SCORES[score][1]}f}</td>" for score, values in figures.items())
        lines.append(f'<tr><th class="text">{measure}</th>{cells}</tr>')
    return "\n".join([*lines, "</tbody>"])


def _clip_table(clips: Sequence[Shown]) -> str:
    heads = [("clip", "number", "text"), ("prompt", "text", "text"), ("seed", "number", "")]
    heads += [(title, "number", "") for title, _ in SCORES.values()]
    cells = "".join(f'<th data-key="{key}" class="{kind}"><button>{title}</button></th>' for title, key, kind in heads)
    lines = [f"<thead><tr>{cells}</tr></thead><tbody>"]
    for number, clip in enumerate(clips):
        figure = (
            f'<td class="figure" data-value="{number}"><small>{number + 1}</small><canvas></canvas><div class="bar">'
            '<button class="play"></button><input type="range" min="0" step="any" value="0" aria-label="time">'
            '<button class="open" aria-label="larger" title="larger">&#x2922;</button></div></td>'
        )
        cells = f'<td class="text">{escape(clip.prompt)}</td><td>{clip.seed}</td>'
        for score, (_, digits) in SCORES.items():
            cells += f'<td data-value="{clip.scores[score]:.6g}">{clip.scores[score]:.{digits}f}</td>'
        lines.append(f'<tr data-clip="{number}">{figure}{cells}</tr>')
    return "\n".join([*lines, "</tbody>"])
