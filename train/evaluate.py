"""The protocol of section 7 on a small set: real clips, the tokenizer, a model and a baseline, with intervals."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinetok import __version__
from kinetok.errors import UserError
from kinetok.model.text_minilm import MiniLM
from kinetok.motion.features import FEATURES
from kinetok.runtime import Engine
from kinetok.runtime.bench.machine import commit, machine
from kinetok.train import metrics
from kinetok.train.clip_cache import CachedEngine
from kinetok.train.data.store import Clip
from kinetok.train.evaluator import SmallEvaluator
from kinetok.train.probes import PROBES, SECONDS, Probe, measure
from kinetok.train.reconstruction import paired, physical, reconstruct

FORMAT, VERSION = "kinetok-evaluation", 1
LEAST_POOL = 4  # captions; below, R-precision@3 says nothing
MOST_FRAMES = 300
Told = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """samples: clips the model makes of each caption. repeats: resamplings behind each interval, from ``seed``.

    pool: distinct captions in a pool of R-precision, fewer where the split has fewer. dimensions: of the projection for
    FID. seconds: of the model's clips; None lets its end token decide. probe_seeds: clips a sentence of the probes.
    """

    split: str = "test"
    seed: int = 0
    repeats: int = 100
    samples: int = 20
    pairs: int = 10
    pool: int = metrics.POOL
    dimensions: int = 16
    seconds: float | None = None
    most_clips: int | None = None
    probe_seeds: int = 32
    probes: tuple[Probe, ...] = field(default=PROBES, repr=False)
    paraphrases: bool = True


def quick() -> Settings:
    """A minute's smoke run: its figures mean nothing."""
    return Settings(
        repeats=5, samples=2, pairs=1, pool=8, seconds=1.0, most_clips=12, probe_seeds=1,
        probes=PROBES[:2], paraphrases=False,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """One clip: its embedding ``[d]`` and its physical figures by name."""

    embedding: NDArray[np.float32]
    figures: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Clips to judge: for clip i of ``captions`` and one of its captions, ``pick`` gives a sample.

    several: samples of each caption ``[captions, samples, d]`` where the row has several.
    """

    name: str
    title: str
    captions: Sequence[tuple[str, ...]]
    pick: Callable[[int, str, np.random.Generator], Sample]
    several: NDArray[np.float32] | None = None


def check_clips(clips: Sequence[Clip], split: str) -> list[Clip]:
    """The clips of a split. ``UserError`` naming the clip for a repeated id, no caption, a wrong width, NaN."""
    seen = set()
    for clip in clips:
        if clip.id in seen:
            raise UserError(f"the clip id {clip.id!r} occurs twice")
        seen.add(clip.id)
        if not clip.captions:
            raise UserError(f"clip {clip.id!r}: expected at least one caption, got none")
        if clip.features.ndim != 2 or clip.features.shape[1] != FEATURES or not len(clip.features):
            raise UserError(f"clip {clip.id!r}: expected [T, {FEATURES}] features, got {list(clip.features.shape)}")
        if not np.isfinite(clip.features).all():
            frame = int(np.flatnonzero(~np.isfinite(clip.features).all(1))[0])
            raise UserError(f"clip {clip.id!r}: expected finite features, got NaN or infinity in frame {frame}")
    chosen = [clip for clip in clips if clip.split == split]
    if not chosen:
        there = sorted({clip.split for clip in clips})
        raise UserError(f"expected clips in the split {split!r}, found none; there are {there or 'no clips at all'}")
    return chosen


def distinct_pairs(
    captions: Sequence[tuple[str, ...]], rng: np.random.Generator, most: int | None = None
) -> list[tuple[int, str]]:
    """As many pairs (clip, caption of it) as there can be without a clip or a caption twice, at random; up to ``most``.

    A maximum matching by augmenting paths: a greedy choice would waste captions that only one clip has.
    """
    owner: dict[str, int] = {}

    def place(clip: int, tried: set[str]) -> bool:
        for caption in rng.permutation(sorted(set(captions[clip]) - tried)).tolist():
            tried.add(caption)
            if caption not in owner or place(owner[caption], tried):
                owner[caption] = clip
                return True
        return False

    for clip in rng.permutation(len(captions)).tolist():
        if len(owner) == most:
            break
        place(clip, set())
    return [(clip, caption) for caption, clip in owner.items()]


def _pool_size(sets: Mapping[str, Sequence[tuple[str, ...]]], most: int) -> int:
    """Distinct captions in a pool of R-precision: ``most``, or all that each of the named sets of clips has.

    ``UserError`` where they are fewer than ``LEAST_POOL``.
    """
    sizes = {name: len(distinct_pairs(captions, np.random.default_rng(0))) for name, captions in sets.items()}
    name = min(sizes, key=sizes.__getitem__)
    size = min(most, sizes[name])
    if size < LEAST_POOL:
        raise UserError(f"expected at least {LEAST_POOL} distinct captions of the clips {name!r}, got {size}")
    return size


def _sample(evaluator: SmallEvaluator, features: NDArray, **more: float) -> Sample:
    x = np.asarray(features, dtype=np.float64)[:MOST_FRAMES]
    return Sample(evaluator.embed_motion(x), {**physical(x), **more})


class _Steps:
    """Counts steps for the bar."""

    def __init__(self, told: Told, of: int) -> None:
        self.told, self.of, self.done, self.what = told, of, 0, ""

    def __call__(self) -> None:
        self.done += 1
        self.told(self.done, self.of, self.what)


def evaluate(
    engine: Engine,
    evaluator: SmallEvaluator,
    clips: Sequence[Clip],
    work: str | Path,
    settings: Settings | None = None,
    told: Told = lambda done, of, what: None,
) -> dict[str, Any]:
    """Every row and probe as plain JSON values. Generated clips stay in ``work``, so that a stopped run goes on.

    told is called with (steps done, of, what). Raises ``UserError`` for clips that cannot be evaluated.
    """
    chosen = settings or Settings()
    held_out = _thinned(check_clips(clips, chosen.split), chosen.most_clips)
    train = [clip for clip in clips if clip.split == "train"]
    if len(train) < 2:
        raise UserError(f"expected clips in the split train to compare with, got {len(train)}")
    train = _thinned(train, chosen.most_clips and 4 * chosen.most_clips)
    own, other = [clip.captions for clip in held_out], [clip.captions for clip in train]
    # What can be refused is, before the model makes its clips: few captions, an absent text encoder.
    _pool_size({chosen.split: own, "train": other}, chosen.pool)
    words = {text: evaluator.embed_text(text) for text in sorted({t for part in (own, other) for c in part for t in c})}
    texts = sorted({caption for captions in own for caption in captions})
    sentences = sum(1 + len(probe.paraphrases) * chosen.paraphrases for probe in chosen.probes)
    step = _Steps(told, len(train) + 2 * len(held_out) + len(texts) * chosen.samples + sentences * chosen.probe_seeds)
    cached = CachedEngine(engine, work, step)

    step.what = "real clips"
    real, known = (_all(evaluator, part, step) for part in (held_out, train))
    model = engine.model
    step.what = "tokenizer"
    rebuilt = []
    for clip in held_out:
        (result,) = reconstruct(model.tokenizer, model.mean, model.std, [clip], most_frames=MOST_FRAMES)
        rebuilt.append(_sample(evaluator, result.decoded, **paired(result.real, result.decoded)))
        step()
    step.what = "model"
    made = {text: _generated(cached, evaluator, text, chosen) for text in texts}
    nearest = _nearest(texts, train)

    rows = [
        Row(name="real", title="real test clips", captions=own, pick=lambda i, text, rng: real[i]),
        Row(name="train", title="real training clips", captions=other, pick=lambda i, text, rng: known[i]),
        Row(name="tokenizer", title="tokenizer reconstruction", captions=own,
            pick=lambda i, text, rng: rebuilt[i]),
        Row(name="model", title="model", captions=own, pick=lambda i, text, rng: _any(made[text], rng),
            several=np.array([[sample.embedding for sample in made[text]] for text in texts])),
        Row(name="retrieval", title="nearest training caption", captions=own,
            pick=lambda i, text, rng: known[_any(nearest[text], rng)]),
    ]  # fmt: skip
    figures = judge(rows, words, chosen)
    step.what = "probes"
    probes = measure(
        cached, chosen.probes, clips, seeds=chosen.probe_seeds, paraphrases=chosen.paraphrases
    )  # tells through the engine
    return {
        "format": FORMAT,
        "version": VERSION,
        "kinetok": __version__,
        "commit": commit(),
        "machine": machine(engine.model.decoder.embed.weight.device),
        "model": _about(engine, cached.digest),
        "evaluator": evaluator.metadata["provenance"],
        "settings": _plain(chosen),
        "data": {
            "test_clips": len(held_out),
            "test_captions": len(texts),
            "train_clips": len(train),
            "test_captions_in_train": len({caption for captions in other for caption in captions} & set(texts)),
        },
        **figures,
        "probes": [_with_interval(row) for row in probes],
    }


def _thinned(clips: list[Clip], most: int | None) -> list[Clip]:
    """About ``most`` of the clips, evenly taken."""
    return clips if most is None else clips[:: -(-len(clips) // most)]


def _all(evaluator: SmallEvaluator, clips: Iterable[Clip], step: _Steps) -> list[Sample]:
    samples = []
    for clip in clips:
        samples.append(_sample(evaluator, clip.features))
        step()
    return samples


def _generated(engine: Engine, evaluator: SmallEvaluator, text: str, settings: Settings) -> list[Sample]:
    seeds = range(settings.seed, settings.seed + settings.samples)
    clips = (engine.generate(text, seed=seed, seconds=settings.seconds)[0] for seed in seeds)
    return [_sample(evaluator, clip.features) for clip in clips]


def _any(options: Sequence[Any], rng: np.random.Generator) -> Any:
    return options[int(rng.integers(len(options)))]


def _nearest(texts: Sequence[str], train: Sequence[Clip]) -> dict[str, list[int]]:
    """For each sentence, the training clips with the caption whose sentence vector is nearest by MiniLM."""
    captions = sorted({caption for clip in train for caption in clip.captions})
    encoder = MiniLM(pooled_scale=1.0)
    known, asked = (np.stack([encoder.encode([text])[0][0].numpy() for text in part]) for part in (captions, texts))
    best = (asked @ known.T).argmax(1)
    return {
        text: [i for i, clip in enumerate(train) if captions[row] in clip.captions]
        for text, row in zip(texts, best, strict=True)
    }


def judge(rows: Sequence[Row], words: Mapping[str, NDArray], settings: Settings) -> dict[str, Any]:
    """The measures of each row with intervals: {"pool", "drawn", "rows": [{"name", "title", "figures"}]}.

    The first row is the real set that FID compares with, the second the one whose main directions it is projected on.
    Each repeat draws a pool of distinct captions, and as many clips as the real set has, with replacement. Diversity draws
    without, else a clip would be compared with itself.
    """
    reference = rows[0]
    pool = _pool_size({row.name: row.captions for row in rows[:2]}, settings.pool)
    basis = [rows[1].pick(i, c[0], np.random.default_rng(0)).embedding for i, c in enumerate(rows[1].captions)]
    dimensions = min(settings.dimensions, len(basis) - 1, len(basis[0]))
    project = metrics.Projection.principal(basis, dimensions)
    drawn = len(reference.captions)
    target = [reference.pick(i, c[0], np.random.default_rng(0)).embedding for i, c in enumerate(reference.captions)]
    result = []
    for row in rows:
        repeats = [
            _repeat(row, words, project, project(target), pool, [settings.seed, repeat], settings)
            for repeat in range(settings.repeats)
        ]
        figures = {
            name: None if repeats[0][name] is None else asdict(metrics.interval([one[name] for one in repeats]))
            for name in repeats[0]
        }
        result.append({"name": row.name, "title": row.title, "clips": len(row.captions), "figures": figures})
    return {"pool": pool, "drawn": drawn, "dimensions": dimensions, "rows": result}


def _repeat(
    row: Row,
    words: Mapping[str, NDArray],
    project: metrics.Projection,
    target: NDArray,
    pool: int,
    seed: list[int],
    settings: Settings,
) -> dict[str, Any]:
    # A stream each, so that rows over the same clips get the same pools and draws.
    pools, draws, picks = (np.random.default_rng([*seed, stream]) for stream in range(3))
    pairs = distinct_pairs(row.captions, pools, pool)
    found = metrics.retrieval(
        [words[text] for _, text in pairs], [row.pick(i, text, picks).embedding for i, text in pairs], pool
    )

    def take(clips: NDArray[np.int64]) -> list[Sample]:
        return [row.pick(i, _any(row.captions[i], draws), picks) for i in clips.tolist()]

    resampled = take(draws.integers(len(row.captions), size=len(target)))
    apart = take(draws.permutation(len(row.captions))[: len(target)])
    figures = {name: float(np.mean([sample.figures[name] for sample in resampled])) for name in resampled[0].figures}
    return {
        **{f"r_precision_{k}": value for k, value in enumerate(found.precision, start=1)},
        "matching": found.matching,
        "fid": metrics.fid(target, project([sample.embedding for sample in resampled])),
        "diversity": metrics.diversity([sample.embedding for sample in apart], draws, len(apart) // 2),
        "multimodality": None
        if row.several is None
        else metrics.multimodality(row.several, draws, min(settings.pairs, row.several.shape[1])),
        **{name: figures.get(name) for name in ("mpjpe_mm", "mpjpe_rotations_mm")},
        **{name: value for name, value in figures.items() if not name.startswith("mpjpe")},
    }


def _with_interval(row: Mapping[str, Any]) -> dict[str, Any]:
    counts = {name: row[name] for name in ("passed", "paraphrases", "train", "held_out")}
    rates = {f"{name}_rate": None if c is None else asdict(metrics.rate(*c)) for name, c in counts.items()}
    return {**row, **{name: None if c is None else list(c) for name, c in counts.items()}, **rates}


def _plain(settings: Settings) -> dict[str, Any]:
    values = {name: value for name, value in asdict(settings).items() if name != "probes"}
    return {**values, "probe_seconds": SECONDS}


def _about(engine: Engine, digest: str) -> dict[str, Any]:
    """What was judged; a folder's name without its place, which is nobody's business."""
    about = {**engine.describe(), "model": engine.model.directory.name, "sha256": digest}
    return {**about, "sampling": engine.model.sampling, "provenance": engine.model.provenance}
