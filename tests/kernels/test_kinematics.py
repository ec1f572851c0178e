"""Rotations, the heading scan and forward kinematics against plain loops in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.kernels.kinematics import (
    forward_kinematics,
    heading_scan,
    local_pose,
    matrix_from_6d,
    pose_from_features,
    reference,
    rotation_about_y,
    sixd_from_matrix,
)
from kinetok.kernels.ops import DECOMPOSITIONS

PARENTS = (-1, 0, 0, 1, 3)
CHAIN = (-1, 0, 1, 2, 3, 4, 5, 6, 7)
SMPL = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19)
OP = torch.ops.kinetok.pose_from_features.default


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


def features(*shape: int, parents=PARENTS, dtype=torch.float32, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Random features and offsets: far from any motion, with headings that tilt."""
    torch.manual_seed(0)
    x = torch.randn(*shape, 8 + 12 * len(parents)).to(device, dtype)
    return x, torch.randn(len(parents), 3).to(device, dtype)


def loop(x: torch.Tensor, offsets: torch.Tensor, parents) -> tuple[torch.Tensor, torch.Tensor]:
    """Joints and global rotations of one clip ``[T, 8 + 12 J]`` as section 5 writes them, frame by frame in float64."""
    x, offsets, count = x.double(), offsets.double(), len(parents)
    heading, at = torch.eye(3, dtype=x.dtype), torch.zeros(3, dtype=x.dtype)
    joints, turned = [], []
    for frame in x:
        step = heading.T @ torch.stack((frame[0], frame.new_zeros(()), frame[1]))
        at = at + step * step.new_tensor([1, 0, 1])
        heading = matrix_from_6d(frame[2:8]) @ heading
        local = matrix_from_6d(frame[8 + 6 * count :].unflatten(0, (count, 6)))
        places, turns = [torch.stack((at[0], frame[9], at[2]))], [heading.T @ local[0]]
        for joint in range(1, count):
            places.append(places[parents[joint]] + turns[parents[joint]] @ offsets[joint])
            turns.append(turns[parents[joint]] @ local[joint])
        joints.append(torch.stack(places))
        turned.append(torch.stack(turns))
    return torch.stack(joints), torch.stack(turned)


@pytest.mark.parametrize("parents", [(-1,), PARENTS, CHAIN, SMPL])
@pytest.mark.parametrize("shape", [(1,), (17,), (2, 3), (2, 2, 4)])
def test_pose_against_a_loop(shape, parents):
    x, offsets = features(*shape, parents=parents, dtype=torch.float64)
    joints, turned = pose_from_features(x, offsets, parents)
    for clip, places, turns in zip(
        x.flatten(0, -3) if x.ndim > 2 else x[None],
        joints.reshape(-1, *joints.shape[-3:]),
        turned.reshape(-1, *turned.shape[-4:]),
        strict=True,
    ):
        wanted = loop(clip, offsets, parents)
        torch.testing.assert_close(places, wanted[0], atol=1e-10, rtol=0)
        torch.testing.assert_close(turns, wanted[1], atol=1e-10, rtol=0)
    rotations, root = local_pose(x)
    torch.testing.assert_close(root, joints[..., 0, :])
    torch.testing.assert_close(rotations[..., 0, :, :], turned[..., 0, :, :])


@pytest.mark.parametrize(
    ("shape", "parents", "dtype"),
    [
        ((1, 1), (-1,), torch.float32),
        ((2, 9), PARENTS, torch.float64),
        ((3, 5), CHAIN, torch.float32),
        ((1, 140), SMPL, torch.float32),  # the scan goes on in a second block
    ],
)
def test_kernels_against_float64(launcher, device, shape, parents, dtype):
    x, offsets = features(*shape, parents=parents, dtype=dtype, device=device)
    got = launcher("kinematics").pose_from_features(x, offsets, parents)
    wanted = reference.pose_from_features(x.double(), offsets.double(), parents)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == dtype and one.is_contiguous()
        torch.testing.assert_close(one.double(), other, atol=2e-5 if dtype == torch.float32 else 1e-12, rtol=1e-6)


