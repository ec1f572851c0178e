"""``Motion``: what it derives, and what it refuses."""

import warnings

import numpy as np
import pytest
import torch

from kinetok.errors import UserError
from kinetok.motion import Motion

EYE = np.tile(np.eye(3), (5, 22, 1, 1))
STILL = np.tile([0.0, 0.95, 0.0], (5, 1))


def test_a_standing_figure_is_upright_and_on_the_floor() -> None:
    motion = Motion(rotations=EYE, root=STILL, text="stand")
    assert motion.joints.shape == (5, 22, 3) and motion.features.shape == (5, 272) and motion.contacts.shape == (5, 4)
    assert motion.joints[0, 15, 1] > motion.joints[0, 0, 1] > motion.joints[0, 7, 1]
    assert motion.joints[0, 18, 0] > 0 > motion.joints[0, 19, 0]  # left along +X
    assert motion.duration == pytest.approx(5 / 30) and len(motion) == 5


def test_features_come_back() -> None:
    motion = Motion(rotations=EYE, root=STILL)
    again = Motion.from_features(motion.features)
    np.testing.assert_allclose(again.rotations, motion.rotations, atol=1e-6)
    np.testing.assert_array_equal(again.features, motion.features)


def test_tensors_are_taken_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rotations = torch.tensor(EYE, dtype=torch.bfloat16, requires_grad=True)
        motion = Motion(rotations=rotations, root=torch.tensor(STILL))
    assert motion.rotations.dtype == motion.root.dtype == np.float32
    np.testing.assert_array_equal(motion.root, STILL.astype(np.float32))


@pytest.mark.parametrize(
    "change",
    [
        {"rotations": EYE[:, :21]},
        {"root": STILL[:4]},
        {"rotations": EYE[:0], "root": STILL[:0]},
        {"root": STILL * np.nan},
        {"fps": 0},
        {"fps": float("nan")},
        {"offsets": np.zeros((21, 3))},
        {"root": "nowhere"},
    ],
)
def test_wrong_input_is_refused_in_one_line(change: dict) -> None:
    with pytest.raises(UserError) as error:
        Motion(**{"rotations": EYE, "root": STILL, **change})
    assert "\n" not in str(error.value)
