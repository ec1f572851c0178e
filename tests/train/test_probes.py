"""The probes' table: its sentences are new to training, its rates count what they say, its command refuses bad input."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import kinetok
from kinetok.errors import UserError
from kinetok.motion import Motion
from kinetok.train import probes as module
from kinetok.train.data.augment import TURN_WORDS
from kinetok.train.data.store import Clip, mirror_words, read_clips
from kinetok.train.decoder import other_subjects
from kinetok.train.probes import (
    PROBES,
    Probe,
    effective_goal,
    false_alarms,
    measure,
    real_rate,
    rows,
    run_probe,
    window,
)

DATA = Path(__file__).parents[2] / "data" / "cmu"
# One clip or more of each row that has whole clips, and others: the row's name to the clips' ids.
SHOWN = {
    "stand": ["idle_001_acted_w00000"],
    "walk": ["cmu_07_04", "cmu_07_05"],
    "run": ["cmu_09_01", "cmu_09_11"],
    "jump": ["dm_jump"],
    "kick": ["cmu_135_04_w00000", "cmu_135_07_w00000"],
    "punch": ["dm_punch", "cmu_135_09_w00000"],
    "salsa": ["cmu_60_03_w00000"],
    "karate": ["cmu_135_09_w00000"],
    "sneak": ["dm_stealthy_walk0_w00000"],
}


def entries() -> Iterator[dict]:
    for path in sorted(DATA.glob("clips_*.jsonl")):
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the clips of ``SHOWN`` and the curve that a left turn is tested on."""
    wanted = {name for names in SHOWN.values() for name in names}
    turn = next(entry for entry in entries() if "someone runs forward and turns left" in entry["captions"])
    wanted.add(turn["id"])
    folder = tmp_path_factory.mktemp("probes")
    for path in DATA.glob("clips_*.jsonl"):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["id"] in wanted]
        (folder / path.name).write_text("\n".join(lines), encoding="utf-8")
        source = path.name.replace("clips_", "motions_").replace(".jsonl", ".npz")
        (folder / source).symlink_to(DATA / source)
    return folder


@pytest.fixture(scope="module")
def clips(folder: Path) -> list[Clip]:
    return read_clips(folder)


class Parrot:
    """An engine that answers every sentence with clip ``seed`` of a list, and keeps what it was asked."""

    def __init__(self, clips: list[Clip]) -> None:
        self.clips, self.asked = clips, []

    def generate(self, text: str, *, seed: int, seconds: float) -> list[Motion]:
        self.asked.append((text, seed, seconds))
        return [Motion.from_features(self.clips[seed % len(self.clips)].features, text=text)]


def test_the_rows_are_the_issues() -> None:
    assert len({probe.name for probe in PROBES}) == len(PROBES) >= 15
    assert len({probe.prompt for probe in PROBES}) == len(PROBES)
    goals = {probe.name: probe.goal for probe in PROBES if probe.goal is not None}
    assert goals == {
        **dict.fromkeys(("stand", "walk", "run"), 0.9),
        **dict.fromkeys(("jump", "hop", "salsa"), 0.8),
        **dict.fromkeys(("karate", "kick", "punch", "wave"), 0.6),
    }
    assert [probe.name for probe in PROBES if probe.sided] == ["left", "right"]


def test_training_never_sees_a_paraphrase() -> None:
    captions = {caption for entry in entries() for caption in entry["captions"]}
    captions |= {mirror_words(caption) for caption in captions}
    captions |= {
        words.format(caption=caption, side=side)
        for caption in captions
        for words in TURN_WORDS
        for side in ("left", "right")
    }
    seen = {variant.casefold() for caption in captions for variant in (caption, *other_subjects(caption))}
    assert "somebody walks forward" in seen and "a man turns left" in seen
    for probe in PROBES:
        assert len(set(probe.paraphrases)) == 5 and probe.prompt not in probe.paraphrases
        assert not [text for text in probe.paraphrases if text.casefold() in seen]


def test_paraphrases_of_sided_rows_mirror_each_other() -> None:
    left, right = rows(["left", "right"])
    assert tuple(map(mirror_words, left.paraphrases)) == right.paraphrases


def test_every_row_has_training_clips() -> None:
    training = [entry["captions"] for entry in entries() if entry["split"] == "train" and entry["kind"] != "long"]
    for probe in PROBES:
        assert any(map(probe.describes, training)), probe.name


@pytest.mark.parametrize(
    ("row", "caption", "belongs"),
    [
        ("walk", "a person walks forward", True),
        ("walk", "a person walks forward, then backward, then sideways", False),
        ("walk", "a person walks like a zombie", False),
        ("run", "a person runs and ducks underneath an obstacle", False),
        ("backwards", "A person is hanging on a bar with both hands and swinging forward and backward", False),
        ("jump", "Athlet jumping on a horizontal bar, actively swinging back and forth 3 times", False),
        ("jump", "a person jumps forward", True),
        ("kick", "a person does handstand kicks", False),
        ("kick", "someone kicks with the right foot", True),
        ("punch", "A person is doing sidewards punches like with paddle at ping-pong", False),
        ("dance", "a dancer moves to salsa music", False),
        ("left", "someone runs forward and turns left", True),
        ("left", "someone runs forward and turns right", False),
    ],
)
def test_captions_choose_the_real_clips(row: str, caption: str, belongs: bool) -> None:
    (probe,) = rows([row])
    assert probe.describes([caption]) is belongs


