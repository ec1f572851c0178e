"""Another frame rate: rotations along the arc, positions along the chord."""

import numpy as np
from numpy.typing import NDArray


def rotation_vectors(rotations: NDArray) -> NDArray[np.float64]:
    """Rotation matrices ``[..., 3, 3]`` to rotation vectors ``[..., 3]`` in radians."""
    q = quaternions(rotations)
    q = np.where(q[..., :1] < 0, -q, q)
    size = np.linalg.norm(q[..., 1:], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(size, q[..., :1])
    return q[..., 1:] * np.where(size > 1e-9, angle / np.maximum(size, 1e-9), 2.0)


def quaternions(rotations: NDArray) -> NDArray[np.float64]:
    """Rotation matrices ``[..., 3, 3]`` to unit quaternions ``[..., 4]``, x y z last, of either sign."""
    r = np.asarray(rotations, dtype=np.float64)
    m = {(i, j): r[..., i, j] for i in range(3) for j in range(3)}
    trace = m[0, 0] + m[1, 1] + m[2, 2]
    rows = np.stack(
        [
            np.stack([1 + trace, m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]], -1),
            np.stack([m[2, 1] - m[1, 2], 1 + 2 * m[0, 0] - trace, m[0, 1] + m[1, 0], m[0, 2] + m[2, 0]], -1),
            np.stack([m[0, 2] - m[2, 0], m[0, 1] + m[1, 0], 1 + 2 * m[1, 1] - trace, m[1, 2] + m[2, 1]], -1),
            np.stack([m[1, 0] - m[0, 1], m[0, 2] + m[2, 0], m[1, 2] + m[2, 1], 1 + 2 * m[2, 2] - trace], -1),
        ],
        -2,
    )
    best = np.argmax(np.diagonal(rows, axis1=-2, axis2=-1), -1)
    q = np.take_along_axis(rows, best[..., None, None], -2)[..., 0, :]
    return q / np.linalg.norm(q, axis=-1, keepdims=True)


def matrices(q: NDArray) -> NDArray[np.float64]:
    """Unit quaternions ``[..., 4]`` (w x y z) to rotation matrices ``[..., 3, 3]``."""
    w, x, y, z = np.moveaxis(np.asarray(q, dtype=np.float64), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def resample(rotations: NDArray, root: NDArray, fps: float, target: float) -> tuple[NDArray, NDArray]:
    """Rotations ``[T, J, 3, 3]`` and root ``[T, 3]`` at ``fps`` to frames at ``target`` over the same time."""
    frames = len(root)
    if abs(fps - target) < 1e-2 or frames == 1:
        return rotations, root
    times = np.arange(int((frames - 1) * target / fps + 1e-6) + 1) * fps / target
    low = np.minimum(times.astype(int), frames - 2)
    share = (times - low)[:, None]
    q = quaternions(rotations)
    a, b = q[low], q[low + 1]
    dot = (a * b).sum(-1, keepdims=True)
    b, dot = np.where(dot < 0, -b, b), np.abs(dot).clip(max=1.0)
    angle = np.arccos(dot)
    sine = np.sin(angle)
    near = sine < 1e-6
    safe = np.where(near, 1.0, sine)
    first = np.where(near, 1 - share[..., None], np.sin((1 - share[..., None]) * angle) / safe)
    second = np.where(near, share[..., None], np.sin(share[..., None] * angle) / safe)
    mixed = first * a + second * b
    mixed /= np.linalg.norm(mixed, axis=-1, keepdims=True)
    return matrices(mixed), root[low] * (1 - share) + root[low + 1] * share
