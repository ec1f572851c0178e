"""Results of an evaluation on disk, and the page and pictures made from them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kinetok.errors import UserError
from kinetok.files import whole_file
from kinetok.model.tensor_files import parse_json
from kinetok.train.charts import Bar, Group, bar_chart
from kinetok.train.evaluate import FORMAT, VERSION

TITLE = "# Evaluation"  # by which a page is known
COLUMNS = {
    "r_precision_1": ("R@1", "up", 3),
    "r_precision_2": ("R@2", "up", 3),
    "r_precision_3": ("R@3", "up", 3),
    "matching": ("matching score", "down", 3),
    "fid": ("FID", "down", 3),
    "diversity": ("diversity", "near real", 3),
    "multimodality": ("multimodality", "-", 3),
    "mpjpe_mm": ("MPJPE by positions, mm", "down", 1),
    "mpjpe_rotations_mm": ("MPJPE by rotations, mm", "down", 1),
    "acceleration_mean_mm": ("mean acceleration, mm/frame²", "near real", 2),
    "acceleration_max_mm": ("max acceleration, mm/frame²", "near real", 2),
    "jerk": ("jerk, m/s³", "near real", 1),
    "foot_skate_cm_s": ("foot skate, cm/s", "down", 1),
    "penetration_cm": ("penetration, cm", "down", 2),
}
RETRIEVAL = ("r_precision_1", "r_precision_2", "r_precision_3", "matching", "fid", "diversity", "multimodality")
NOTES = {
    "real": "FID is of a resample of these clips against all of them: what the same clips score.",
    "train": "For scale: other people, other shares of actions. The evaluator was trained on these clips.",
    "tokenizer": "The test clips, encoded and decoded by the model's tokenizer.",
    "model": "Clips that the model makes of the test captions.",
    "retrieval": "No model: the training clip whose caption is nearest to the test caption by MiniLM.",
}


def read_result(path: str | Path) -> dict[str, Any]:
    """A results file. ``UserError`` when it is none, or of another version."""
    try:
        result = parse_json(Path(path).read_bytes(), path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if result.get("format") != FORMAT or result.get("version") != VERSION:
        got = f"{str(result.get('format'))[:40]!r} version {str(result.get('version'))[:20]!r}"
        raise UserError(f"{path}: expected results of the form {FORMAT!r} version {VERSION}, got {got}")
    return result


def check_target(path: str | Path) -> None:
    """``UserError`` when ``path`` is there and holds anything but results of this version, which nobody wants to lose."""
    if Path(path).exists():
        try:
            read_result(path)
        except UserError as error:
            raise UserError(
                f"{error}; nothing was overwritten: move it away or name another file with --out"
            ) from error


def check_page(path: str | Path) -> None:
    """``UserError`` when ``path`` is there and is no earlier page, a results file given by mistake for example."""
    try:
        if Path(path).exists() and not Path(path).read_bytes().startswith(TITLE.encode()):
            raise UserError(f"{path}: expected an earlier page or no file, got another one; nothing was overwritten")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_result(result: Mapping[str, Any], path: str | Path) -> None:
    """Write the results, whole or not at all."""
    check_target(path)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_page(result: Mapping[str, Any], path: str | Path) -> list[Path]:
    """Write the page and, in ``images/`` beside it, its charts; returns the files. They hold the numbers of ``result``."""
    path = Path(path)
    check_page(path)
    try:
        charts = {f"images/{path.stem}_retrieval.svg": _retrieval_chart(result)}
        if result["probes"]:
            charts[f"images/{path.stem}_probes.svg"] = _probe_chart(result)
        text = page(result, list(charts))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        raise UserError(f"the results lack something of version {VERSION}: {error!r}"[:200]) from error
    files = {path.parent / name: chart for name, chart in charts.items()} | {path: text}
    for target, content in files.items():
        with whole_file(target) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return list(files)


def page(result: Mapping[str, Any], charts: list[str]) -> str:
    """The results as Markdown; ``charts`` are the paths of its pictures."""
    settings, data, model, judge = (result[name] for name in ("settings", "data", "model", "evaluator"))
    physical = [name for name in COLUMNS if name not in RETRIEVAL]
    repeats, samples, pool = settings["repeats"], settings["samples"], result["pool"]
    clips, half, pairs = data["test_clips"], result["drawn"] // 2, min(settings["pairs"], samples)
    length = "its end token decides" if settings["seconds"] is None else f"{settings['seconds']:g} s"
    training = {name: value for name, value in model["provenance"].items() if name != "data"}
    smoke = "**A smoke run over few clips: these figures mean nothing.**\n\n" if settings["most_clips"] else ""
    return f"""{TITLE}

{smoke}Made by `kinetok evaluate default` (kinetok {result["kinetok"]}, commit {result["commit"]}); the numbers are those
of its results file. Each is a mean and, in brackets, the middle 95 % of {repeats} resamplings.

## How to read it
- **The test split is small**: {clips} clips of people whom no training clip shows, most of them standing or walking, with
  {data["test_captions"]} distinct captions, of which {data["test_captions_in_train"]} also occur in training.
