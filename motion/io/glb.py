"""GLB files through pygltflib: a skinned figure with one animation."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinetok.errors import UserError, missing_package
from kinetok.files import whole_file
from kinetok.motion.io.resample import matrices, quaternions
from kinetok.motion.motion import Motion
from kinetok.motion.skeleton import JOINT_NAMES, JOINTS, PARENTS

WIDTH = 0.16  # thickness of a bone's octahedron as a share of its length
TIP = 0.09  # metres from a last joint (head, hands, feet) to the end of its octahedron
COLOUR = [0.42, 0.53, 0.72, 1.0]
FLOAT, UNSIGNED_BYTE, UNSIGNED_SHORT = 5126, 5121, 5123
VERTICES, INDICES = 34962, 34963


def _pygltflib() -> Any:
    try:
        import pygltflib
    except ImportError as error:
        raise missing_package("pygltflib", "files", "reading and writing .glb") from error
    return pygltflib


def _rest(offsets: NDArray) -> NDArray[np.float64]:
    positions = np.zeros((JOINTS, 3))
    for joint in range(1, JOINTS):
        positions[joint] = positions[PARENTS[joint]] + offsets[joint]
    return positions


def _octahedron(start: NDArray, end: NDArray) -> tuple[NDArray, NDArray]:
    """Vertices and normals ``[24, 3]`` of a bone drawn from one point to another, eight flat faces."""
    along = end - start
    size = np.linalg.norm(along)
    side = np.cross(along, [0.0, 0.0, 1.0] if abs(along[2]) < 0.9 * size else [0.0, 1.0, 0.0])
    side *= WIDTH * size / np.linalg.norm(side)
    other = np.cross(along, side) / size
    middle = start + 0.25 * along
    ring = [middle + side, middle + other, middle - side, middle - other]
    faces = [(apex, ring[i], ring[(i + 1) % 4]) for apex in (start, end) for i in range(4)]
    vertices, normals = [], []
    centre = (start + end) / 2
    for a, b, c in faces:
        normal = np.cross(b - a, c - a)
        if normal @ ((a + b + c) / 3 - centre) < 0:
            b, c, normal = c, b, -normal
        vertices += [a, b, c]
        normals += [normal / np.linalg.norm(normal)] * 3
    return np.array(vertices), np.array(normals)


def _mesh(offsets: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Vertices, normals ``[V, 3]`` and the joint that moves each vertex ``[V]``, in the rest pose."""
    rest = _rest(offsets)
    bones = [(PARENTS[joint], rest[PARENTS[joint]], rest[joint]) for joint in range(1, JOINTS)]
    for joint in set(range(JOINTS)) - set(PARENTS):
        along = offsets[joint] / max(np.linalg.norm(offsets[joint]), 1e-9)
        bones.append((joint, rest[joint], rest[joint] + TIP * along))
    parts = [(joint, *_octahedron(start, end)) for joint, start, end in bones if np.linalg.norm(end - start) > 1e-6]
    return (
        np.concatenate([vertices for _, vertices, _ in parts]),
        np.concatenate([normals for _, _, normals in parts]),
        np.concatenate([np.full(len(vertices), joint) for joint, vertices, _ in parts]),
    )


class _Buffer:
    """Collects arrays into one binary chunk and describes them as accessors."""

    def __init__(self, library: Any) -> None:
        self.library, self.data = library, bytearray()
        self.views: list[Any] = []
        self.accessors: list[Any] = []

    def add(self, array: NDArray, component: int, kind: str, *, target: int | None = None, bounds: bool = False) -> int:
        self.data += bytes(-len(self.data) % 4)
        raw = array.tobytes()
        view = self.library.BufferView(buffer=0, byteOffset=len(self.data), byteLength=len(raw), target=target)
        self.views.append(view)
        self.data += raw
        accessor = self.library.Accessor(
            bufferView=len(self.views) - 1, byteOffset=0, componentType=component, count=len(array), type=kind
        )
        if bounds:
            flat = array.reshape(len(array), -1)
            accessor.min, accessor.max = flat.min(0).tolist(), flat.max(0).tolist()
        self.accessors.append(accessor)
        return len(self.accessors) - 1


