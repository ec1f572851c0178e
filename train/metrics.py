"""Measures of text-to-motion in an evaluator's space (section 7). All arithmetic is float64.

Embeddings are arrays ``[N, d]``. MPJPE, acceleration, jerk and foot measures are in ``kinetok.motion.quality``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kinetok.errors import UserError

Doubles = NDArray[np.float64]
Random = np.random.Generator | np.random.RandomState

POOL = 32
TOP = 3
DRAWS, FEW_DRAWS, MANY = 300, 100, 300  # of the reference's diversity; FEW where there are at most MANY samples
PAIRS = 10


def _embeddings(x: ArrayLike, name: str, least: int = 1) -> Doubles:
    array = np.asarray(x, dtype=np.float64)
    if array.ndim != 2 or len(array) < least or not array.shape[1]:
        raise UserError(f"{name}: expected embeddings [N, d] with N >= {least}, got the shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise UserError(f"{name}: expected finite embeddings, got NaN or infinity")
    return array


def distances(a: ArrayLike, b: ArrayLike) -> Doubles:
    """Euclidean distance of every row of a to every row of b ``[N, M]``.

    By differences: the reference's |a|^2 + |b|^2 - 2ab falls below zero for equal rows, whose root is NaN.
    """
    x, y = _embeddings(a, "a"), _embeddings(b, "b")
    if x.shape[1] != y.shape[1]:
        raise UserError(f"expected embeddings of one width, got {x.shape[1]} and {y.shape[1]}")
    return np.stack([np.linalg.norm(y - row, axis=-1) for row in x])


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Hits in the first 1, 2 and 3 of ``of`` texts, and the summed distance of the true pairs."""

    hits: tuple[int, ...]
    total: float
    of: int

    @property
    def precision(self) -> tuple[float, ...]:
        """R-precision@1, @2, @3."""
        return tuple(count / self.of for count in self.hits)

    @property
    def matching(self) -> float:
        """Matching score: mean distance of the true pairs."""
        return self.total / self.of


def retrieval(texts: ArrayLike, motions: ArrayLike, pool: int = POOL) -> Retrieval:
    """R-precision and matching score of pairs in order, in pools of ``pool``; an incomplete last pool is left out.

    A motion as near as the true one counts as nearer: embeddings that are all alike must not look perfect.
    """
    x, y = _embeddings(texts, "texts"), _embeddings(motions, "motions")
    if len(x) != len(y) or len(x) < pool or pool < 1:
        raise UserError(f"retrieval in pools of {pool} needs as many motions as texts, got {len(x)} and {len(y)}")
    hits, total, of = np.zeros(TOP, dtype=np.int64), 0.0, len(x) // pool * pool
    for first in range(0, of, pool):
        d = distances(x[first : first + pool], y[first : first + pool])
        true = d.diagonal()
        rank = (d <= true[:, None]).sum(1) - 1
        hits += [(rank < k).sum() for k in range(1, TOP + 1)]
        total += true.sum()
    return Retrieval(tuple(int(count) for count in hits), float(total), of)


def _centred(x: Doubles) -> Doubles:
    """C ``[N, d]`` with C^T C the covariance over n - 1."""
    return (x - x.mean(0)) / (len(x) - 1) ** 0.5


def fid(real: ArrayLike, generated: ArrayLike) -> float:
    """Fréchet distance of two sets, |m1 - m2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)), covariances over n - 1 (section 7).

    With S = R^T R the last trace is the sum of the singular values of R1 R2^T: no matrix square root, so it is real, finite
    and exact where a covariance has no full rank too. Never below 0.
    """
    x, y = _embeddings(real, "real", 2), _embeddings(generated, "generated", 2)
    if x.shape[1] != y.shape[1]:
        raise UserError(f"expected embeddings of one width, got {x.shape[1]} and {y.shape[1]}")
    r1, r2 = (np.asarray(np.linalg.qr(_centred(z), mode="r"), dtype=np.float64) for z in (x, y))
    crossed = np.linalg.svd(r1 @ r2.T, compute_uv=False).sum()
    gap = np.square(x.mean(0) - y.mean(0)).sum()
    return max(0.0, float(gap + np.square(r1).sum() + np.square(r2).sum() - 2 * crossed))


