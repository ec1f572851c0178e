"""The measures of section 7: the authors' numbers, a slow oracle, and inputs that used to give NaN."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.train import metrics
from kinetok.train.losses import reconstruction_loss


@pytest.fixture(scope="module")
def arrays(golden) -> dict[str, np.ndarray]:
    with np.load(golden("metrics.npz")) as z:
        return {name: z[name] for name in z}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_fid_is_the_golden_one(arrays) -> None:
    real, gen = arrays["real"], arrays["gen"]
    assert metrics.fid(real, gen) == pytest.approx(float(arrays["fid_real_gen_f64"]), abs=1e-8)
    assert metrics.fid(real, gen) == pytest.approx(float(arrays["fid_real_gen"]), abs=1e-4)
    assert metrics.fid(real[:20], gen[:20]) == pytest.approx(float(arrays["fid_rank_deficient_20"]), abs=1e-6)
    assert metrics.fid(real, real) == pytest.approx(0, abs=1e-10)


def test_fid_against_the_matrix_square_root() -> None:
    linalg = pytest.importorskip("scipy.linalg", reason="scipy, the oracle, is not installed")
    x, y = noise(50, 7), 1.5 * noise(40, 7, seed=1) + 0.3
    s1, s2 = np.cov(x.T), np.cov(y.T)
    want = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s1 + s2 - 2 * linalg.sqrtm(s1 @ s2).real)
    assert metrics.fid(x, y) == pytest.approx(want, rel=1e-9)


@settings(deadline=None, max_examples=20)
@given(n=st.integers(2, 6), d=st.integers(1, 40), shift=st.floats(-3, 3), seed=st.integers(0, 99))
def test_fid_of_few_samples_is_finite_and_sees_a_shift(n: int, d: int, shift: float, seed: int) -> None:
    x = noise(n, d, seed=seed)
    assert metrics.fid(x, x + shift) == pytest.approx(d * shift**2, abs=1e-9)
    assert np.isfinite(metrics.fid(x, np.zeros((2, d))))


def test_retrieval_is_the_golden_one(arrays) -> None:
    for name in ("real", "gen"):
        found = metrics.retrieval(arrays["text"], arrays[name])
        assert found.of == 256 and found.hits == tuple(arrays[f"rprec_{name}_counts"])
        assert found.precision == pytest.approx(arrays[f"rprec_{name}"], rel=1e-12)
        assert found.matching == pytest.approx(float(arrays[f"matching_{name}"]), abs=1e-3)
        for group, (hits, trace) in enumerate(
            zip(arrays[f"rprec_{name}_counts_per_group"], arrays[f"matching_{name}_trace_per_group"], strict=True)
        ):
            rows = slice(32 * group, 32 * group + 32)
            part = metrics.retrieval(arrays["text"][rows], arrays[name][rows])
            assert part.hits == tuple(hits) and part.total == pytest.approx(float(trace), abs=1e-3)
    d = metrics.distances(arrays["text"][:32], arrays["gen"][:32])
    np.testing.assert_allclose(d, arrays["dist_matrix_group0"], atol=1e-3)
    first = (d <= d.diagonal()[:, None]).sum(1)[:, None] <= [1, 2, 3]
    np.testing.assert_array_equal(first, arrays["topk_group0"])


def test_pools_leave_the_rest_out_and_ties_do_not_win() -> None:
    x = noise(70, 5)
    assert metrics.retrieval(x, x).of == 64
    assert metrics.retrieval(x, x, pool=10).hits == (70, 70, 70)
    assert metrics.retrieval(x, np.ones_like(x)).hits == (0, 0, 0)


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 5), m=st.integers(1, 5), d=st.integers(1, 9), scale=st.sampled_from([1e-8, 1.0, 1e8]))
def test_distances_are_zero_for_equal_rows_and_never_nan(n: int, m: int, d: int, scale: float) -> None:
    x = scale * noise(n, d)
    y = np.concatenate((x, scale * noise(m, d, seed=1)))
    got = metrics.distances(x, y)
    assert got.shape == (n, n + m) and (got[:, :n].diagonal() == 0).all()
    want = [[np.sqrt(sum((a - b) ** 2 for a, b in zip(p, q, strict=True))) for q in y] for p in x]
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_diversity_and_multimodality_are_the_golden_ones(arrays) -> None:
    for name in ("real", "gen"):
        rng = np.random.RandomState(int(arrays["diversity_seed"]))
        got = metrics.diversity(arrays[name], rng)  # 100 draws of 256 samples
        assert got == pytest.approx(float(arrays[f"diversity_{name}"]), rel=1e-5)
    rng = np.random.RandomState(int(arrays["mm_seed"]))
    got = metrics.multimodality(arrays["mm_activation"], rng)
    assert got == pytest.approx(float(arrays["multimodality_10"]), rel=1e-5)


@settings(deadline=None, max_examples=20)
@given(n=st.integers(2, 99), seed=st.integers(0, 99))
def test_small_sets_draw_half_of_themselves(n: int, seed: int) -> None:
    x = noise(n, 3)
    first, second = np.random.default_rng(seed), np.random.default_rng(seed)
    assert metrics.diversity(x, first) == metrics.diversity(x, second, n // 2)
    assert metrics.diversity(np.ones((n, 3)), first) == 0


def test_principal_directions_come_from_the_real_set() -> None:
    real = noise(60, 6) * [5, 0.1, 3, 0.2, 0.1, 0.3]
    project = metrics.Projection.principal(real, 2)
    np.testing.assert_allclose(np.abs(project.basis[[0, 2]]), np.eye(2), atol=0.2)
    np.testing.assert_allclose(project(real).mean(0), 0, atol=1e-12)
    assert metrics.fid(project(real), project(real + np.array([0, 7, 0, 0, 0, 0]))) < 0.1
    whole = metrics.Projection.principal(real, 6)
    other = noise(50, 6, seed=1)
    assert metrics.fid(whole(real), whole(other)) == pytest.approx(metrics.fid(real, other), rel=1e-9)


def test_intervals() -> None:
    values = np.arange(101.0)
    spread = metrics.interval(values)
    assert (spread.mean, spread.low, spread.high, spread.repeats) == pytest.approx((50, 2.5, 97.5, 101))
    normal = metrics.interval(values, "normal")
    assert normal.high - 50 == pytest.approx(50 - normal.low)
    assert normal.high - 50 == pytest.approx(1.959964 * values.std(ddof=1) / 101**0.5, rel=1e-6)
    assert metrics.interval([3.0], "normal") == metrics.Interval(3.0, 3.0, 3.0, 1)


@settings(deadline=None, max_examples=30)
@given(of=st.integers(1, 60), share=st.floats(0, 1))
def test_rates_lie_where_their_trials_are_likely(of: int, share: float) -> None:
    hits = round(share * of)
    got = metrics.rate(hits, of)
    assert 0 <= got.low <= got.mean == hits / of <= got.high <= 1 and got.repeats == of
    # Wilson's ends are the shares from which the seen one is z standard deviations away.
    for end in (got.low, got.high):
        if 0 < end < 1 and end != got.mean:
            assert abs(got.mean - end) == pytest.approx(1.959964 * (end * (1 - end) / of) ** 0.5, rel=1e-5)


def test_wrong_inputs_are_named() -> None:
    x = noise(8, 4)
    for call, words in (
        (lambda: metrics.fid(x[:1], x), "N >= 2"),
        (lambda: metrics.fid(x, x[:, :3]), "one width, got 4 and 3"),
        (lambda: metrics.fid(x, x * np.nan), "NaN or infinity"),
        (lambda: metrics.distances(x, x[:, :2]), "one width"),
        (lambda: metrics.retrieval(x, x), "pools of 32"),
        (lambda: metrics.retrieval(x, x[:7], pool=4), "got 8 and 7"),
        (lambda: metrics.diversity(x, np.random.default_rng(0), 9), "1 to 8 draws"),
        (lambda: metrics.multimodality(x, np.random.default_rng(0)), r"\[texts, samples, d\]"),
        (lambda: metrics.multimodality(x[None], np.random.default_rng(0), 9), "1 to 8 pairs"),
        (lambda: metrics.Projection.principal(x, 8), "1 to 4 directions"),
        (lambda: metrics.interval([]), "finite values"),
        (lambda: metrics.interval([1.0], level=1.0), "level"),
        (lambda: metrics.rate(3, 2), "got 3, 2"),
        (lambda: metrics.rate(0, 0), "at least one trial"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_reconstruction_losses_are_the_golden_ones(golden) -> None:
    with np.load(golden("losses.npz")) as z:
        pred, target = torch.from_numpy(z["pred"]), torch.from_numpy(z["target"])
        for distance in ("l1", "l2", "l1_smooth"):
            for part in ("motion", "vel", "acc", "acc_vel", "root"):
                got = float(reconstruction_loss(pred, target, part, distance))
                assert got == pytest.approx(float(z[f"{distance}_{part}"]), abs=1e-5), (distance, part)
    with pytest.raises(UserError, match="acc_vel"):
        reconstruction_loss(pred, target, "velocity")  # type: ignore[arg-type]
