"""Predicates on figures whose motion is known: what passes, what does not, and that place, heading and side do not matter."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.motion import measures, predicates
from kinetok.motion.skeleton import CANONICAL_OFFSETS, JOINT_NAMES, LEFT_RIGHT, PARENTS

FRAMES = 150
TIME = np.arange(FRAMES) / 30.0
GRAVITY = 9.81

PREDICATES: dict[str, Callable[[np.ndarray], bool]] = {
    name: function
    for name, function in vars(predicates).items()
    if getattr(function, "__module__", "") == predicates.__name__
}


def at(*names: str) -> list[int]:
    return [JOINT_NAMES.index(name) for name in names]


def standing(frames: int = FRAMES) -> np.ndarray:
    """Upright with hanging arms, the toe joints 3 cm above the floor."""
    rest = np.array(CANONICAL_OFFSETS)
    for joint, parent in enumerate(PARENTS[1:], start=1):
        rest[joint] += rest[parent]
    for side in ("left", "right"):
        shoulder, elbow, wrist = at(f"{side}_shoulder", f"{side}_elbow", f"{side}_wrist")
        rest[elbow] = rest[shoulder] - [0, 0.296, 0]
        rest[wrist] = rest[elbow] - [0, 0.276, 0]
    rest[:, 1] += 0.03 - rest[at("left_foot")[0], 1]
    return np.repeat(rest[None], frames, 0)


def going(speed: float) -> np.ndarray:
    x = standing()
    x[..., 2] += (speed * TIME)[:, None]
    return x


def stooped(x: np.ndarray) -> np.ndarray:
    x[:, at("head"), 1] -= 0.09
    x[:, at("head"), 2] += 0.15
    return x


def turning(angle: float) -> np.ndarray:
    """To the left by ``angle`` radians in all."""
    theta = angle * np.linspace(0, 1, FRAMES)[:, None]
    x = standing()
    px, pz = x[..., 0].copy(), x[..., 2].copy()
    x[..., 0], x[..., 2] = px * np.cos(theta) + pz * np.sin(theta), pz * np.cos(theta) - px * np.sin(theta)
    return x


def thrown(seconds: float, first: int = 60) -> np.ndarray:
    """In free flight for ``seconds``."""
    t = np.clip(TIME - TIME[first], 0, seconds)
    x = standing()
    x[..., 1] += (GRAVITY / 2 * t * (seconds - t))[:, None]
    return x


def tiptoe() -> np.ndarray:
    """The body rises by 12 cm, the toe joints by 3 cm: no flight."""
    up = np.exp(-((TIME - 2.5) ** 2) / 0.05)[:, None]
    x = standing()
    x[..., 1] += 0.12 * up
    x[:, at("left_foot", "right_foot"), 1] -= 0.09 * up
    return x


def kicking(height: float) -> np.ndarray:
    """The right ankle swings forwards to ``height`` above the left knee, the leg stretched."""
    x = standing()
    hip, knee, ankle, toe = at("right_hip", "right_knee", "right_ankle", "right_foot")
    top = height + 0.43 - 0.828  # of the ankle above the hip
    swing = np.clip(1 - np.abs(np.arange(FRAMES) - 70) / 12, 0, 1) * np.arccos(-top / 0.828)
    along = np.stack((np.zeros(FRAMES), -np.cos(swing), np.sin(swing)), -1)
    x[:, knee], x[:, ankle] = x[:, hip] + 0.396 * along, x[:, hip] + 0.828 * along
    x[:, toe] = x[:, ankle] + [0, -0.03, 0.11]
    return x


def punching(frames: float, x: np.ndarray | None = None) -> np.ndarray:
    """The left fist goes from the shoulder to the stretched arm in ``frames`` frames, and back."""
    x = standing() if x is None else x
    shoulder, elbow, wrist = at("left_shoulder", "left_elbow", "left_wrist")
    out = np.clip(1.5 - np.abs(np.arange(FRAMES) - 70) / frames, 0, 1)[:, None]
    x[:, wrist] = x[:, shoulder] + [0, -0.1, 0.15] + out * [0, 0.05, 0.38]
    x[:, elbow] = (x[:, wrist] + x[:, shoulder]) / 2 - [0, 0.1, 0]
    return x


def waving(height: float, swing: float = 0.2, hertz: float = 1.5) -> np.ndarray:
    x = standing()
    shoulder, elbow, wrist = at("right_shoulder", "right_elbow", "right_wrist")
    x[:, elbow] = x[:, shoulder] + [-0.2, 0, 0.1]
    x[:, wrist] = x[:, shoulder] + [-0.2, height, 0.15]
    x[:, wrist, 0] += swing * np.sin(2 * np.pi * hertz * TIME)
    return x


def bouncing(axis: int) -> np.ndarray:
    """The right hand before the waist swings up and down (axis 1) or forwards and back (axis 2)."""
    x = standing()
    wrist = at("right_wrist")[0]
    x[:, wrist] = x[:, 0] + [-0.25, 0.05, 0.3 if axis == 1 else 0.08]
    x[:, wrist, 1] += 0.02 * np.sin(2 * np.pi * 1.5 * TIME)
    x[:, wrist, axis] += 0.2 * np.sin(2 * np.pi * 1.5 * TIME)
    return x


def swaying(low: float = 0.0) -> np.ndarray:
    """Small quick steps to the side and back with moving arms; ``low`` lowers the body into a stance."""
    x = standing()
    legs = at("left_ankle", "left_foot", "right_ankle", "right_foot")
    x[:, [joint for joint in range(22) if joint not in legs], 1] -= low
    x[..., 0] += 0.15 * np.sin(2 * np.pi * 0.8 * TIME)[:, None]
    ends = at("left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_ankle", "right_ankle")
    for phase, joint in enumerate(ends):
        x[:, joint, 2] += 0.2 * np.sin(2 * np.pi * 0.8 * TIME + phase)
    return x


# Each motion with everything that is to pass on it; all other predicates are to refuse it.
MOTIONS: dict[str, tuple[np.ndarray, set[str]]] = {
    "still": (standing(), {"stands_still"}),
    "walk": (going(1.2), {"walks_forward"}),
    "run": (going(3.0), {"runs"}),
    "backwards": (going(-1.2), {"walks_backwards"}),
    "sneak": (stooped(going(0.4)), {"sneaks"}),
    "creep upright": (going(0.4), set()),
    "left": (turning(1.2), {"turns_left"}),
    "right": (turning(-1.2), {"turns_right"}),
    "fidget": (turning(0.3), {"stands_still"}),
    "jump": (thrown(0.5), {"jumps", "hops"}),
    "bob": (thrown(0.2), {"stands_still"}),
    "tiptoe": (tiptoe(), set()),
    "kick": (kicking(0.3), {"kicks"}),
    "low kick": (kicking(-0.1), set()),
    "punch": (punching(4), {"punches"}),
    "push": (punching(20), {"stands_still"}),
    "wave": (waving(0.25), {"waves"}),
    "wave low": (waving(-0.1), set()),
    "raised hand": (waving(0.25, swing=0.0), {"stands_still"}),
    "slow wave": (waving(0.25, hertz=0.3), {"stands_still"}),
    "dribble": (bouncing(1), {"dribbles"}),
    "swing": (bouncing(2), set()),
    "salsa": (swaying(), {"dances", "dances_salsa"}),
    "karate": (punching(4, swaying(low=0.2)), {"dances", "practices_karate", "punches"}),
}


def passing(x: np.ndarray) -> set[str]:
    return {name for name, predicate in PREDICATES.items() if predicate(x)}


@pytest.mark.parametrize("name", MOTIONS)
def test_each_motion_passes_what_it_shows_and_nothing_else(name: str) -> None:
    x, expected = MOTIONS[name]
    assert passing(x) == expected


def mirrored(x: np.ndarray) -> np.ndarray:
    y = x.copy()
    for left, right in LEFT_RIGHT:
        y[:, left], y[:, right] = x[:, right], x[:, left]
    return y * [-1, 1, 1]


@pytest.mark.parametrize("name", MOTIONS)
def test_a_mirrored_motion_only_swaps_the_sides(name: str) -> None:
    x, expected = MOTIONS[name]
    other = {"turns_left": "turns_right", "turns_right": "turns_left"}
    assert passing(mirrored(x)) == {other.get(passed, passed) for passed in expected}


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(MOTIONS)),
    angle=st.floats(-np.pi, np.pi),
    place=st.tuples(st.floats(-50, 50), st.floats(-50, 50)),
)
def test_neither_place_nor_heading_matters(name: str, angle: float, place: tuple[float, float]) -> None:
    x, expected = MOTIONS[name]
    c, s = np.cos(angle), np.sin(angle)
    moved = x @ np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]]) + [place[0], 0, place[1]]
    assert passing(moved) == expected


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
def test_a_figure_of_few_frames_stands_still_and_does_nothing_else(frames: int) -> None:
    assert passing(standing(frames)) == {"stands_still"}


@pytest.mark.parametrize("name", PREDICATES)
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda x: x[:, :21], "expected the shape"),
        (lambda x: x[0], "expected the shape"),
        (lambda x: x[:0], "at least one frame"),
        (lambda x: np.where(np.arange(len(x))[:, None, None] == 7, np.nan, x), "NaN"),
        (lambda x: np.where(np.arange(len(x))[:, None, None] == 7, np.inf, x), "infinity"),
        (lambda x: "walk", "array of numbers"),
    ],
)
def test_what_is_no_motion_is_refused(name: str, spoil: Callable, told: str) -> None:
    with pytest.raises(UserError, match=told):
        PREDICATES[name](spoil(standing(20)))


def test_travel_is_measured_in_metres_and_radians() -> None:
    x = going(1.5)
    length = 1.5 * TIME[-1]
    # The moving mean over five frames holds the ends and so takes 0.6 of a frame's step off each.
    assert measures.path(x) == pytest.approx(length - 2 * 0.6 * 1.5 / 30)
    assert measures.ahead(x) == pytest.approx(measures.path(x))
    assert measures.net_travel(x) == pytest.approx(length)
    assert measures.pace(x) == pytest.approx(1.5)
    assert measures.turned(turning(1.2)) == pytest.approx(1.2)
    assert measures.turned(turning(-9.0)) == pytest.approx(-9.0)


def test_flights_are_found_where_they_are() -> None:
    x = thrown(0.5, first=40)
    (flight,) = measures.flights(x)
    height = GRAVITY / 2 * (TIME - TIME[40]) * (0.5 - TIME + TIME[40])
    above = np.flatnonzero(height > 0.05)
    assert flight == (above[0], above[-1] + 1)
    x[:40] += [0, 1, 0]  # falls from somewhere: the first frames are no flight, since nothing took off
    assert all(first > 0 for first, _ in measures.flights(x))


@given(st.integers(1, 12), st.floats(0.02, 1.0))
def test_a_wave_of_n_periods_reverses_twice_a_period(periods: int, height: float) -> None:
    signal = height * np.sin(2 * np.pi * periods * np.linspace(0, 1, 60 * periods + 1))
    assert len(measures.reversals(signal, 0.9 * height)) == 2 * periods
    assert measures.reversals(signal, 2.1 * height) == []