- **R-precision and matching score**: pools of {pool} distinct captions, by chance R@1 is {1 / pool:.3f}. Captions that say
  the same in other words count as wrong, so real clips do not reach 1 either.
- **FID**: on the {result["dimensions"]} main directions of the real training clips, {result["drawn"]} clips against
  {clips}. So few samples raise it: compare it within this table only.
- **Diversity**: two draws of {half}. **Multimodality**: {samples} clips of each caption, {pairs} of them against {pairs}.
- The evaluator's space is the unit sphere: distances are from 0 to 2, and none compares with the paper's.
- **Clips of the model**: {samples} seeds of each caption, from seed {settings["seed"]}; length: {length}.

## Text and motion
{_table(result["rows"], RETRIEVAL)}
{_row_notes(result["rows"])}
![R-precision of each row]({charts[0]})

## Physics
Joints by forward kinematics, as files are written; acceleration relative to the pelvis.

{_table(result["rows"], physical)}
{_beside_real(result["rows"])}
{_probes(result, charts)}## Where it comes from
- Model: {model["model"]}, {model["parameters"]:,} parameters, SHA-256 {model["sha256"][:16]}; sampling:
  {_plain(model["sampling"])}.
- Its training: {_plain(training)}.
- Evaluator: recipe {judge["recipe"]}, seed {judge["seed"]}, step {judge["step"]}, commit {judge["commit"]}; the nearest of the
  recordings it was not trained on fits a caption in {judge["held_out"]["top1"]:.0%} of cases (mean over labels).
- Machine: {_plain(result["machine"])}.
"""


def _plain(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "not given"


def _cell(figure: Mapping[str, float] | None, digits: int) -> str:
    if figure is None:
        return "-"
    mean, low, high = (f"{figure[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _table(rows: list[Any], names: Any) -> str:
    heads = [f"{COLUMNS[name][0]} {_arrow(COLUMNS[name][1])}".strip() for name in names]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for row in rows:
        cells = [_cell(row["figures"][name], COLUMNS[name][2]) for name in names]
        lines.append(f"| {row['title']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _arrow(direction: str) -> str:
    return {"up": "↑", "down": "↓"}.get(direction, "")


def _row_notes(rows: list[Any]) -> str:
    return "\n".join(f"- {row['title']}: {NOTES[row['name']]}" for row in rows) + "\n"


def _beside_real(rows: list[Any]) -> str:
    """How jerk and foot skate of each row compare with those of the first, the real clips of the split."""
    real = rows[0]["figures"]
    lines = ["| beside real test clips | jerk | foot skate |", "|---|---|---|"]
    for row in rows[1:]:
        cells = [
            f"{row['figures'][name]['mean'] / real[name]['mean']:.2f} x" if real[name]["mean"] else "-"
            for name in ("jerk", "foot_skate_cm_s")
        ]
        lines.append(f"| {row['title']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _counts(counts: list[int] | None) -> str:
    return "none" if counts is None else f"{counts[0]}/{counts[1]} ({counts[0] / counts[1]:.2f})"


def _probes(result: Mapping[str, Any], charts: list[str]) -> str:
    if not result["probes"]:
        return ""
    settings = result["settings"]
    lines = [
        "| row | prompt | goal | passed | paraphrases | real training clips | held-out subjects |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["probes"]:
        goal = "-" if row["goal"] is None else f"{row['goal']:.2f}"
        asked = "not run" if row["paraphrases"] is None else _counts(row["paraphrases"])
        cells = [row["row"], row["prompt"], goal, _counts(row["passed"]), asked]
        lines.append(f"| {' | '.join([*cells, _counts(row['train']), _counts(row['held_out'])])} |")
    table = "\n".join(lines)
    seeds, seconds = settings["probe_seeds"], settings["probe_seconds"]
    return f"""## Probes
Does the motion do what the sentence says? Seeds a sentence: {seeds}, of {seconds:g} s, judged by the joints alone. Beside
them the same test on real clips with such captions ("none": there is no such clip). Paraphrases are five wordings that
training never saw. The whiskers of the chart are Wilson's 95 % intervals.

{table}

![Pass rates of the probes]({charts[1]})

"""


def _bar(figure: Mapping[str, float] | None) -> Bar | None:
    return None if figure is None else Bar(figure["mean"], figure["low"], figure["high"])


def _retrieval_chart(result: Mapping[str, Any]) -> str:
    names = [f"r_precision_{k}" for k in (1, 2, 3)]
    groups = [Group(row["title"], [_bar(row["figures"][name]) for name in names]) for row in result["rows"]]
    title = f"R-precision in pools of {result['pool']} captions"
    return bar_chart(title, ["@1", "@2", "@3"], groups, 1.0)


def _probe_chart(result: Mapping[str, Any]) -> str:
    groups = [
        Group(row["row"], [_bar(row[f"{name}_rate"]) for name in ("passed", "paraphrases", "train")], row["goal"])
        for row in result["probes"]
    ]
    return bar_chart("Share of clips that pass", ["model", "its paraphrases", "real clips"], groups, 1.0, "goal")
