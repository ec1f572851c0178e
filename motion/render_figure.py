"""Drawing the figure: an orthographic camera, a body of tapered limbs, its shadow, the floor and the path."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from kinetok.kernels.kinematics import forward_kinematics
from kinetok.motion.skeleton import JOINT_NAMES, PARENTS

if TYPE_CHECKING:
    from kinetok.motion.motion import Motion

Doubles = NDArray[np.float64]
Colour = tuple[int, int, int]

LEFT: Colour = (232, 119, 46)
RIGHT: Colour = (44, 123, 196)
TRUNK: Colour = (86, 97, 115)
SKULL: Colour = (112, 123, 141)
FACE: Colour = (244, 236, 224)
STAGE: Colour = (242, 244, 247)
SHADOW: Colour = (208, 213, 222)
GRID: Colour = (220, 225, 232)
METRE: Colour = (196, 203, 214)
PATH: Colour = (124, 92, 214)
PATH_AHEAD: Colour = (206, 196, 240)

# Points beyond the 22 joints, appended in this order.
_HEAD, _NOSE, _LEFT_HAND, _RIGHT_HAND, _LEFT_TOE, _RIGHT_TOE, _LEFT_HEEL, _RIGHT_HEEL = range(22, 30)
_J = {name: i for i, name in enumerate(JOINT_NAMES)}


def _limbs() -> list[tuple[int, int, float, float, Colour]]:
    limbs = [
        (_J["pelvis"], _J["spine1"], 0.115, 0.11, TRUNK),
        (_J["spine1"], _J["spine3"], 0.11, 0.135, TRUNK),
        (_J["spine3"], _J["neck"], 0.13, 0.07, TRUNK),
        (_J["left_hip"], _J["right_hip"], 0.085, 0.085, TRUNK),
        (_J["left_collar"], _J["left_shoulder"], 0.07, 0.062, TRUNK),
        (_J["right_collar"], _J["right_shoulder"], 0.07, 0.062, TRUNK),
        (_J["left_shoulder"], _J["spine2"], 0.05, 0.1, TRUNK),
        (_J["right_shoulder"], _J["spine2"], 0.05, 0.1, TRUNK),
        (_J["neck"], _HEAD, 0.05, 0.05, SKULL),
        (_HEAD, _HEAD, 0.115, 0.115, SKULL),
    ]
    for side, hand, toe, heel, colour in (
        ("left", _LEFT_HAND, _LEFT_TOE, _LEFT_HEEL, LEFT),
        ("right", _RIGHT_HAND, _RIGHT_TOE, _RIGHT_HEEL, RIGHT),
    ):
        hip, knee, ankle, foot = (_J[f"{side}_{name}"] for name in ("hip", "knee", "ankle", "foot"))
        shoulder, elbow, wrist = (_J[f"{side}_{name}"] for name in ("shoulder", "elbow", "wrist"))
        limbs += [
            (hip, knee, 0.08, 0.056, colour),
            (knee, ankle, 0.056, 0.038, colour),
            (heel, foot, 0.036, 0.036, colour),
            (foot, toe, 0.036, 0.026, colour),
            (shoulder, elbow, 0.054, 0.042, colour),
            (elbow, wrist, 0.042, 0.03, colour),
            (wrist, hand, 0.034, 0.03, colour),
        ]
    return limbs


LIMBS = _limbs()
_A = np.array([limb[0] for limb in LIMBS])
_B = np.array([limb[1] for limb in LIMBS])
_TRUNK = np.array([limb[4] == TRUNK for limb in LIMBS])


def _unit(x: Doubles) -> Doubles:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)


@dataclass(frozen=True, kw_only=True, slots=True)
class Body:
    """The drawn points ``[T, 30, 3]`` of a motion (22 joints, head, nose, hands, toes, heels) and the horizontal
    facing direction of its pelvis ``[T, 3]``; float64 metres."""

    points: Doubles
    facing: Doubles

    @classmethod
    def of(cls, motion: "Motion") -> "Body":
        rotations, root, offsets = (
            torch.from_numpy(a.astype(np.float64)) for a in (motion.rotations, motion.root, motion.offsets)
        )
        joints, turns = (x.numpy() for x in forward_kinematics(rotations, root, offsets, PARENTS))
        head = joints[:, 15] + 0.075 * _unit(joints[:, 15] - joints[:, 12])
        extra = [head, head + 0.1 * turns[:, 15, :, 2]]
        extra += [joints[:, w] + 0.1 * _unit(joints[:, w] - joints[:, e]) for e, w in ((18, 20), (19, 21))]
        extra += [joints[:, f] + 0.055 * turns[:, f, :, 2] for f in (10, 11)]
        extra += [joints[:, a] - 0.3 * (joints[:, f] - joints[:, a]) * [1, 0, 1] for a, f in ((7, 10), (8, 11))]
        for heel, foot in ((6, 10), (7, 11)):
            extra[heel][:, 1] = np.minimum(extra[heel][:, 1], joints[:, foot, 1] + 0.05)
        facing = turns[:, 0, :, 2] * [1, 0, 1]
        return cls(points=np.concatenate([joints, np.stack(extra, 1)], 1), facing=_unit(facing))


@dataclass(frozen=True)
class Camera:
    """Orthographic: ``yaw`` about Y (0 looks along -Z, the figure's face), ``pitch`` down, both in radians."""

    yaw: float
    pitch: float = 0.33

    @cached_property
    def axes(self) -> Doubles:
        """Rows: screen right, screen up, towards the viewer."""
        right = np.array([np.cos(self.yaw), 0.0, -np.sin(self.yaw)])
        flat = np.array([np.sin(self.yaw), 0.0, np.cos(self.yaw)])
        up = np.array([0.0, np.cos(self.pitch), 0.0]) - np.sin(self.pitch) * flat
        return np.stack([right, up, np.cross(right, up)])

    @classmethod
    def watching(cls, body: Body) -> "Camera":
        """Three-quarter view that shows faces rather than backs and, all else equal, travel from left to right."""
        root = body.points[:, 0] * [1, 0, 1]
        travel = root[-1] - root[0]
        facing = body.facing.mean(0)
        if np.linalg.norm(travel) < 0.6:
            return cls(float(np.arctan2(facing[0], facing[2])) - 0.55)
        heading = np.arctan2(travel[0], travel[2])

        def score(yaw: float) -> float:
            right, _, viewer = cls(yaw).axes
            return float(facing @ viewer + 0.3 * np.sign(travel @ right))

        return cls(float(max((heading - a for a in (1.0, -1.0, 2.1, -2.1)), key=score)))


class View:
    """A camera placed on an image: ``centre`` (world) falls on pixel ``at``, ``scale`` pixels a metre."""

    def __init__(self, draw: Any, camera: Camera, centre: Doubles, at: tuple[float, float], scale: float) -> None:
        self.draw, self.camera, self.scale = draw, camera, scale
        self.origin = np.array([at[0], at[1], 0.0])
        self.centre = centre

    def pixels(self, points: Doubles) -> Doubles:
        """World ``[..., 3]`` to pixel x, pixel y (down), depth towards the viewer in pixels."""
        return self.origin + (points - self.centre) @ self.camera.axes.T * [self.scale, -self.scale, self.scale]

    def width(self, pixels: float) -> int:
        return max(1, round(pixels))

    def _line(self, points: Doubles, colour: Colour, width: float) -> None:
        self.draw.line([tuple(p) for p in points[:, :2].tolist()], fill=colour, width=self.width(width), joint="curve")

    def disc(self, centre: Doubles, radius: float, colour: Colour) -> None:
        x, y = self.pixels(centre)[:2]
        self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def _capsule(self, a: Doubles, b: Doubles, ra: float, rb: float, colour: Colour) -> None:
        for (x, y), r in ((a[:2].tolist(), ra), (b[:2].tolist(), rb)):
            self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        d = (b - a)[:2]
        length = float(np.hypot(*d))
        if length > 1e-6:
            n = np.array([-d[1], d[0]]) / length
            a2, b2 = a[:2], b[:2]
            self.draw.polygon([tuple(p) for p in (a2 + n * ra, b2 + n * rb, b2 - n * rb, a2 - n * ra)], fill=colour)

    def floor(self, inside: Doubles, step: float = 0.5) -> None:
        """The stage and its grid: the convex horizontal polygon ``inside [N, 3]``, lines every ``step`` metres, every
        metre stronger."""
        self.draw.polygon([tuple(p) for p in self.pixels(inside)[:, :2].tolist()], fill=STAGE)
        self.grid(inside, step)

    def grid(self, inside: Doubles, step: float = 0.5) -> None:
        edges = np.stack([inside, np.roll(inside, -1, 0)], 1)
        for strong in (False, True):
            for axis in (0, 2):
                a, b = edges[:, 0, axis], edges[:, 1, axis]
                for k in range(int(np.ceil(a.min() / step)), int(np.floor(a.max() / step)) + 1):
                    if (k * step % 1.0 == 0.0) != strong:
                        continue
                    cut = (a - k * step) * (b - k * step) < 0
                    t = ((k * step - a[cut]) / (b - a)[cut])[:, None]
                    ends = edges[cut, 0] + t * (edges[cut, 1] - edges[cut, 0])
                    if len(ends) == 2:
                        self._line(self.pixels(ends), METRE if strong else GRID, 0.0075 * self.scale)

    def shadow(self, points: Doubles) -> None:
        """Where the limbs of one frame ``[30, 3]`` would darken the floor under a light from above."""
        flat = self.pixels((points + points[:, 1:2] * [0.12, 0.0, -0.12]) * [1, 0, 1])
        for a, b, ra, rb, _ in LIMBS:
            self._capsule(flat[a], flat[b], 0.8 * ra * self.scale, 0.8 * rb * self.scale, SHADOW)

    def path(self, root: Doubles, now: int) -> None:
        """The root's path ``[T, 3]`` on the floor: walked until frame ``now``, faint after it."""
        floor = self.pixels(root * [1, 0, 1])
        for points, colour in ((floor[now:], PATH_AHEAD), (floor[: now + 1], PATH)):
            if len(points) > 1:
                self._line(points, colour, 0.018 * self.scale)

    def figure(self, points: Doubles) -> None:
        """One frame ``[30, 3]``, far limbs first: each a dark rim, a body and a light streak."""
        p, s = self.pixels(points), self.scale
        rim = 0.011 * s
        depth = p[_A, 2] + p[_B, 2]
        # The trunk is one solid, its parts without rims between them; it sorts by its own middle.
        depth[_TRUNK] = depth[_TRUNK].mean()
        parts = [[i] for i in np.flatnonzero(~_TRUNK).tolist()] + [np.flatnonzero(_TRUNK).tolist()]
        for part in sorted(parts, key=lambda part: depth[part[0]]):
            for grow, amount, lift in ((rim, -0.35, 0.0), (0.0, 0.0, 0.0), (-0.38, 0.13, 0.3)):
                for i in part:
                    a, b, ra, rb, colour = LIMBS[i]
                    ra, rb = ((1 + grow) * r * s if grow < 0 else r * s + grow for r in (ra, rb))
                    up = np.array([-lift * min(ra, rb), -lift * min(ra, rb), 0.0])
                    self._capsule(p[a] + up, p[b] + up, ra, rb, tint(colour, amount))
            if LIMBS[part[0]][:2] == (_HEAD, _HEAD) and p[_NOSE, 2] > p[_HEAD, 2]:
                self._face(p[_HEAD], p[_NOSE])

    def _face(self, head: Doubles, nose: Doubles) -> None:
        """A light oval on the side of the head that looks ahead, narrower as it turns away."""
        towards = (nose - head) / (0.1 * self.scale)
        centre, r = head + (nose - head) * 0.62, 0.072 * self.scale
        angle = np.arctan2(towards[1], towards[0])
        t = np.linspace(0, 2 * np.pi, 28)
        oval = np.stack([r * max(0.12, float(towards[2])) * np.cos(t), r * np.sin(t)], 1)
        c, sn = np.cos(angle), np.sin(angle)
        self.draw.polygon([tuple(q) for q in (oval @ np.array([[c, sn], [-sn, c]]) + centre[:2]).tolist()], fill=FACE)


def tint(colour: Colour, amount: float) -> Colour:
    """Towards white for a positive amount, towards black for a negative one; -1..1."""
    target = 255 if amount > 0 else 0
    r, g, b = (round(c + (target - c) * abs(amount)) for c in colour)
    return r, g, b


def disc_on_floor(centre: Doubles, radius: float, corners: int = 48) -> Doubles:
    """A polygon ``[corners, 3]`` around ``centre`` on the floor, metres."""
    t = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([centre[0] + radius * np.cos(t), np.zeros(corners), centre[2] + radius * np.sin(t)], 1)