def test_real_clips_pass_their_row(clips: list[Clip]) -> None:
    for name, wanted in SHOWN.items():
        (probe,) = rows([name])
        own = [clip for clip in clips if clip.id in wanted]
        assert len(own) == len(wanted) and real_rate(probe, own) == (len(own), len(own)), name


def test_a_turn_counts_on_both_sides(clips: list[Clip]) -> None:
    left, right = rows(["left", "right"])
    turn = [clip for clip in clips if left.describes(clip.captions)]
    assert len(turn) == 1
    assert real_rate(left, turn) == real_rate(right, turn) == (1, 1)
    mirrored = [replace(turn[0], features=turn[0].mirrored)]
    assert real_rate(left, mirrored) == (0, 1)


def test_there_is_no_rate_without_clips(clips: list[Clip]) -> None:
    (wave,) = rows(["wave"])
    assert real_rate(wave, clips) is None
    assert effective_goal(wave, None) == 0.6


@pytest.mark.parametrize(
    ("row", "real", "goal"),
    [
        ("wave", (2, 8), 0.2),
        ("wave", (0, 8), 0.0),
        ("kick", (9, 10), 0.6),
        ("karate", (3, 4), 0.6),
        ("punch", (1, 2), 0.4),
        ("walk", (1, 2), 0.9),
        ("dribble", (1, 2), None),
    ],
)
def test_goals_follow_the_real_clips_where_the_issue_says_so(
    row: str, real: tuple[int, int], goal: float | None
) -> None:
    (probe,) = rows([row])
    assert effective_goal(probe, real) == (None if goal is None else pytest.approx(goal))


def test_false_alarms_leave_a_rows_own_clips_out(clips: list[Clip]) -> None:
    chosen = rows(["walk", "run", "stand", "kick"])
    alarms = false_alarms(chosen, clips)
    for probe in chosen:
        own = sum(probe.describes(clip.captions) for clip in clips)
        assert probe.name not in alarms[probe.name]
        assert alarms[probe.name]["all"][1] == len(clips) - own
    assert alarms["walk"]["run"] == (0, 2) and alarms["run"]["walk"] == (0, 2) and alarms["kick"]["walk"] == (0, 2)


@pytest.mark.parametrize(("frames", "first", "last"), [(200, 10, 189), (180, 0, 179), (181, 0, 179), (40, 0, 39)])
def test_the_window_is_the_middle(frames: int, first: int, last: int) -> None:
    part = window(np.arange(frames, dtype=np.float32)[:, None])
    assert (part[0, 0], part[-1, 0]) == (first, last)


def test_run_probe_asks_for_each_seed(clips: list[Clip]) -> None:
    (walk,) = rows(["walk"])
    walks = [clip.id in SHOWN["walk"] for clip in clips]
    engine = Parrot(clips)
    assert run_probe(engine, "a sentence", walk, range(len(clips))) == walks
    assert engine.asked == [("a sentence", seed, 6.0) for seed in range(len(clips))]


def test_measure_counts_prompts_and_paraphrases(clips: list[Clip]) -> None:
    told: list[dict] = []
    engine = Parrot([clip for clip in clips if clip.id in (*SHOWN["walk"], *SHOWN["run"])])
    table = measure(engine, rows(["walk", "wave"]), clips, seeds=4, paraphrases=True, told=told.append)
    assert table == told
    walk, wave = table
    assert walk["passed"] == [2, 4] and walk["paraphrases"] == [10, 20] and walk["goal"] == 0.9
    assert walk["train"] is None and walk["held_out"] == (2, 2)
    assert wave["passed"] == [0, 4] and wave["train"] is None and wave["held_out"] is None
    assert len(engine.asked) == 2 * 6 * 4
    assert measure(engine, rows(["walk"]), clips, seeds=1)[0]["paraphrases"] is None


def test_rows_are_found_by_name() -> None:
    assert rows() == PROBES
    assert [probe.name for probe in rows(["run", "stand"])] == ["run", "stand"]
    with pytest.raises(UserError, match=r"unknown probes \['fly'\]"):
        rows(["run", "fly"])


def test_the_command_prints_and_writes_the_table(
    folder: Path,
    clips: list[Clip],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kinetok, "load", lambda model: Parrot(clips))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    out = tmp_path / "table.json"
    module.main(["--data", str(folder), "--rows", "walk,run", "--seeds", "2", "--json", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["row", "walk", "run"]
    assert [row["row"] for row in json.loads(out.read_text(encoding="utf-8"))] == ["walk", "run"]
    module.main(["--data", str(folder), "--rows", "walk,run", "--real"])
    real = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"walk +none +2/2 +0/\d+ +- +0", real[1])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rows", "fly"], "unknown probes"),
        (["--seeds", "0"], "expected 1 or more"),
        (["--data", "nowhere"], "expected motion data"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.json"
    with pytest.raises(SystemExit) as caught:
        module.main([*arguments, "--json", str(out)])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and told in message and message.count("\n") == 1 and not out.exists()


def test_a_probe_is_a_plain_record() -> None:
    with pytest.raises(AttributeError):
        PROBES[0].name = "other"  # type: ignore[misc]
    assert replace(PROBES[0], goal=None).goal is None and isinstance(PROBES[0], Probe)
