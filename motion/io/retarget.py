"""Motion of another skeleton on the 22-joint tree.

Each of our joints takes the global rotation of the source bone it is matched with by name, relative to the source's rest
pose after that pose has been swung into an exact T-pose. Positions are not fitted; the root path is scaled by the legs.
"""

import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kinetok.errors import UserError
from kinetok.motion.io.resample import resample
from kinetok.motion.motion import Motion
from kinetok.motion.skeleton import CANONICAL_OFFSETS, JOINT_NAMES, PARENTS

UNITS = (1.0, 0.01, 0.001, 0.0254)  # metres, centimetres, millimetres, inches
LEG = (0.5, 1.3)  # metres that a person's leg may measure
FOOT_HEIGHT, FOOT_PERCENTILE = 0.02, 3  # the lowest foot joint stands this high
T_POSE_JUMP = 0.35  # radians from an opening calibration frame to the recording

SIDED = {
    "hip": ("upleg", "thigh", "upperleg", "hip"),
    "knee": ("knee", "shin", "calf", "lowleg", "lowerleg", "leg"),
    "ankle": ("ankle", "foot"),
    "foot": ("toebase", "toe", "toes", "ball", "foot"),
    "shoulder": ("arm", "upperarm", "uparm", "shoulder"),
    "collar": ("collar", "clavicle", "shoulder"),
    "elbow": ("elbow", "forearm", "lowarm", "lowerarm"),
    "wrist": ("wrist", "hand"),
}
MIDDLE = {"pelvis": ("pelvis", "hips", "hip", "root"), "neck": ("neck", "neck1", "lowerneck"), "head": ("head",)}
NEEDED = ("pelvis", *(f"{s}_{j}" for s in ("left", "right") for j in ("hip", "knee", "ankle", "shoulder", "elbow")))
LIMBS = {"hip": "knee", "knee": "ankle", "ankle": "foot", "shoulder": "elbow", "elbow": "wrist"}
NECK = CANONICAL_OFFSETS[JOINT_NAMES.index("head")]
AT = {name: joint for joint, name in enumerate(JOINT_NAMES)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A figure as a file has it: J joints, parents first; offsets ``[J, 3]``, rotations ``[T, J, 3, 3]``, root ``[T, 3]``."""

    names: list[str]
    parents: list[int]
    offsets: NDArray[np.float64]
    rotations: NDArray[np.float64]
    root: NDArray[np.float64]
    fps: float


def _match(source: Source) -> dict[str, int]:
    """Our joint names to the source's joints. ``UserError`` naming what cannot be found."""
    plain = {re.sub(r"[^a-z0-9]", "", name.split(":")[-1].lower()): joint for joint, name in enumerate(source.names)}
    found: dict[str, int] = {}

    def take(name: str, candidates: list[str]) -> None:
        for candidate in candidates:
            if candidate in plain and plain[candidate] not in found.values():
                found[name] = plain[candidate]
                return

    for side, letter in (("left", "l"), ("right", "r")):
        for joint, words in SIDED.items():
            take(f"{side}_{joint}", [form for w in words for form in (side + w, letter + w, w + side, w + letter)])
    for joint, words in MIDDLE.items():
        take(joint, list(words))
    missing = [name for name in NEEDED if name not in found]
    if missing:
        raise UserError(f"cannot find the joints {', '.join(missing)} by name among {', '.join(source.names[:40])}")
    spine = _spine(source, found)
    if spine:
        found["spine1"] = spine[0]
        if len(spine) > 2:
            found["spine2"] = spine[len(spine) // 2]
        if len(spine) > 1:
            found["spine3"] = spine[-1]
    return found


def _ancestors(source: Source, joint: int) -> list[int]:
    chain = [joint]
    while source.parents[chain[-1]] >= 0:
        chain.append(source.parents[chain[-1]])
    return chain[::-1]


def _spine(source: Source, found: dict[str, int]) -> list[int]:
    """The joints above the pelvis that carry both arms, lowest first."""
    arms = [_ancestors(source, found[f"{side}_shoulder"]) for side in ("left", "right")]
    shared = [joint for joint in arms[0] if joint in arms[1]]
    pelvis = found["pelvis"]
    return shared[shared.index(pelvis) + 1 :] if pelvis in shared else []


def _swing(start: NDArray, end: NDArray) -> NDArray[np.float64]:
    """The smallest rotation that takes one direction to another."""
    a, b = start / np.linalg.norm(start), end / np.linalg.norm(end)
    axis, cosine = np.cross(a, b), float(a @ b)
    if cosine < -0.999999:
        raise UserError("a limb of the rest pose points the opposite way of a T-pose")
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + cross + cross @ cross / (1 + cosine)


def _axes(rest: NDArray, found: dict[str, int]) -> NDArray[np.float64]:
    """The rotation from the file's axes to ours (left +X, up +Y, facing +Z), told from the rest pose."""
    across = rest[found["left_hip"]] - rest[found["right_hip"]]
    shoulders = rest[found["left_shoulder"]] + rest[found["right_shoulder"]]
    upward = shoulders / 2 - (rest[found["left_hip"]] + rest[found["right_hip"]]) / 2
    left, up = np.zeros(3), np.zeros(3)
    left[np.abs(across).argmax()] = np.sign(across[np.abs(across).argmax()])
    upward = np.where(left != 0, 0, upward)
    up[np.abs(upward).argmax()] = np.sign(upward[np.abs(upward).argmax()])
    if not across.any() or not upward.any():
        raise UserError("the rest pose is flat: hips and shoulders do not tell left and up")
    return np.stack((left, up, np.cross(left, up)))


def retarget(source: Source, fps: float) -> Motion:
    """The source's motion at ``fps``: metres, Y up, starting at x = z = 0 and facing +Z, standing on y = 0.

    A file on our own skeleton comes back as it is, with its own offsets, position and direction.
    """
    rest = np.zeros_like(source.offsets)
    for joint, parent in enumerate(source.parents):
        rest[joint] = source.offsets[joint] + (rest[parent] if parent >= 0 else 0)
    found = _match(source)
    axes = _axes(rest, found)
    rest = rest @ axes.T
    length = [
        np.linalg.norm(rest[found[a]] - rest[found[b]])
        for a, b in (("left_hip", "left_knee"), ("left_knee", "left_ankle"))
    ]
    if min(length) <= 0:
        raise UserError("the left leg of the rest pose has no length")
    own = list(source.names) == [JOINT_NAMES[joint] for joint in _depth_first()]
    globals_ = np.empty_like(source.rotations)
    for joint, parent in enumerate(source.parents):
        turned = source.rotations[:, joint]
        globals_[:, joint] = turned if parent < 0 else globals_[:, parent] @ turned
    globals_ = axes @ globals_ @ axes.T
    swings = {} if own else _t_pose(rest, found)
    ours = np.empty((len(source.root), len(JOINT_NAMES), 3, 3))
    for joint, name in enumerate(JOINT_NAMES):
        if name in found:
            ours[:, joint] = globals_[:, found[name]] @ swings.get(name, np.eye(3)).T
        else:
            ours[:, joint] = ours[:, PARENTS[joint]]
    local = ours.copy()
    for joint in range(1, len(JOINT_NAMES)):
        local[:, joint] = ours[:, PARENTS[joint]].swapaxes(-1, -2) @ ours[:, joint]
    root = _positions(source, globals_, axes, found["pelvis"])
    if own:
        unit = next((u for u in UNITS if LEG[0] <= sum(length) * u <= LEG[1]), None)
        if unit is None:
            raise UserError(f"a leg is {sum(length):g} units long, which is no person's in metres, cm, mm or inches")
        order = [source.names.index(name) for name in JOINT_NAMES]
        offsets = source.offsets[order] @ axes.T * unit
        local, root = resample(local, root * unit, source.fps, fps)
        return Motion(rotations=local, root=root, offsets=offsets, fps=fps)
    leg = sum(np.linalg.norm(CANONICAL_OFFSETS[AT[name]]) for name in ("left_knee", "left_ankle"))
    root = root * (leg / sum(length))
    if _opens_with_a_pose(local):
        local, root = local[1:], root[1:]
    local, root = resample(local, root, source.fps, fps)
    return _stand(local, root, fps)


def _depth_first() -> list[int]:
    order: list[int] = []

    def visit(joint: int) -> None:
        order.append(joint)
        for child, parent in enumerate(PARENTS):
            if parent == joint:
                visit(child)

    visit(0)
    return order


def _t_pose(rest: NDArray, found: dict[str, int]) -> dict[str, NDArray[np.float64]]:
    """For each limb, the spine and the neck, the swing of its rest bone onto the T-pose's."""
    swings: dict[str, NDArray[np.float64]] = {}
    spine: list[str] = [name for name in ("spine1", "spine2", "spine3", "neck", "head") if name in found]
    parts: list[tuple[list[str], tuple[float, ...]]] = [(["spine1", "spine2", "spine3"], (0, 1, 0)), (["neck"], NECK)]
    for part, upright in parts:
        bones = [name for name in part if name in found]
        if bones and bones[0] != spine[-1]:
            top = spine[spine.index(bones[-1]) + 1]
            bone = rest[found[top]] - rest[found[bones[0]]]
            if np.linalg.norm(bone) > 1e-6:
                swings.update(dict.fromkeys(bones, _swing(bone, np.array(upright))))
    if "neck" in swings and "head" in found:
        swings["head"] = swings["neck"]
    for side in ("left", "right"):
        for joint, child in LIMBS.items():
            name, end = f"{side}_{joint}", f"{side}_{child}"
            if name not in found or end not in found:
                continue
            bone = rest[found[end]] - rest[found[name]]
            if np.linalg.norm(bone) > 1e-6:
                swings[name] = _swing(bone, np.array(CANONICAL_OFFSETS[AT[end]]))
        if f"{side}_elbow" in swings:
            swings[f"{side}_wrist"] = swings[f"{side}_elbow"]
        elif f"{side}_shoulder" in swings:
            swings[f"{side}_elbow"] = swings[f"{side}_wrist"] = swings[f"{side}_shoulder"]
        if f"{side}_ankle" in swings:
            swings[f"{side}_foot"] = swings[f"{side}_ankle"]
    return swings


def _positions(source: Source, globals_: NDArray, axes: NDArray, pelvis: int) -> NDArray[np.float64]:
    """The path ``[T, 3]`` of the joint matched with the pelvis, in our axes and the file's unit."""
    path = source.root @ axes.T
    chain = _ancestors(source, pelvis)
    for parent, joint in pairwise(chain):
        path = path + globals_[:, parent] @ (axes @ source.offsets[joint])
    return path


def _opens_with_a_pose(local: NDArray) -> bool:
    """Whether frame 0 is a calibration pose that the recording jumps away from."""
    if len(local) < 3:
        return False
    step = local[:-1].swapaxes(-1, -2)[:2] @ local[1:3]
    angle = np.arccos(((np.trace(step, axis1=-2, axis2=-1) - 1) / 2).clip(-1, 1)).max(-1)
    return bool(angle[0] > T_POSE_JUMP and angle[0] > 5 * angle[1])


def _stand(local: NDArray, root: NDArray, fps: float) -> Motion:
    """Turn the clip to face +Z, start it at the origin and put it on the floor."""
    forward = local[0, 0, :, 2]
    angle = -np.arctan2(forward[0], forward[2])
    turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    local = local.copy()
    local[:, 0] = turn @ local[:, 0]
    root = (root - root[0] * [1, 0, 1]) @ turn.T
    lowest = Motion(rotations=local, root=root, fps=fps).joints[:, [AT["left_foot"], AT["right_foot"]], 1].min(1)
    root[:, 1] += FOOT_HEIGHT - np.percentile(lowest, FOOT_PERCENTILE)
    return Motion(rotations=local, root=root, fps=fps)
