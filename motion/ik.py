"""Inverse kinematics of a leg: two bones, solved in closed form in float64."""

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

STRAIGHT = 0.9995  # of a leg's length: how far a leg may reach that did not reach further before
SIDEWAYS = 0.01  # metres a knee stands out of a straight leg before its own direction outweighs the shin's axis


def unit(x: Doubles) -> Doubles:
    """Directions ``[..., 3]``; a zero vector stays zero."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def swing(start: Doubles, end: Doubles) -> Doubles:
    """The smallest rotation ``[..., 3, 3]`` that turns ``start`` into the direction of ``end``, both ``[..., 3]``.

    The identity where one is zero or the two agree; opposite directions turn about an arbitrary axis across them.
    """
    a, b = unit(start), unit(end)
    cosine = (a * b).sum(-1)[..., None, None]
    x, y, z = np.moveaxis(np.cross(a, b), -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack((zero, -z, y, z, zero, -x, -y, x, zero), -1).reshape(*x.shape, 3, 3)
    turn = np.eye(3) + cross + cross @ cross / np.maximum(1 + cosine, 1e-12)
    across = unit(np.cross(a, np.where(np.abs(a[..., :1]) < 0.7, [1.0, 0.0, 0.0], [0.0, 1.0, 0.0])))
    half = 2 * across[..., :, None] * across[..., None, :] - np.eye(3)
    return np.where(cosine < -1 + 1e-9, half, turn)


def bend_leg(hip: Doubles, knee: Doubles, ankle: Doubles, target: Doubles, forward: Doubles) -> tuple[Doubles, Doubles]:
    """Turns of thigh and shank, global rotations ``[T, 3, 3]`` each, that bring the ankle to ``target``; all ``[T, 3]``.

    The leg bends in the plane it bends in, and swings as a whole from the old direction of the ankle to the new one. A
    straight leg has no plane of its own; its knee goes ``forward``, the direction in which that knee bends. A target
    that is too far is reached for with a leg of ``STRAIGHT`` of its length, or as straight as it was.
    """
    thigh, shank, line, wanted = knee - hip, ankle - knee, ankle - hip, target - hip
    upper, lower, before, after = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (thigh, shank, line, wanted))
    longest = np.maximum(before, STRAIGHT * (upper + lower))
    after = np.clip(after, np.minimum(before, np.abs(upper - lower) / STRAIGHT), longest)
    axis = unit(line)
    # Along the axis and out of it: where the knee is, and where it has to be for the ankle's new distance.
    out = thigh - axis * (thigh * axis).sum(-1, keepdims=True)
    along = (upper**2 - lower**2 + after**2) / (2 * np.maximum(after, 1e-9))
    height = np.sqrt(np.maximum(upper**2 - along**2, 0.0))
    ahead = unit(forward - axis * (forward * axis).sum(-1, keepdims=True))
    side = unit(out + SIDEWAYS * ahead)
    out = height * unit(out + (height - np.linalg.norm(out, axis=-1, keepdims=True)) * side)
    bent = axis * along + out
    whole = swing(line, wanted)
    return whole @ swing(thigh, bent), whole @ swing(shank, axis * after - bent)
