"""Physical probes: sentences whose motion can be judged by its joints, and how often a model and the real clips pass.

``python -m kinetok.train.probes --model DIR`` prints the table.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kinetok.errors import UserError
from kinetok.files import whole_file
from kinetok.motion import predicates
from kinetok.motion.features import joints_from_rotations
from kinetok.motion.skeleton import CANONICAL_OFFSETS, FPS
from kinetok.train.data.store import Clip, mirror_words, read_clips

if TYPE_CHECKING:
    from kinetok.runtime import Engine

SECONDS = 6.0
SHARE_OF_REAL = 0.8  # of the real clips' rate is enough where it is lower than the goal
RELATIVE = ("karate", "kick", "punch", "wave")  # the rows that this holds for


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One row: a prompt, five wordings of it that no training caption has, and what its motion has to do.

    goal: the share of clips that should pass, None where none is set. captions: a regular expression; a real clip belongs to
    the row when it is found in one of its captions. passes: joints ``[T, 22, 3]`` in metres to yes or no.
    """

    name: str
    prompt: str
    paraphrases: tuple[str, ...]
    goal: float | None
    captions: str
    passes: Callable[[ArrayLike], bool]

    @property
    def sided(self) -> bool:
        """Whether left and right matter, so that a mirrored clip shows something else."""
        return mirror_words(self.prompt) != self.prompt

    def describes(self, captions: Iterable[str]) -> bool:
        return any(re.search(self.captions, caption) for caption in captions)


PROBES = (
    Probe(
        name="stand",
        prompt="a person stands still",
        paraphrases=(
            "someone remains motionless",
            "a man stays where he is without moving",
            "a woman keeps standing on the spot",
            "somebody stands there calmly",
            "the person does not move",
        ),
        goal=0.9,
        captions=r"stands (still|idle|in place)|is standing and waiting",
        passes=predicates.stands_still,
    ),
    Probe(
        name="walk",
        prompt="a person walks forward",
        paraphrases=(
            "somebody goes for a walk",
            "a man strolls ahead",
            "a woman is walking along",
            "the person steps ahead at walking speed",
            "someone moves forward on foot",
        ),
        goal=0.9,
        captions=r"^\w+ \w+( is)? (slowly )?walk(s|ing)( straight)?( forward)?( in a straight line| slowly| briskly)?$",
        passes=predicates.walks_forward,
    ),
    Probe(
        name="backwards",
        prompt="a person walks backwards",
        paraphrases=(
            "someone steps backwards",
            "a man walks in reverse",
            "a woman backs away",
            "somebody moves back step by step",
            "the person retreats backward",
        ),
        goal=None,
        captions=r"\b(walking|moves) backward\b",
        passes=predicates.walks_backwards,
    ),
    Probe(
        name="sneak",
        prompt="a person sneaks",
        paraphrases=(
            "someone tiptoes so that nobody hears",
            "a man creeps along",
            "a burglar moves silently",
            "somebody sneaks around quietly",
            "a woman prowls forward bent over",
        ),
        goal=None,
        captions=r"\bsneaks\b",
        passes=predicates.sneaks,
    ),
    Probe(
        name="run",
        prompt="a person runs",
        paraphrases=(
            "someone sprints",
            "a man is running fast",
            "a woman jogs along",
            "somebody dashes ahead",
            "the person rushes forward at a run",
        ),
        goal=0.9,
        captions=r"^(a person|someone|a man|the person) (runs|jogs|sprints|is running)( forward| ahead)?$",
        passes=predicates.runs,
    ),
    Probe(
        name="left",
        prompt="a person turns left",
        paraphrases=(
            "someone turns around to the left",
            "a man goes left",
            "a woman rotates to her left",
            "somebody walks and bends off to the left",
            "the person changes direction to the left",
        ),
        goal=None,
        captions=r"\b(turns?|turning|curve|curving|veers)\b.*\bleft\b",
        passes=predicates.turns_left,
    ),
    Probe(
        name="right",
        prompt="a person turns right",
        paraphrases=(
            "someone turns around to the right",
            "a man goes right",
            "a woman rotates to her right",
            "somebody walks and bends off to the right",
            "the person changes direction to the right",
        ),
        goal=None,
        captions=r"\b(turns?|turning|curve|curving|veers)\b.*\bright\b",
        passes=predicates.turns_right,
    ),
    Probe(
        name="jump",
        prompt="a person jumps",
        paraphrases=(
            "someone leaps up",
            "a man springs into the air",
            "a woman makes a jump",
            "somebody takes a leap",
            "the person is leaping off the floor",
        ),
        goal=0.8,
        captions=r"\b(jump|jumps|jumping)\b(?! kick| and kicks|.* bar\b)",
        passes=predicates.jumps,
    ),
    Probe(
        name="hop",
        prompt="a person hops",
        paraphrases=(
            "someone is hopping",
            "a man hops up and down",
            "a woman bounces on her feet",
            "somebody hops along like a rabbit",
            "the person does little hops",
        ),
        goal=0.8,
        captions=r"\bhops\b|jumps up and down|keeps jumping",
        passes=predicates.hops,
    ),
    Probe(
        name="kick",
        prompt="a person kicks",
        paraphrases=(
            "someone lifts a leg and kicks",
            "a man delivers a kick",
            "a woman is kicking the air",
            "somebody kicks out with one foot",
            "the person gives a strong kick",
        ),
        goal=0.6,
        captions=r"^(?!.*(hands|flip)).*\bkicks?\b",
        passes=predicates.kicks,
    ),
    Probe(
        name="punch",
        prompt="a person punches",
        paraphrases=(
            "someone is punching",
            "a man hits with his fist",
            "a woman throws punches",
            "somebody boxes the air",
            "the person delivers a punch",
        ),
        goal=0.6,
        captions=r"(?<!sidewards )\b(punch|punches|jab)\b",
        passes=predicates.punches,
    ),
    Probe(
        name="wave",
        prompt="a person waves",
        paraphrases=(
            "someone is waving",
            "a man waves goodbye",
            "a woman waves with one hand up",
            "somebody greets by waving a hand",
            "the person waves at a friend",
        ),
        goal=0.6,
        captions=r"\bwaves (hello|cars)",
        passes=predicates.waves,
    ),
    Probe(
        name="dance",
        prompt="a person dances",
        paraphrases=(
            "someone dances happily",
            "a man is dancing to music",
            "a woman performs a dance",
            "somebody moves to the beat",
            "the person dances at a party",
        ),
        goal=None,
        captions=r"\b(dances|dancing|dance)\b",
        passes=predicates.dances,
    ),
    Probe(
        name="salsa",
        prompt="a person dances salsa",
        paraphrases=(
            "a couple's partner dances the salsa",
            "a man does salsa steps",
            "a woman moves in salsa rhythm",
            "somebody performs a salsa dance",
            "the person is salsa dancing",
        ),
        goal=0.8,
        captions=r"\bsalsa\b",
        passes=predicates.dances_salsa,
    ),
    Probe(
        name="karate",
        prompt="a person practices karate",
        paraphrases=(
            "someone does karate",
            "a man trains karate moves",
            "a woman performs martial arts techniques",
            "somebody shows a karate form",
            "the person is doing karate exercises",
        ),
        goal=0.6,
        captions=r"\bkarate\b|\bmartial arts\b",
        passes=predicates.practices_karate,
    ),
    Probe(
        name="dribble",
        prompt="a person dribbles a basketball",
        paraphrases=(
            "someone bounces a ball with one hand",
            "a man plays basketball and dribbles",
            "a woman is dribbling a ball",
            "somebody dribbles the ball on the court",
            "the person keeps bouncing a basketball",
        ),
        goal=None,
        captions=r"\bdribbl(es|ing)\b",
        passes=predicates.dribbles,
    ),
)


