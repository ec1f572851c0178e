"""Kinematics in Triton: a scan over time for the headings, then every frame's tree of joints at once.

The scan takes a program a character. A frame's joints lie side by side in registers, a power of two of them, and the chain of
transforms from the root to each is multiplied by pointer jumping: after k rounds a joint holds the product over its
2^k nearest ancestors. Arithmetic is in the features' dtype.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kinetok.kernels.aot import AotCase

SCAN_FRAMES, SCAN_WARPS = 128, 4
FRAMES, WARPS = 8, 4
TINY = tl.constexpr(1e-12)
HEAD = tl.constexpr(8)  # numbers of a frame before the joints' positions


@triton.jit
def _rotation(a0, a1, a2, b0, b1, b2):
    """The nine numbers, row by row, of the rotation whose first two rows are a and b, made orthonormal."""
    length = tl.maximum(tl.sqrt(a0 * a0 + a1 * a1 + a2 * a2), TINY)
    a0, a1, a2 = a0 / length, a1 / length, a2 / length
    along = a0 * b0 + a1 * b1 + a2 * b2
    b0, b1, b2 = b0 - along * a0, b1 - along * a1, b2 - along * a2
    length = tl.maximum(tl.sqrt(b0 * b0 + b1 * b1 + b2 * b2), TINY)
    b0, b1, b2 = b0 / length, b1 / length, b2 / length
    return a0, a1, a2, b0, b1, b2, a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0


@triton.jit
def _unit(w, x, y, z):
    length = tl.maximum(tl.sqrt(w * w + x * x + y * y + z * z), TINY)
    return w / length, x / length, y / length, z / length


@triton.jit
def _quaternion(m00, m01, m02, m10, m11, m12, m20, m21, m22):
    """Of the four rows of 4 q q^T, each a multiple of q, the one with the largest diagonal, as a unit quaternion."""
    d0, d1, d2, d3 = 1 + m00 + m11 + m22, 1 + m00 - m11 - m22, 1 - m00 + m11 - m22, 1 - m00 - m11 + m22
    wx, wy, wz = m21 - m12, m02 - m20, m10 - m01
    xy, xz, yz = m01 + m10, m02 + m20, m12 + m21
    w, x, y, z, best = d0, wx, wy, wz, d0
    w, x, y, z, best = (
        tl.where(d1 > best, wx, w),
        tl.where(d1 > best, d1, x),
        tl.where(d1 > best, xy, y),
        tl.where(d1 > best, xz, z),
        tl.maximum(d1, best),
    )
    w, x, y, z, best = (
        tl.where(d2 > best, wy, w),
        tl.where(d2 > best, xy, x),
        tl.where(d2 > best, d2, y),
        tl.where(d2 > best, yz, z),
        tl.maximum(d2, best),
    )
    higher = d3 > best
    w, x, y, z = tl.where(higher, wz, w), tl.where(higher, xz, x), tl.where(higher, yz, y), tl.where(higher, d3, z)
    return _unit(w, x, y, z)


@triton.jit
def _times(aw, ax, ay, az, bw, bx, by, bz):
    """The quaternion product a b: b turns first."""
    return (
        aw * bw - ax * bx - ay * by - az * bz,
        aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx,
        aw * bz + ax * by - ay * bx + az * bw,
    )


@triton.jit
def _later_times_earlier(aw, ax, ay, az, bw, bx, by, bz):
    w, x, y, z = _times(bw, bx, by, bz, aw, ax, ay, az)
    return _unit(w, x, y, z)


@triton.jit
def _last(x, at, BLOCK: tl.constexpr):
    return tl.sum(tl.where(at == BLOCK - 1, x, 0.0), 0)


@triton.jit
def heading_kernel(features_ptr, heading_ptr, steps, frames, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """heading ``[6, frames]``: the heading's quaternion w, x, y, z and the root's x, z, of characters of ``steps`` frames."""
    first = tl.program_id(0).to(tl.int64) * steps
    at = tl.arange(0, BLOCK)
    dtype = features_ptr.dtype.element_ty
    zero = tl.zeros([1], dtype).sum()
    hw, hx, hy, hz, path_x, path_z = zero + 1, zero, zero, zero, zero, zero
    for start in range(0, steps, BLOCK):
        inside = start + at < steps
        frame = features_ptr + (first + start + at) * WIDTH
        # Frames past the end do not turn and do not move.
        a0 = tl.load(frame + 2, mask=inside, other=1.0)
        a1 = tl.load(frame + 3, mask=inside, other=0.0)
        a2 = tl.load(frame + 4, mask=inside, other=0.0)
        b0 = tl.load(frame + 5, mask=inside, other=0.0)
        b1 = tl.load(frame + 6, mask=inside, other=1.0)
        b2 = tl.load(frame + 7, mask=inside, other=0.0)
        m00, m01, m02, m10, m11, m12, m20, m21, m22 = _rotation(a0, a1, a2, b0, b1, b2)
        dw, dx, dy, dz = _quaternion(m00, m01, m02, m10, m11, m12, m20, m21, m22)
        w, x, y, z = tl.associative_scan((dw, dx, dy, dz), 0, _later_times_earlier)
        w, x, y, z = _times(w, x, y, z, hw, hx, hy, hz)
        w, x, y, z = _unit(w, x, y, z)
        # A step is measured in the heading of the frame before, D^-1 H, and is turned back by its inverse.
        ew, ex, ey, ez = _times(dw, -dx, -dy, -dz, w, x, y, z)
        step_x = tl.load(frame, mask=inside, other=0.0)
        step_z = tl.load(frame + 1, mask=inside, other=0.0)
        moved_x = (1 - 2 * (ey * ey + ez * ez)) * step_x + 2 * (ex * ez - ew * ey) * step_z
        moved_z = 2 * (ex * ez + ew * ey) * step_x + (1 - 2 * (ex * ex + ey * ey)) * step_z
        moved_x = path_x + tl.cumsum(moved_x, 0)
        moved_z = path_z + tl.cumsum(moved_z, 0)
        out = heading_ptr + first + start + at
        tl.store(out, w, mask=inside)
        tl.store(out + frames, x, mask=inside)
        tl.store(out + 2 * frames, y, mask=inside)
        tl.store(out + 3 * frames, z, mask=inside)
        tl.store(out + 4 * frames, moved_x, mask=inside)
        tl.store(out + 5 * frames, moved_z, mask=inside)
        hw, hx, hy, hz = _last(w, at, BLOCK), _last(x, at, BLOCK), _last(y, at, BLOCK), _last(z, at, BLOCK)
        path_x, path_z = _last(moved_x, at, BLOCK), _last(moved_z, at, BLOCK)


@triton.jit
def _of(x, ancestor):
    return tl.gather(x, tl.broadcast_to(tl.maximum(ancestor, 0)[None, :], x.shape), 1)


@triton.jit
def pose_kernel(
    features_ptr,
    heading_ptr,
    offsets_ptr,
    ancestors_ptr,
    joints_ptr,
    rotations_ptr,
    frames,
    JOINTS: tl.constexpr,
    LANES: tl.constexpr,
    ROUNDS: tl.constexpr,
    FRAMES: tl.constexpr,
):
    """ancestors ``[ROUNDS, LANES]`` int32: of each joint the ancestor 2^round up, -1 where there is none."""
    frame = tl.program_id(0).to(tl.int64) * FRAMES + tl.arange(0, FRAMES)
    joint = tl.arange(0, LANES)
    here, body = frame < frames, joint < JOINTS
    inside = here[:, None] & body[None, :]
    root = (joint == 0)[None, :]
    row = features_ptr + frame * (HEAD + 12 * JOINTS)
    sixd = row[:, None] + HEAD + 6 * JOINTS + 6 * joint[None, :]
    l0 = tl.load(sixd, mask=inside, other=1.0)
    l1 = tl.load(sixd + 1, mask=inside, other=0.0)
    l2 = tl.load(sixd + 2, mask=inside, other=0.0)
    l3 = tl.load(sixd + 3, mask=inside, other=0.0)
    l4 = tl.load(sixd + 4, mask=inside, other=1.0)
    l5 = tl.load(sixd + 5, mask=inside, other=0.0)
    r00, r01, r02, r10, r11, r12, r20, r21, r22 = _rotation(l0, l1, l2, l3, l4, l5)

    heading = heading_ptr + frame
    w = tl.load(heading, mask=here, other=1.0)[:, None]
    x = -tl.load(heading + frames, mask=here, other=0.0)[:, None]
    y = -tl.load(heading + 2 * frames, mask=here, other=0.0)[:, None]
    z = -tl.load(heading + 3 * frames, mask=here, other=0.0)[:, None]
    b00, b01, b02 = 1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)
    b10, b11, b12 = 2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)
    b20, b21, b22 = 2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)
    r00, r10, r20 = (
        tl.where(root, b00 * r00 + b01 * r10 + b02 * r20, r00),
        tl.where(root, b10 * r00 + b11 * r10 + b12 * r20, r10),
        tl.where(root, b20 * r00 + b21 * r10 + b22 * r20, r20),
    )
    r01, r11, r21 = (
        tl.where(root, b00 * r01 + b01 * r11 + b02 * r21, r01),
        tl.where(root, b10 * r01 + b11 * r11 + b12 * r21, r11),
        tl.where(root, b20 * r01 + b21 * r11 + b22 * r21, r21),
    )
    r02, r12, r22 = (
        tl.where(root, b00 * r02 + b01 * r12 + b02 * r22, r02),
        tl.where(root, b10 * r02 + b11 * r12 + b12 * r22, r12),
        tl.where(root, b20 * r02 + b21 * r12 + b22 * r22, r22),
    )
    at_x = tl.load(heading + 4 * frames, mask=here, other=0.0)[:, None]
    at_y = tl.load(row + HEAD + 1, mask=here, other=0.0)[:, None]
    at_z = tl.load(heading + 5 * frames, mask=here, other=0.0)[:, None]
    offset = offsets_ptr + 3 * joint
    p0 = tl.where(root, at_x, tl.load(offset, mask=body, other=0.0)[None, :])
    p1 = tl.where(root, at_y, tl.load(offset + 1, mask=body, other=0.0)[None, :])
    p2 = tl.where(root, at_z, tl.load(offset + 2, mask=body, other=0.0)[None, :])

    for turn in tl.static_range(ROUNDS):
        ancestor = tl.load(ancestors_ptr + turn * LANES + joint)
        has = (ancestor >= 0)[None, :]
        a00, a01, a02 = _of(r00, ancestor), _of(r01, ancestor), _of(r02, ancestor)
        a10, a11, a12 = _of(r10, ancestor), _of(r11, ancestor), _of(r12, ancestor)
        a20, a21, a22 = _of(r20, ancestor), _of(r21, ancestor), _of(r22, ancestor)
        q0, q1, q2 = _of(p0, ancestor), _of(p1, ancestor), _of(p2, ancestor)
        p0, p1, p2 = (
            tl.where(has, q0 + a00 * p0 + a01 * p1 + a02 * p2, p0),
            tl.where(has, q1 + a10 * p0 + a11 * p1 + a12 * p2, p1),
            tl.where(has, q2 + a20 * p0 + a21 * p1 + a22 * p2, p2),
        )
        r00, r10, r20 = (
            tl.where(has, a00 * r00 + a01 * r10 + a02 * r20, r00),
            tl.where(has, a10 * r00 + a11 * r10 + a12 * r20, r10),
            tl.where(has, a20 * r00 + a21 * r10 + a22 * r20, r20),
        )
        r01, r11, r21 = (
            tl.where(has, a00 * r01 + a01 * r11 + a02 * r21, r01),
            tl.where(has, a10 * r01 + a11 * r11 + a12 * r21, r11),
            tl.where(has, a20 * r01 + a21 * r11 + a22 * r21, r21),
        )
        r02, r12, r22 = (
            tl.where(has, a00 * r02 + a01 * r12 + a02 * r22, r02),
            tl.where(has, a10 * r02 + a11 * r12 + a12 * r22, r12),
            tl.where(has, a20 * r02 + a21 * r12 + a22 * r22, r22),
        )

    place = frame[:, None] * JOINTS + joint[None, :]
    out = joints_ptr + 3 * place
    tl.store(out, p0, mask=inside)
    tl.store(out + 1, p1, mask=inside)
    tl.store(out + 2, p2, mask=inside)
    out = rotations_ptr + 9 * place
    tl.store(out, r00, mask=inside)
    tl.store(out + 1, r01, mask=inside)
    tl.store(out + 2, r02, mask=inside)
    tl.store(out + 3, r10, mask=inside)
    tl.store(out + 4, r11, mask=inside)
    tl.store(out + 5, r12, mask=inside)
    tl.store(out + 6, r20, mask=inside)
    tl.store(out + 7, r21, mask=inside)
    tl.store(out + 8, r22, mask=inside)


def ancestors(parents: Sequence[int]) -> list[list[int]]:
    """A row a round of pointer jumping, padded with -1 to a power of two; as many rounds as the deepest joint needs."""
    rounds, up = [], list(parents)
    while any(parent >= 0 for parent in up):
        rounds.append(up + [-1] * (triton.next_power_of_2(len(up)) - len(up)))
        up = [up[parent] if parent >= 0 else -1 for parent in up]
    return rounds


@lru_cache(maxsize=16)
def _table(parents: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(ancestors(parents) or [[-1]], dtype=torch.int32, device=device)


def pose_from_features(features: Tensor, offsets: Tensor, parents: Sequence[int]) -> tuple[Tensor, Tensor]:
    joints, steps, width = len(parents), features.shape[-2], features.shape[-1]
    features = features.contiguous()
    frames = features.numel() // width
    new: dict[str, Any] = {"device": features.device, "dtype": features.dtype}
    positions = torch.empty((*features.shape[:-1], joints, 3), **new)
    rotations = torch.empty((*features.shape[:-1], joints, 3, 3), **new)
    if frames:
        heading = torch.empty((6, frames), **new)
        heading_kernel[(frames // steps,)](
            features, heading, steps, frames, WIDTH=width, BLOCK=SCAN_FRAMES, num_warps=SCAN_WARPS
        )
        pose_kernel[(triton.cdiv(frames, FRAMES),)](
            features,
            heading,
            offsets.contiguous(),
            _table(tuple(parents), features.device),
            positions,
            rotations,
            frames,
            JOINTS=joints,
            LANES=triton.next_power_of_2(joints),
            ROUNDS=len(ancestors(parents)),
            FRAMES=FRAMES,
            num_warps=WARPS,
        )
    return positions, rotations


AOT = [
    case
    for kind in ("fp32", "fp64")
    for case in (
        AotCase(
            name=f"kinematics_heading_{kind}",
            kernel=heading_kernel,
            signature={"features_ptr": f"*{kind}", "heading_ptr": f"*{kind}", "steps": "i32", "frames": "i32"},
            constexprs={"WIDTH": 272, "BLOCK": SCAN_FRAMES},
            aligned=("features_ptr", "heading_ptr"),
            num_warps=SCAN_WARPS,
        ),
        AotCase(
            name=f"kinematics_pose_{kind}",
            kernel=pose_kernel,
            signature={
                "features_ptr": f"*{kind}",
                "heading_ptr": f"*{kind}",
                "offsets_ptr": f"*{kind}",
                "ancestors_ptr": "*i32",
                "joints_ptr": f"*{kind}",
                "rotations_ptr": f"*{kind}",
                "frames": "i32",
            },
            constexprs={"JOINTS": 22, "LANES": 32, "ROUNDS": 4, "FRAMES": FRAMES},
            aligned=("features_ptr", "heading_ptr", "offsets_ptr", "ancestors_ptr", "joints_ptr", "rotations_ptr"),
            num_warps=WARPS,
        ),
    )
]
