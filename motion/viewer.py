"""``kinetok view``: motions in a browser (viser), with play, pause, scrub, speed and loop."""

import errno
import socket
import threading
import time
import webbrowser
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinetok.errors import UserError, missing_package
from kinetok.motion.motion import Motion
from kinetok.motion.render_figure import FACE, GRID, LIMBS, PATH, STAGE, Body, Colour, Doubles
from kinetok.motion.skeleton import JOINT_NAMES

SPEEDS = {"0.1x": 0.1, "0.25x": 0.25, "0.5x": 0.5, "1x": 1.0, "2x": 2.0}
STANDING = (0, 90, 16)
SPACING = 1.6  # metres between motions shown side by side


def _linear(colour: Colour) -> Colour:
    """Viser lights the colours of batched meshes as they are; without this they come out pale."""
    r, g, b = (round(255 * (c / 255) ** 2.2) for c in colour)
    return r, g, b


_A = np.array([limb[0] for limb in LIMBS])
_B = np.array([limb[1] for limb in LIMBS])
_RADII = np.array([limb[2:4] for limb in LIMBS])
_COLOURS = np.array([_linear(limb[4]) for limb in LIMBS], dtype=np.uint8)
# Limbs that turn green, in the order of Motion.contacts: heel to foot and foot to toe of the left, then the right.
_SOLES = [i for i, limb in enumerate(LIMBS) if limb[1] in (10, 11) or limb[0] in (10, 11)]
_NOSE = 23


def _tube(sides: int = 16) -> tuple[NDArray[np.float32], NDArray[np.uint32]]:
    """Vertices and faces of an open tube of radius 1 along Y from -0.5 to 0.5."""
    t = np.linspace(0, 2 * np.pi, sides, endpoint=False)
    ring = np.stack([np.cos(t), np.full(sides, -0.5), np.sin(t)], 1)
    i = np.arange(sides)
    j = (i + 1) % sides
    faces = np.concatenate([np.stack([i, i + sides, j], 1), np.stack([j, i + sides, j + sides], 1)])
    return np.concatenate([ring, ring * [1, -1, 1]]).astype(np.float32), faces.astype(np.uint32)


def _ball(rows: int = 9, sides: int = 16) -> tuple[NDArray[np.float32], NDArray[np.uint32]]:
    """Vertices and faces of a sphere of radius 1."""
    a, t = np.meshgrid(np.linspace(0, np.pi, rows), np.linspace(0, 2 * np.pi, sides, endpoint=False), indexing="ij")
    points = np.stack([np.sin(a) * np.cos(t), np.cos(a), np.sin(a) * np.sin(t)], -1).reshape(-1, 3)
    row, i = (x.ravel() for x in np.meshgrid(np.arange(rows - 1), np.arange(sides), indexing="ij"))
    p, q = row * sides + i, row * sides + (i + 1) % sides
    faces = np.concatenate([np.stack([p, q, p + sides], 1), np.stack([q, q + sides, p + sides], 1)])
    return points.astype(np.float32), faces.astype(np.uint32)


def _from_y(direction: Doubles) -> NDArray[np.float32]:
    """Quaternions w, x, y, z ``[N, 4]`` that turn +Y to unit vectors ``[N, 3]``."""
    x, y, z = direction.T
    q = np.stack([1.0 + y, z, np.zeros_like(x), -x], 1)
    q[q[:, 0] < 1e-9] = (0.0, 1.0, 0.0, 0.0)
    return (q / np.linalg.norm(q, axis=1, keepdims=True)).astype(np.float32)


