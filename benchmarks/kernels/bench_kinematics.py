"""Kinematics: features to joints and global rotations, ``python benchmarks/kernels/bench_kinematics.py --json FILE``."""

import torch
from harness import Bench, Case, main, pytest_entry

from kinetok.kernels.kinematics import pose_from_features, reference
from kinetok.motion.skeleton import CANONICAL_OFFSETS, JOINTS, PARENTS


def build(size: tuple[int, int], device: torch.device) -> Case:
    clips, frames = size
    # Real clips turn by small steps: random ones would measure the same work on headings that nobody walks.
    x = torch.randn(clips, frames, 8 + 12 * JOINTS, device=device)
    x[..., 2:8] = x.new_tensor([1, 0, 0, 0, 1, 0]) + 0.05 * x[..., 2:8]
    x[..., :2] *= 0.03
    offsets = torch.tensor(CANONICAL_OFFSETS, device=device)

    def ours(x: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pose_from_features(x, offsets, PARENTS)

    def eager(x: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.pose_from_features(x, offsets, PARENTS)

    read = 8 + 2 + 6 * JOINTS  # positions and velocities are not looked at, but for the root's height
    return Case(
        args=(x, offsets), ours=ours, eager=eager, moved=4 * clips * frames * (read + 12 * JOINTS), tolerance=1e-4
    )


KINEMATICS = Bench(
    "pose_from_features",
    {"one clip of 6 s": (1, 180), "64 clips of 6 s": (64, 180), "1024 clips of 10 s": (1024, 300)},
    build,
    cpu=("one clip of 6 s", "64 clips of 6 s"),
)
test_kinematics = pytest_entry(KINEMATICS)

if __name__ == "__main__":
    main(KINEMATICS)