def rows(names: Sequence[str] | None = None) -> tuple[Probe, ...]:
    """The probes of these names, all for None. ``UserError`` for a name that is not one."""
    known = {probe.name: probe for probe in PROBES}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise UserError(f"unknown probes {unknown}: expected some of {sorted(known)}")
    return PROBES if names is None else tuple(known[name] for name in names)


def run_probe(engine: "Engine", text: str, probe: Probe, seeds: Iterable[int], seconds: float = SECONDS) -> list[bool]:
    """Whether the clip that each seed gives for ``text`` passes. ``UserError`` as ``Engine.generate`` raises it."""
    return [probe.passes(_canonical(engine.generate(text, seed=seed, seconds=seconds)[0].features)) for seed in seeds]


def _canonical(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Joints ``[T, 22, 3]`` on the canonical body."""
    return joints_from_rotations(features, np.array(CANONICAL_OFFSETS))


def window(features: NDArray[np.float32], seconds: float = SECONDS) -> NDArray[np.float32]:
    """The middle ``seconds`` of a clip, all of it where it is shorter: as much as a generated clip has."""
    count = round(seconds * FPS)
    start = max(0, (len(features) - count) // 2)
    return features[start : start + count]


def real_rate(probe: Probe, clips: Iterable[Clip], *, seconds: float = SECONDS) -> tuple[int, int] | None:
    """(passed, of) the real clips whose captions belong to the row; None where there is no such clip.

    A row with a side counts every clip also mirrored, with mirrored captions.
    """
    passed = total = 0
    for clip in clips:
        for mirror in (False, True) if probe.sided else (False,):
            captions = map(mirror_words, clip.captions) if mirror else clip.captions
            if probe.describes(captions):
                passed += probe.passes(_canonical(window(clip.side(mirror), seconds)))
                total += 1
    return (passed, total) if total else None


def false_alarms(probes: Sequence[Probe], clips: Iterable[Clip]) -> dict[str, dict[str, tuple[int, int]]]:
    """``[row][other]``: (passed, of) the clips of the row ``other`` that do not belong to ``row`` but pass its predicate.

    ``other`` is a name of ``probes``, or "all" for every clip that does not belong to the row. Combinations without such a
    clip are left out.
    """
    counts: dict[str, dict[str, tuple[int, int]]] = {probe.name: {} for probe in probes}
    for clip in clips:
        joints = _canonical(window(clip.features))
        belongs = [probe.name for probe in probes if probe.describes(clip.captions)]
        for probe in probes:
            if probe.name not in belongs:
                hit = probe.passes(joints)
                for other in (*belongs, "all"):
                    passed, total = counts[probe.name].get(other, (0, 0))
                    counts[probe.name][other] = passed + hit, total + 1
    return counts


def effective_goal(probe: Probe, real: tuple[int, int] | None) -> float | None:
    """The row's goal, or for karate, kicks, punches and waves 0.8 of the real clips' rate where that is lower."""
    if probe.goal is None or real is None or probe.name not in RELATIVE:
        return probe.goal
    return min(probe.goal, SHARE_OF_REAL * real[0] / real[1])


def _real_rates(probe: Probe, clips: Sequence[Clip]) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Of the training split and of the other subjects."""
    train, held_out = (
        real_rate(probe, [clip for clip in clips if (clip.split == "train") == wanted]) for wanted in (True, False)
    )
    return train, held_out


def measure(
    engine: "Engine",
    probes: Sequence[Probe],
    clips: Sequence[Clip],
    *,
    seeds: int,
    paraphrases: bool = False,
    told: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """One dictionary a row: passed [of], paraphrases passed [of] or None, real rates of the splits, goal.

    told is called with each row as it is done.
    """
    result = []
    for probe in probes:
        train, held_out = _real_rates(probe, clips)
        own = run_probe(engine, probe.prompt, probe, range(seeds))
        other = (
            [hit for text in probe.paraphrases for hit in run_probe(engine, text, probe, range(seeds))]
            if paraphrases
            else []
        )
        row = {
            "row": probe.name,
            "prompt": probe.prompt,
            "passed": [sum(own), len(own)],
            "paraphrases": [sum(other), len(other)] if paraphrases else None,
            "train": train,
            "held_out": held_out,
            "goal": effective_goal(probe, train),
        }
        told(row)
        result.append(row)
    return result


def _rate(counts: Sequence[int] | None) -> str:
    return "none" if counts is None else f"{counts[0]}/{counts[1]}"


def _line(row: dict[str, Any]) -> str:
    goal = "-" if row["goal"] is None else f"{row['goal']:.2f}"
    cells = [_rate(row[key]) for key in ("passed", "paraphrases", "train", "held_out")]
    return f"{row['row']:10s} {goal:>5s} " + " ".join(f"{cell:>11s}" for cell in cells)


def _print_real(probes: Sequence[Probe], clips: Sequence[Clip]) -> list[dict[str, Any]]:
    """The rates of real clips, and in percent how often the clips of another row (a column) pass a predicate."""
    alarms = false_alarms(probes, clips)
    names = [probe.name for probe in probes]
    print(
        f"{'row':10s} {'train':>8s} {'held out':>8s} {'others':>8s}  " + " ".join(f"{name[:5]:>5s}" for name in names)
    )
    table = []
    for probe in probes:
        train, held_out = _real_rates(probe, clips)
        cells = [alarms[probe.name].get(name) for name in names]
        percents = ["-" if cell is None else f"{100 * cell[0] / cell[1]:.0f}" for cell in cells]
        rates = (train, held_out, alarms[probe.name].get("all"))
        print(
            f"{probe.name:10s} "
            + " ".join(f"{_rate(r):>8s}" for r in rates)
            + "  "
            + " ".join(f"{p:>5s}" for p in percents)
        )
        table.append({"row": probe.name, "train": train, "held_out": held_out, "others": alarms[probe.name]})
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    import torch

    import kinetok

    parser = argparse.ArgumentParser(prog="python -m kinetok.train.probes", description=__doc__)
    parser.add_argument("--model", help="a model directory; the default model without it")
    parser.add_argument("--data", default="data/cmu", help="the real clips")
    parser.add_argument("--seeds", type=int, default=8, help="clips a sentence")
    parser.add_argument("--paraphrases", action="store_true", help="also the five other wordings of each row")
    parser.add_argument("--rows", help="some rows, with commas between")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument(
        "--real", action="store_true", help="no model: each predicate on the real clips of its row and of the others"
    )
    options = parser.parse_args(arguments)
    try:
        probes = rows(options.rows.split(",") if options.rows else None)
        if options.seeds < 1:
            raise UserError(f"--seeds: expected 1 or more, got {options.seeds}")
        clips = read_clips(options.data)
        if options.real:
            table = _print_real(probes, clips)
        else:
            torch.set_num_threads(1)
            engine = kinetok.load(options.model)
            print(f"{'row':10s} {'goal':>5s} {'passed':>11s} {'paraphrases':>11s} {'train':>11s} {'held out':>11s}")
            table = measure(
                engine,
                probes,
                clips,
                seeds=options.seeds,
                paraphrases=options.paraphrases,
                told=lambda row: print(_line(row), flush=True),
            )
        if options.json:
            with whole_file(options.json) as temporary:
                temporary.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    except UserError as error:
        print(f"kinetok: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
