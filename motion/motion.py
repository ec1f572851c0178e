"""``Motion``: one clip of one character."""

from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from kinetok.errors import UserError
from kinetok.kernels.kinematics import forward_kinematics
from kinetok.motion import features as layout
from kinetok.motion.skeleton import CANONICAL_OFFSETS, FPS, JOINTS, PARENTS

Floats = NDArray[np.float32]


def _array(name: str, value: ArrayLike, *shape: int | None) -> Floats:
    if isinstance(value, torch.Tensor):  # numpy asks it for a copy in a way that torch does not know
        value = value.detach().to("cpu", torch.float32).numpy()
    try:
        array = np.array(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: expected an array of numbers, got {type(value).__name__}") from error
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape, strict=True)):
        wanted = ", ".join("T" if size is None else str(size) for size in shape)
        raise UserError(f"{name}: expected the shape [{wanted}], got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise UserError(f"{name}: expected finite numbers, got NaN or infinity")
    return array


class Motion:
    """A clip on the SMPL-22 tree: local rotations and a root path; everything else follows from them.

    rotations ``[T, 22, 3, 3]`` local (joint 0 global), root ``[T, 3]`` pelvis in metres (Y up, facing +Z at the start),
    offsets ``[22, 3]`` of the joints from their parents in the T-pose, fps frames a second, text the sentence it shows.
    Arrays are float32 and are not to be written to. Raises ``UserError`` for wrong shapes, no frames, NaN.
    """

    def __init__(
        self,
        *,
        rotations: ArrayLike,
        root: ArrayLike,
        offsets: ArrayLike = CANONICAL_OFFSETS,
        fps: float = FPS,
        text: str = "",
    ) -> None:
        self.rotations = _array("rotations", rotations, None, JOINTS, 3, 3)
        self.root = _array("root", root, len(self.rotations), 3)
        self.offsets = _array("offsets", offsets, JOINTS, 3)
        if not len(self.rotations):
            raise UserError("a motion needs at least one frame, got none")
        if not (np.isfinite(fps) and fps > 0):
            raise UserError(f"fps: expected a positive number, got {fps}")
        self.fps = float(fps)
        self.text = text

    @classmethod
    def from_features(
        cls, features: ArrayLike, *, offsets: ArrayLike = CANONICAL_OFFSETS, fps: float = FPS, text: str = ""
    ) -> Self:
        """A motion from features ``[T, 272]`` (not normalised), by the rotation route of section 5."""
        x = _array("features", features, None, layout.FEATURES)
        rotations, root = layout.rotations_from_features(x)
        motion = cls(rotations=rotations, root=root, offsets=offsets, fps=fps, text=text)
        motion.features = x
        return motion

    @classmethod
    def load(cls, path: str | Path) -> "Motion":
        """Read a motion file; the suffix says which kind (``kinetok.motion.io``)."""
        from kinetok.motion import io

        return io.load(path)

    def save(self, path: str | Path, **options: Any) -> None:
        """Write a motion file; the suffix says which kind (``kinetok.motion.io``)."""
        from kinetok.motion import io

        io.save(self, path, **options)

    @cached_property
    def features(self) -> Floats:
        """The 272 features a frame ``[T, 272]``."""
        return layout.from_motion(self.rotations, self.root, self.offsets)

    @cached_property
    def joints(self) -> Floats:
        """Joint positions ``[T, 22, 3]`` in metres, by forward kinematics."""
        rotations, root, offsets = (
            torch.from_numpy(array.astype(np.float64)) for array in (self.rotations, self.root, self.offsets)
        )
        return forward_kinematics(rotations, root, offsets, PARENTS)[0].numpy().astype(np.float32)

    @cached_property
    def contacts(self) -> NDArray[np.bool_]:
        """Feet on the floor ``[T, 4]``: left ankle, left foot, right ankle, right foot (``kinetok.motion.quality``)."""
        from kinetok.motion.quality import contacts

        return contacts(self.joints, self.fps)

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self) / self.fps

    def __len__(self) -> int:
        return len(self.rotations)

    def __repr__(self) -> str:
        return f"Motion({len(self)} frames, {self.duration:.2f} s, {self.text!r})"
