"""BVH files through pybvh: ours out, anybody's in."""

import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from kinetok.errors import UserError, missing_package
from kinetok.files import whole_file
from kinetok.motion.io.retarget import Source, retarget
from kinetok.motion.motion import Motion
from kinetok.motion.skeleton import FPS, JOINT_NAMES, PARENTS

MAX_FRAMES, MAX_JOINTS, MAX_DEPTH = 1_000_000, 1000, 200
Z_UP = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # our Y to the file's Z, our Z to its -Y
TIP = 0.08  # metres from a last joint to the end site that closes its bone
HEADER = re.compile(r"\bMOTION\s+Frames:\s*(\S+)\s+Frame\s+Time:\s*(\S+)", re.IGNORECASE)


def _pybvh() -> Any:
    try:
        import pybvh
    except ImportError as error:
        raise missing_package("pybvh", "files", "reading and writing .bvh") from error
    return pybvh


def save_bvh(motion: Motion, path: str | Path, *, scale: float = 1.0, up: str = "Y") -> None:
    """Write a T-pose skeleton with the root at the pelvis joint and ZYX rotations in degrees.

    scale: units a metre (100 for centimetres). up: "Y" (facing +Z) or "Z" (facing -Y). In Blender: File, Import, Motion
    Capture (.bvh) with Forward "-Z Forward" and Up "Y Up", the defaults, for up="Y".
    """
    pybvh = _pybvh()
    from pybvh.bvhnode import BvhEndSite, BvhJoint, BvhRoot

    if up not in ("Y", "Z"):
        raise UserError(f"up: expected 'Y' or 'Z', got {up!r}")
    if not (np.isfinite(scale) and 0 < scale <= 1e6):
        raise UserError(f"scale: expected a positive number of units a metre, got {scale}")
    turn = Z_UP if up == "Z" else np.eye(3)
    offsets = motion.offsets.astype(np.float64) @ turn.T * scale
    channels = ["Z", "Y", "X"]
    nodes: dict[int, Any] = {0: BvhRoot(JOINT_NAMES[0], [0, 0, 0], ["X", "Y", "Z"], channels)}
    ordered: list[Any] = []
    joints: list[int] = []

    def visit(joint: int) -> None:
        ordered.append(nodes[joint])
        joints.append(joint)
        children = [child for child, parent in enumerate(PARENTS) if parent == joint]
        for child in children:
            nodes[child] = BvhJoint(JOINT_NAMES[child], offsets[child], channels, parent=nodes[joint])
            nodes[joint].children.append(nodes[child])
            visit(child)
        if not children:
            bone = offsets[joint] / max(np.linalg.norm(offsets[joint]), 1e-9)
            tip = BvhEndSite(f"{JOINT_NAMES[joint]}_end", bone * TIP * scale, nodes[joint])
            nodes[joint].children.append(tip)
            ordered.append(tip)

    visit(0)
    local = turn @ motion.rotations.astype(np.float64) @ turn.T
    clip = pybvh.Bvh(
        nodes=ordered,
        root_pos=np.zeros((len(motion), 3)),
        joint_angles=np.zeros((len(motion), len(joints), 3)),
        frame_time=1 / motion.fps,
        world_up=f"+{up.lower()}",
        warn_on_disagreement=False,
    )
    clip.from_rotmat(motion.root.astype(np.float64) @ turn.T * scale, local[:, joints], inplace=True)
    with whole_file(path) as temporary:
        clip.write(temporary)


def _check(path: Path, data: bytes) -> None:
    """What pybvh would stumble over or choke on."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected a BVH text file, got bytes that are not text") from error
    if not text.lstrip().upper().startswith("HIERARCHY"):
        raise UserError(f"{path}: expected a BVH file (it starts with HIERARCHY), got {text[:20].strip()!r}")
    header = HEADER.search(text)
    if header is None:
        raise UserError(
            f"{path}: expected 'MOTION', 'Frames:' and 'Frame Time:', but the file ends before or lacks them"
        )
    try:
        frames, seconds = int(header[1]), float(header[2])
    except ValueError as error:
        raise UserError(
            f"{path}: expected a frame count and a frame time, got {header[1]!r} and {header[2]!r}"
        ) from error
    if not 0 < frames <= MAX_FRAMES or not 1e-4 <= seconds <= 10:
        raise UserError(
            f"{path}: expected 1 to {MAX_FRAMES} frames and a frame time in seconds, got {frames} and {seconds}"
        )
    tree = text[: header.start()]
    joints = len(re.findall(r"\b(?:JOINT|ROOT)\b", tree, re.IGNORECASE))
    depth = deepest = 0
    for brace in re.findall(r"[{}]", tree):
        depth += 1 if brace == "{" else -1
        deepest = max(deepest, depth)
        if depth < 0:
            break
    if depth or not 0 < joints <= MAX_JOINTS or deepest > MAX_DEPTH:
        raise UserError(
            f"{path}: expected a closed tree of at most {MAX_JOINTS} joints, got {joints}, or braces do not match"
        )
    channels = sum(int(count) for count in re.findall(r"\bCHANNELS\s+(\d{1,3})\b", tree, re.IGNORECASE))
    try:
        values = np.array(text[header.end() :].split(), dtype=np.float64)
    except ValueError as error:
        raise UserError(f"{path}: expected numbers in the frames, but {error}") from error
    if values.size != frames * channels:
        raise UserError(
            f"{path}: expected {frames} frames of {channels} numbers, got {values.size} numbers; the file is truncated or "
            "its frame count is wrong"
        )
    if not np.isfinite(values).all():
        raise UserError(f"{path}: expected finite numbers in the frames, got NaN or infinity")


def load_bvh(path: Path, data: bytes) -> Motion:
    """Any BVH figure on the 22-joint tree, at 30 frames a second (``kinetok.motion.io.retarget``)."""
    pybvh = _pybvh()
    _check(path, data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its guesses of the up axis, which are checked against the hips here
            # pybvh opens files ending in .bvh in lower case; a copy also makes sure it sees the bytes that were checked.
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder) / "clip.bvh"
                copy.write_bytes(data)
                clip = pybvh.read_bvh_file(copy)
            root, local = clip.to_rotmat()
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        detail = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: expected a BVH file, but its structure cannot be read ({detail})") from error
    joints = [node for node in clip.nodes if not node.is_end_site()]
    index = {id(node): number for number, node in enumerate(joints)}
    source = Source(
        names=[node.name for node in joints],
        parents=[-1 if node.parent is None else index[id(node.parent)] for node in joints],
        offsets=np.array([node.offset for node in joints], dtype=np.float64),
        rotations=np.asarray(local, dtype=np.float64),
        root=np.asarray(root, dtype=np.float64),
        fps=1 / clip.frame_time,
    )
    try:
        return retarget(source, FPS)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
