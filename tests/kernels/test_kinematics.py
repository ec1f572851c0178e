"""Rotations, the heading scan and forward kinematics against plain loops in float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.kernels.kinematics import (
    forward_kinematics,
    heading_scan,
    matrix_from_6d,
    rotation_about_y,
    sixd_from_matrix,
)

PARENTS = (-1, 0, 0, 1, 3)


def rotations(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return matrix_from_6d(torch.randn(*shape, 6, generator=generator, dtype=dtype))


def orthonormal(r: torch.Tensor, tolerance: float) -> None:
    eye = torch.eye(3, dtype=r.dtype).expand_as(r)
    torch.testing.assert_close(r @ r.transpose(-1, -2), eye, atol=tolerance, rtol=0)
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(r.shape[:-2], dtype=r.dtype), atol=tolerance, rtol=0)


def test_6d_round_trip_and_degenerate_input() -> None:
    r = rotations(7, 3)
    torch.testing.assert_close(matrix_from_6d(sixd_from_matrix(r)), r)
    orthonormal(r, 1e-12)
    for bad in (torch.zeros(6), torch.tensor([1.0, 0, 0, 2, 0, 0]), torch.full((6,), 1e30)):
        assert matrix_from_6d(bad).isfinite().all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(0, 1000))
def test_heading_scan_is_the_running_product(steps: int, seed: int) -> None:
    d = rotations(2, steps, seed=seed)
    expected, running = [], torch.eye(3, dtype=d.dtype).expand(2, 3, 3)
    for t in range(steps):
        running = d[:, t] @ running
        expected.append(running)
    torch.testing.assert_close(heading_scan(d), torch.stack(expected, 1), atol=1e-10, rtol=0)


def test_heading_stays_a_rotation_over_ten_thousand_frames() -> None:
    orthonormal(heading_scan(rotations(10_000, dtype=torch.float32)), 2e-6)


def test_rotation_about_y() -> None:
    r = rotation_about_y(torch.tensor(torch.pi / 2, dtype=torch.float64))
    torch.testing.assert_close(r @ r.new_tensor([0, 0, 1]), r.new_tensor([1, 0, 0]), atol=1e-12, rtol=0)


def test_forward_kinematics_against_a_loop() -> None:
    local, root, offsets = rotations(4, 5), torch.randn(4, 3).double(), torch.randn(5, 3).double()
    positions, turned = forward_kinematics(local, root, offsets, PARENTS)
    for t in range(4):
        for joint in range(5):
            chain = [joint]
            while PARENTS[chain[-1]] >= 0:
                chain.append(PARENTS[chain[-1]])
            at, turn = root[t], local[t, 0]
            for step in chain[::-1][1:]:
                at, turn = at + turn @ offsets[step], turn @ local[t, step]
            torch.testing.assert_close(positions[t, joint], at)
            torch.testing.assert_close(turned[t, joint], turn)