def test_kernels_on_unusual_input(launcher, device):
    kernels = launcher("kinematics")
    x, offsets = features(2, 4, device=device)
    x[0, 1, 2:8], x[0, 2, -6:], x[1, 3, 2:8] = 0, 1e30, torch.tensor([1.0, 0, 0, 2, 0, 0])
    assert all(value.isfinite().all() for value in kernels.pose_from_features(x, offsets, PARENTS))
    wide = torch.stack((x, x), dim=-1)[..., 0]  # no two numbers are adjacent
    for one, other in zip(
        kernels.pose_from_features(wide, offsets, PARENTS), kernels.pose_from_features(x, offsets, PARENTS), strict=True
    ):
        assert torch.equal(one, other)
    for shape in ((0, 4), (3, 0)):
        joints, turned = kernels.pose_from_features(x.new_zeros(*shape, 68), offsets, PARENTS)
        assert joints.shape == (*shape, 5, 3) and turned.shape == (*shape, 5, 3, 3)


def test_half_turns_find_their_quaternion(launcher, device):
    # A half turn has w = 0: each of the other three parts in turn is the one to divide by.
    x, offsets = features(1, 4, device=device)
    x[0, :, 2:8] = torch.tensor([[1, 0, 0, 0, -1, 0], [-1, 0, 0, 0, 1, 0], [-1, 0, 0, 0, -1, 0], [1, 0, 0, 0, 1, 0]])
    got = launcher("kinematics").pose_from_features(x, offsets, PARENTS)
    for one, other in zip(got, loop(x[0].cpu(), offsets.cpu(), PARENTS), strict=True):
        torch.testing.assert_close(one[0].double().cpu(), other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("route", ["definition", "kernel"])
def test_a_character_has_the_same_bits_in_a_crowd(launcher, device, route):
    x, offsets = features(5, 6, device=device)
    pose = reference.pose_from_features if route == "definition" else launcher("kinematics").pose_from_features
    for many, one in zip(pose(x, offsets, PARENTS), pose(x[3:4], offsets, PARENTS), strict=True):
        assert torch.equal(many[3:4], one)


def test_operator_is_sound_compiles_and_exports():
    x, offsets = features(2, 6)
    torch.library.opcheck(OP, (x, offsets, list(PARENTS)))

    class Pose(torch.nn.Module):
        def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return pose_from_features(x, offsets, PARENTS)

    wanted = pose_from_features(x, offsets, PARENTS)
    torch.testing.assert_close(torch.compile(Pose(), fullgraph=True, backend="aot_eager")(x, offsets), wanted)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Pose(), (x, offsets), dynamic_shapes=({0: rows}, None))
    assert OP in {node.target for node in program.graph.nodes}
    lowered = program.run_decompositions(DECOMPOSITIONS)
    assert not any("kinetok" in str(node.target) for node in lowered.graph.nodes)
    more = features(7, 6)
    torch.testing.assert_close(lowered.module()(*more), pose_from_features(*more, PARENTS))


def test_gradients_are_those_of_finite_differences():
    x, offsets = features(3, parents=(-1, 0), dtype=torch.float64)
    pose = lambda x, offsets: pose_from_features(x, offsets, (-1, 0))  # noqa: E731
    assert torch.autograd.gradcheck(pose, (x.requires_grad_(), offsets.requires_grad_()))


def test_what_does_not_fit_is_refused():
    x, offsets = features(2, 3)
    for bad in (
        (x[..., :-1], offsets, PARENTS),
        (x[0, 0], offsets, PARENTS),
        (x, offsets[:4], PARENTS),
        (x, offsets.double(), PARENTS),
        (x.half(), offsets.half(), PARENTS),
        (x, offsets, (-1, 0, 0, 4, 3)),
        (x, offsets, (0, 0, 0, 1, 3)),
    ):
        with pytest.raises(UserError, match="expected"):
            pose_from_features(*bad)