@dataclass(frozen=True, slots=True)
class Projection:
    """Onto the main directions of a set: mean ``[d]``, basis ``[d, k]``."""

    mean: Doubles
    basis: Doubles

    @classmethod
    def principal(cls, real: ArrayLike, k: int) -> "Projection":
        """The ``k`` directions in which a real set varies most."""
        x = _embeddings(real, "real", 2)
        if not 1 <= k <= min(x.shape[1], len(x) - 1):
            raise UserError(f"expected 1 to {min(x.shape[1], len(x) - 1)} directions of {len(x)} samples, got {k}")
        return cls(x.mean(0), np.linalg.svd(_centred(x), full_matrices=False)[2][:k].T)

    def __call__(self, x: ArrayLike) -> Doubles:
        return (_embeddings(x, "x") - self.mean) @ self.basis


def _mean_distance(a: Doubles, b: Doubles) -> float:
    return float(np.linalg.norm(a - b, axis=-1).mean())


def diversity(x: ArrayLike, rng: Random, draws: int | None = None) -> float:
    """Mean distance of two independent draws of ``draws`` samples, each without repeats (section 7).

    None is the reference's number: 300, or 100 of at most 300 samples; a set that has fewer than that draws half of it.
    """
    samples = _embeddings(x, "x", 2)
    count = len(samples)
    usual = FEW_DRAWS if count <= MANY else DRAWS
    draws = (usual if count >= usual else count // 2) if draws is None else draws
    if not 1 <= draws <= count:
        raise UserError(f"diversity: expected 1 to {count} draws of {count} samples, got {draws}")
    first, second = (rng.choice(count, draws, replace=False) for _ in range(2))
    return _mean_distance(samples[first], samples[second])


def multimodality(x: ArrayLike, rng: Random, pairs: int = PAIRS) -> float:
    """Mean distance of ``pairs`` pairs of the samples of one text, over embeddings ``[texts, samples, d]`` (section 7).

    The two draws are independent, each without repeats, so a pair may be one sample twice, as in the reference.
    """
    samples = np.asarray(x, dtype=np.float64)
    if samples.ndim != 3 or not samples.size or not np.isfinite(samples).all():
        raise UserError(f"expected finite embeddings [texts, samples, d], got the shape {list(samples.shape)}")
    count = samples.shape[1]
    if not 1 <= pairs <= count:
        raise UserError(f"multimodality: expected 1 to {count} pairs of {count} samples, got {pairs}")
    first, second = (rng.choice(count, pairs, replace=False) for _ in range(2))
    return _mean_distance(samples[:, first], samples[:, second])


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over repeats and where its middle 95 % (or another share) lie."""

    mean: float
    low: float
    high: float
    repeats: int


def interval(
    values: Sequence[float], kind: Literal["percentile", "normal"] = "percentile", level: float = 0.95
) -> Interval:
    """percentile: the spread of the repeats themselves; normal: of their mean, mean +- z s / sqrt(n), as papers give it."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise UserError(f"expected a list of finite values, got the shape {list(x.shape)}")
    if kind not in ("percentile", "normal") or not 0 < level < 1:
        raise UserError(f"expected kind percentile or normal and a level between 0 and 1, got {kind!r} and {level}")
    mean = float(x.mean())
    if kind == "percentile":
        low, high = np.quantile(x, [(1 - level) / 2, (1 + level) / 2])
        return Interval(mean, float(low), float(high), len(x))
    z = NormalDist().inv_cdf((1 + level) / 2)
    half = z * float(x.std(ddof=1)) / len(x) ** 0.5 if len(x) > 1 else 0.0
    return Interval(mean, mean - half, mean + half, len(x))


def rate(hits: int, of: int, level: float = 0.95) -> Interval:
    """A share of yes-or-no trials with its Wilson score interval, which stays sensible at none and at all."""
    if not 0 <= hits <= of or of < 1 or not 0 < level < 1:
        raise UserError(
            f"expected 0 to all hits of at least one trial and a level within 0 to 1, got {hits}, {of}, {level}"
        )
    z = NormalDist().inv_cdf((1 + level) / 2)
    p, weight = hits / of, 1 + z * z / of
    centre, half = p + z * z / (2 * of), z * (p * (1 - p) / of + z * z / (4 * of * of)) ** 0.5
    # Clipped at p too: at none and at all rounding would put an end on the wrong side of it.
    return Interval(p, min(p, max(0.0, (centre - half) / weight)), max(p, min(1.0, (centre + half) / weight)), of)