class _Figure:
    """One motion in the scene: a batch of tubes, a batch of balls and its path, ``shift`` metres along X."""

    def __init__(self, server: Any, name: str, motion: Motion, shift: float) -> None:
        self.motion = motion
        self.points = Body.of(motion).points + np.array([shift, 0.0, 0.0])
        length = np.linalg.norm(self.points[0, _B] - self.points[0, _A], axis=1)
        thick = _RADII.mean(1)
        positions, turns = self._tubes(0)
        scene = server.scene
        self.tubes = scene.add_batched_meshes_simple(
            f"{name}/limbs",
            *_tube(),
            batched_wxyzs=turns,
            batched_positions=positions,
            batched_scales=np.stack([thick, length, thick], 1).astype(np.float32),
            batched_colors=_COLOURS,
            lod="off",
        )
        self.ball_colours = np.concatenate([_COLOURS, _COLOURS, np.array([_linear(FACE)], dtype=np.uint8)])
        self.balls = scene.add_batched_meshes_simple(
            f"{name}/joints",
            *_ball(),
            batched_wxyzs=np.tile(np.array([1, 0, 0, 0], dtype=np.float32), (len(self.ball_colours), 1)),
            batched_positions=self._balls(0),
            batched_scales=np.concatenate([_RADII[:, 0], _RADII[:, 1], [0.035]]).astype(np.float32),
            batched_colors=self.ball_colours,
            lod="off",
        )
        path = self.points[:, 0] * [1, 0, 1] + [0, 0.004, 0]
        if len(path) > 1:
            scene.add_line_segments(
                f"{name}/path", np.stack([path[:-1], path[1:]], 1).astype(np.float32), PATH, thickness=0.012
            )
        if motion.text:
            scene.add_label(f"{name}/text", motion.text[:120], position=tuple(path[0] + [0, 0, -0.5]))

    def frame_at(self, seconds: float) -> int:
        """The frame shown at a time; the last one once the motion is over."""
        return min(int(seconds * self.motion.fps + 1e-6), len(self.motion) - 1)

    def _tubes(self, frame: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        a, b = self.points[frame, _A], self.points[frame, _B]
        along = b - a
        length = np.linalg.norm(along, axis=1, keepdims=True)
        unit = np.where(length > 1e-6, along / np.maximum(length, 1e-6), [0.0, 1.0, 0.0])
        return ((a + b) / 2).astype(np.float32), _from_y(unit)

    def _balls(self, frame: int) -> NDArray[np.float32]:
        p = self.points[frame]
        return np.concatenate([p[_A], p[_B], p[_NOSE : _NOSE + 1]]).astype(np.float32)

    def show(self, frame: int) -> None:
        self.tubes.batched_positions, self.tubes.batched_wxyzs = self._tubes(frame)
        self.balls.batched_positions = self._balls(frame)
        colours, limbs = self.ball_colours.copy(), _COLOURS.copy()
        for sole, down in zip(_SOLES, self.motion.contacts[frame], strict=True):
            if down:
                colours[[sole, sole + len(LIMBS)]] = STANDING
                limbs[sole] = STANDING
        self.balls.batched_colors, self.tubes.batched_colors = colours, limbs


class Player:
    """The scene and its controls. ``show(frame)`` goes to a frame of the first motion; ``step(seconds)`` plays on."""

    def __init__(self, server: Any, motions: Sequence[Motion]) -> None:
        self.server, self.fps = server, motions[0].fps
        self.duration = max(motion.duration for motion in motions)
        self.frames = max(1, round(self.duration * self.fps))
        self.seconds, self.playing = 0.0, True
        self._lock = threading.RLock()
        self._build_scene(motions)
        self._build_controls()
        self.show(0)

    @property
    def frame(self) -> int:
        """The frame on show, counted at the first motion's rate."""
        return min(int(self.seconds * self.fps + 1e-6), self.frames - 1)

    def _build_scene(self, motions: Sequence[Motion]) -> None:
        server = self.server
        server.scene.set_up_direction("+y")
        self.stage = server.scene.add_frame("/stage", show_axes=False)
        server.scene.add_grid(
            "/stage/floor",
            60.0,
            60.0,
            plane="xz",
            cell_size=0.5,
            cell_color=STAGE,
            section_size=1.0,
            section_color=GRID,
            fade_distance=30.0,
        )
        self.figures = [
            _Figure(server, f"/stage/motion{i}", motion, SPACING * (i - (len(motions) - 1) / 2))
            for i, motion in enumerate(motions)
        ]
        self.roots = self.figures[0].points[:, 0] * [1, 0, 1] - self.figures[0].points[0, 0] * [1, 0, 1]
        self.marker = server.scene.add_icosphere("/stage/marker", 0.045, (240, 200, 40), visible=False)
        self.labels = [
            server.scene.add_label(f"/stage/name/{name}", name, visible=False, font_screen_scale=0.8)
            for name in JOINT_NAMES
        ]
        wide = 2.2 + SPACING * (len(motions) - 1)
        server.initial_camera.position = (0.55 * wide, 0.6 * wide, wide)
        server.initial_camera.look_at = (0.0, 0.9, 0.0)

    def _build_controls(self) -> None:
        gui = self.server.gui
        gui.configure_theme(show_logo=False, show_share_button=False, brand_color=PATH)
        self.button = gui.add_button("Pause")
        self.slider = gui.add_slider("Frame", 0, max(1, self.frames - 1), 1, 0, disabled=self.frames == 1)
        self.speed = gui.add_dropdown("Speed", tuple(SPEEDS), initial_value="1x")
        self.loop = gui.add_checkbox("Loop", True)
        self.follow = gui.add_checkbox("Follow", True, hint="keep the first figure in the middle")
        self.names = gui.add_checkbox("Joint names", False)
        self.joint = gui.add_dropdown("Joint", ("none", *JOINT_NAMES), initial_value="none")
        self.readout = gui.add_markdown("")
        self.button.on_click(lambda _: self.toggle())

        @self.slider.on_update
        def scrub(event: Any) -> None:
            # The player moves the slider too; only a hand on it is a wish to stop there.
            if event.client is not None:
                self.pause()
                self.show(int(self.slider.value))

        for control in (self.follow, self.names, self.joint):
            control.on_update(lambda _: self.show(self.frame))

    def pause(self) -> None:
        self._set_playing(False)

    def toggle(self) -> None:
        """Play or pause; play from the start when at the end."""
        with self._lock:
            if not self.playing and self.frame >= self.frames - 1:
                self.seconds = 0.0
            self._set_playing(not self.playing)

    def _set_playing(self, playing: bool) -> None:
        self.playing = playing
        self.button.label = "Pause" if playing else "Play"

    def step(self, seconds: float) -> None:
        """Play on for so many seconds of the viewer's clock; nothing while paused."""
        with self._lock:
            if not self.playing:
                return
            now = self.seconds + seconds * SPEEDS[self.speed.value]
            if now >= self.duration:
                if self.loop.value:
                    now %= self.duration
                else:
                    self.pause()
                    now = (self.frames - 1) / self.fps
            before, self.seconds = self.frame, now
            if self.frame != before:
                self._draw()

    def show(self, frame: int) -> None:
        """Go to a frame; out of range is clipped."""
        with self._lock:
            self.seconds = min(max(frame, 0), self.frames - 1) / self.fps
            self._draw()

    def _draw(self) -> None:
        with self.server.atomic():
            for figure in self.figures:
                figure.show(figure.frame_at(self.seconds))
            first = self.figures[0].frame_at(self.seconds)
            points = self.figures[0].points[first]
            self.stage.position = tuple(-self.roots[first]) if self.follow.value else (0.0, 0.0, 0.0)
            for label, place in zip(self.labels, points, strict=False):
                label.visible = bool(self.names.value)
                if self.names.value:
                    label.position = tuple(place)
            self.marker.visible = self.joint.value != "none"
            self.slider.value = self.frame
            self.readout.content = self._text(first, points)
            if self.marker.visible:
                self.marker.position = tuple(points[JOINT_NAMES.index(self.joint.value)])

    def _text(self, first: int, points: Doubles) -> str:
        contacts = self.figures[0].motion.contacts[first]
        standing = [name for name, down in zip(("left", "right"), contacts.reshape(2, 2).any(1), strict=True) if down]
        lines = [f"frame **{self.frame}** of {self.frames - 1}, {self.seconds:.2f} s"]
        lines.append(f"on the floor: {' and '.join(standing) or 'no foot'}")
        if self.joint.value != "none":
            x, y, z = self.figures[0].motion.joints[first, JOINT_NAMES.index(self.joint.value)]
            lines.append(f"{self.joint.value}: x {x:.3f}, y {y:.3f}, z {z:.3f} m")
        return "\n\n".join(lines)


def build(server: Any, motion: Motion | Sequence[Motion]) -> Player:
    """Fill a ``viser.ViserServer`` with one motion, or several side by side, and their controls; does not block."""
    motions = [motion] if isinstance(motion, Motion) else list(motion)
    if not motions:
        raise UserError("the viewer needs at least one motion, got none")
    return Player(server, motions)


def view(
    motion: Motion | Sequence[Motion], host: str = "127.0.0.1", port: int = 8080, open_browser: bool = True
) -> None:
    """Show motions in a browser until interrupted (Ctrl-C). Needs viser; a port in use is replaced by a free one.

    Raises ``UserError`` where viser is missing or the address cannot be served.
    """
    try:
        import viser
    except ImportError as error:
        raise missing_package("viser", "viewer", "the viewer") from error
    _check_address(host, port)
    server = viser.ViserServer(host=host, port=port)
    try:
        player = build(server, motion)
        if open_browser:
            shown = "localhost" if host == "0.0.0.0" else host
            webbrowser.open(f"http://{shown}:{server.get_port()}")
        run(player)
    finally:
        server.stop()


def _check_address(host: str, port: int) -> None:
    """Viser waits for ever on an address it cannot serve, so try it first; a port in use is no error."""
    if not 1 <= port <= 65535:
        raise UserError(f"port: expected a number from 1 to 65535, got {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            reason = error.strerror or error
            raise UserError(
                f"cannot serve the viewer at {host}:{port}: {reason}; choose another host or port"
            ) from error


def run(player: Player) -> None:
    """Play in real time until interrupted."""
    tick = 1.0 / min(player.fps, 60.0)
    last = time.perf_counter()
    try:
        while True:
            time.sleep(max(0.0, last + tick - time.perf_counter()))
            now = time.perf_counter()
            player.step(now - last)
            last = now
    except KeyboardInterrupt:
        return