def save_glb(motion: Motion, path: str | Path) -> None:
    """Write the figure (octahedral bones, one joint a vertex) with rotations for every joint and the root's path."""
    lib = _pygltflib()
    buffer = _Buffer(lib)
    offsets = motion.offsets.astype(np.float64)
    vertices, normals, owner = _mesh(offsets)
    weights = np.zeros((len(owner), 4), np.float32)
    weights[:, 0] = 1
    joints = np.zeros((len(owner), 4), np.uint8)
    joints[:, 0] = owner
    bind = np.tile(np.eye(4, dtype=np.float32), (JOINTS, 1, 1))
    bind[:, 3, :3] = -_rest(offsets)  # column-major, so the translation is the last row here
    attributes = lib.Attributes(
        POSITION=buffer.add(vertices.astype(np.float32), FLOAT, "VEC3", target=VERTICES, bounds=True),
        NORMAL=buffer.add(normals.astype(np.float32), FLOAT, "VEC3", target=VERTICES),
        JOINTS_0=buffer.add(joints, UNSIGNED_BYTE, "VEC4", target=VERTICES),
        WEIGHTS_0=buffer.add(weights, FLOAT, "VEC4", target=VERTICES),
    )
    indices = buffer.add(np.arange(len(owner), dtype=np.uint16), UNSIGNED_SHORT, "SCALAR", target=INDICES)
    inverse = buffer.add(bind, FLOAT, "MAT4")
    times = buffer.add((np.arange(len(motion)) / motion.fps).astype(np.float32), FLOAT, "SCALAR", bounds=True)

    q = quaternions(motion.rotations)
    flip = np.cumprod(np.where((q[1:] * q[:-1]).sum(-1) < 0, -1.0, 1.0), axis=0)
    q[1:] *= flip[..., None]  # neighbouring keys in one half of the sphere, or players go the long way round
    q = np.roll(q, -1, axis=-1)  # glTF keeps w last
    q = (q / np.linalg.norm(q, axis=-1, keepdims=True)).astype(np.float32)
    samplers, channels = [], []
    for joint in range(JOINTS):
        output = buffer.add(np.ascontiguousarray(q[:, joint]), FLOAT, "VEC4")
        samplers.append(lib.AnimationSampler(input=times, output=output, interpolation="LINEAR"))
        target = lib.AnimationChannelTarget(node=joint, path="rotation")
        channels.append(lib.AnimationChannel(sampler=joint, target=target))
    samplers.append(lib.AnimationSampler(input=times, output=buffer.add(motion.root, FLOAT, "VEC3")))
    channels.append(lib.AnimationChannel(sampler=JOINTS, target=lib.AnimationChannelTarget(node=0, path="translation")))

    nodes = []
    for joint, name in enumerate(JOINT_NAMES):
        children = [child for child, parent in enumerate(PARENTS) if parent == joint]
        place = motion.root[0] if joint == 0 else motion.offsets[joint]
        nodes.append(lib.Node(name=name, children=children, translation=place.tolist(), rotation=q[0, joint].tolist()))
    nodes.append(lib.Node(name="figure", mesh=0, skin=0))
    pbr = lib.PbrMetallicRoughness(baseColorFactor=COLOUR, metallicFactor=0.0, roughnessFactor=0.8)
    document = lib.GLTF2(
        asset=lib.Asset(version="2.0", generator="kinetok", extras={"text": motion.text, "fps": motion.fps}),
        scene=0,
        scenes=[lib.Scene(nodes=[0, JOINTS])],
        nodes=nodes,
        meshes=[lib.Mesh(primitives=[lib.Primitive(attributes=attributes, indices=indices, material=0)])],
        materials=[lib.Material(name="body", pbrMetallicRoughness=pbr, alphaCutoff=None)],
        skins=[lib.Skin(joints=list(range(JOINTS)), skeleton=0, inverseBindMatrices=inverse)],
        animations=[lib.Animation(name="motion", samplers=samplers, channels=channels)],
        accessors=buffer.accessors,
        bufferViews=buffer.views,
        buffers=[lib.Buffer(byteLength=len(buffer.data))],
    )
    document.set_binary_blob(bytes(buffer.data))
    with whole_file(path) as temporary:
        document.save_binary(str(temporary))


def load_glb(path: Path, data: bytes) -> Motion:
    """Read a GLB that ``save_glb`` wrote; ``UserError`` for any other."""
    try:
        magic, version, _, count, kind = struct.unpack_from("<4sIIII", data)
        if magic != b"glTF" or version != 2 or kind != 0x4E4F534A:
            raise UserError(f"{path}: expected a GLB file, version 2")
        document = json.loads(data[20 : 20 + count])
        if document["asset"].get("generator") != "kinetok":
            raise UserError(f"{path}: expected a GLB written by kinetok; other figures come in as .bvh")
        chunk = memoryview(data)[28 + count :]

        def read(accessor: int, width: int) -> NDArray[np.float32]:
            entry = document["accessors"][accessor]
            view = document["bufferViews"][entry["bufferView"]]
            start = view.get("byteOffset", 0) + entry.get("byteOffset", 0)
            return np.frombuffer(chunk, "<f4", entry["count"] * width, start).reshape(-1, width)

        animation = document["animations"][0]
        outputs = {
            (channel["target"]["node"], channel["target"]["path"]): animation["samplers"][channel["sampler"]]["output"]
            for channel in animation["channels"]
        }
        rotations = np.stack([read(outputs[joint, "rotation"], 4) for joint in range(JOINTS)], axis=1)
        offsets = np.array([[0, 0, 0], *(document["nodes"][joint]["translation"] for joint in range(1, JOINTS))])
        extras = document["asset"]["extras"]
        return Motion(
            rotations=matrices(np.roll(rotations, 1, axis=-1)),
            root=read(outputs[0, "translation"], 3),
            offsets=offsets,
            fps=float(extras["fps"]),
            text=str(extras.get("text", "")),  # pygltflib leaves an empty text out
        )
    except UserError:
        raise
    except (struct.error, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: expected a GLB written by kinetok, but it is damaged ({type(error).__name__})"
        ) from error
