"""The contact sheet: a title, the figures where they stood, one cell a pose with its time, the feet on the floor."""

from typing import TYPE_CHECKING, Any

import numpy as np

from kinetok.motion import quality
from kinetok.motion.render_figure import (
    LEFT,
    PATH,
    RIGHT,
    STAGE,
    Body,
    Camera,
    Colour,
    Doubles,
    View,
    disc_on_floor,
    tint,
)

if TYPE_CHECKING:
    from kinetok.motion.motion import Motion

WIDTH, MARGIN, GAP = 1800, 48, 14
POSES = 8
INK: Colour = (31, 37, 48)
QUIET: Colour = (107, 116, 131)
PAPER: Colour = (255, 255, 255)
TITLE_CHARACTERS = 300
_TRAVELS = 4  # figures side by side that make the panorama worth its height
_BORDER = 0.55  # metres of floor before and behind the path


class Sheet:
    """Pillow drawing ``scale`` times larger than asked for, brought down at the end to smooth every edge."""

    def __init__(self, width: int, height: int, scale: int = 2) -> None:
        from PIL import Image, ImageDraw

        self.size, self.scale = (width, height), scale
        self.image = Image.new("RGB", (width * scale, height * scale), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def panel(self, x: float, y: float, w: float, h: float, camera: Camera, centre: Doubles, scale: float) -> View:
        """A view whose ``centre`` falls on ``(x + w/2, y + h/2)``; ``scale`` in pixels a metre."""
        s = self.scale
        return View(self.draw, camera, centre, ((x + w / 2) * s, (y + h / 2) * s), scale * s)

    def text(self, x: float, y: float, text: str, size: float, colour: Colour = INK, anchor: str = "ls") -> None:
        s = self.scale
        self.draw.text((x * s, y * s), text, fill=colour, font=font(size * s), anchor=anchor)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, radius: float = 0.0) -> None:
        s = self.scale
        self.draw.rounded_rectangle((x0 * s, y0 * s, max(x1, x0) * s, y1 * s), radius=radius * s, fill=colour)

    def finish(self) -> Any:
        return self.image.reduce(self.scale)


_FONTS: dict[float, Any] = {}


def font(size: float) -> Any:
    """Pillow's own typeface, so that a sheet looks the same on every machine."""
    from PIL import ImageFont

    if size not in _FONTS:
        _FONTS[size] = ImageFont.load_default(size)
    return _FONTS[size]


def title_lines(text: str, width: float, size: float, lines: int = 2) -> list[str]:
    """The sentence broken at spaces into at most ``lines`` lines of ``width`` pixels, cut with an ellipsis."""
    words, out = (" ".join(text[:TITLE_CHARACTERS].split()) or "motion").split(" "), [""]
    face = font(size)
    cut = len(text) > TITLE_CHARACTERS
    for word in words:
        wider = f"{out[-1]} {word}".strip()
        if not out[-1] or face.getlength(wider) <= width:
            out[-1] = wider
        elif len(out) < lines:
            out.append(word)
        else:
            cut = True
            break
    out[-1] += "\u2026" if cut else ""
    for i, line in enumerate(out):
        while face.getlength(line) > width:
            line = line[:-2] + "\u2026"
        out[i] = line
    return out


def key_frames(frames: int, poses: int = POSES) -> list[int]:
    """Evenly spaced frame numbers, first and last included."""
    return sorted({round(t) for t in np.linspace(0, frames - 1, min(frames, poses)).tolist()})


def _bounds(points: Doubles, camera: Camera) -> tuple[float, float, float, float]:
    """Left, right, bottom, top on the camera's axes, metres, of ``[..., 3]`` and the flesh around it."""
    flat = points.reshape(-1, 3) @ camera.axes[:2].T
    low, high = flat.min(0) - 0.16, flat.max(0) + 0.16
    return float(low[0]), float(high[0]), float(low[1]), float(high[1])


class _Plan:
    """Where everything goes, worked out before the image exists because its height depends on the motion."""

    def __init__(self, motion: "Motion") -> None:
        self.motion, self.body = motion, Body.of(motion)
        self.root = self.body.points[:, 0]
        self.camera = Camera.watching(self.body)
        self.keys = key_frames(len(motion))
        self.inner = WIDTH - 2 * MARGIN
        self.title = title_lines(motion.text, self.inner - 280, 38)
        self.top = 92 + 46 * (len(self.title) - 1)

        x0, x1, y0, y1 = _bounds(self.body.points[:: max(1, len(motion) // 90)], self.camera)
        self.flat = np.array([np.sin(self.camera.yaw), 0.0, np.cos(self.camera.yaw)])
        self.depth = self.root @ self.flat
        self.apart = _apart(self.root @ self.camera.axes[0], self.keys)
        self.panorama = 0.0
        if len(self.apart) >= _TRAVELS:
            y0 = min(y0 + 0.1, -np.sin(self.camera.pitch) * (float(self.depth.max()) + _BORDER))
            y1 += 0.2
            self.far = min(self.inner / (x1 - x0 + 0.5), 450 / (y1 - y0))
            self.panorama = self.far * (y1 - y0)
            self.middle = (x0 + x1) / 2 * self.camera.axes[0] + (y0 + y1) / 2 * self.camera.axes[1]

        self.cell = min(330.0, (self.inner - GAP * (len(self.keys) - 1)) / len(self.keys))
        still = self.body.points[self.keys] - (self.root * [1, 0, 1])[self.keys, None]
        x0, x1, y0, y1 = _bounds(still, self.camera)
        half = max(-x0, x1, 0.55)
        self.reach = half
        low, high = min(y0, -0.8 * np.sin(self.camera.pitch)) - 0.08, max(y1, 1.2)
        self.near = min((self.cell - 8) / (2 * half), 330 / (high - low))
        self.cell_height = self.near * (high - low) + 40
        self.cell_middle = (high + low) / 2 * self.camera.axes[1]
        self.cells_at = self.top + (self.panorama + 40 if self.panorama else 14)
        self.bars_at = self.cells_at + self.cell_height + 22
        self.bars = 62 if len(self.keys) > 1 else 0
        self.height = round(self.bars_at + self.bars + 62)

    def cell_x(self, i: int) -> float:
        """Left edge of cell i; the row is centred."""
        row = len(self.keys) * (self.cell + GAP) - GAP
        return (WIDTH - row) / 2 + i * (self.cell + GAP)


def contact_sheet(motion: "Motion") -> Any:
    """The sheet as a Pillow RGB image, 1800 pixels wide."""
    plan = _Plan(motion)
    sheet = Sheet(WIDTH, plan.height)
    _heading(sheet, plan)
    if plan.panorama:
        _panorama(sheet, plan)
    _cells(sheet, plan)
    if plan.bars:
        _feet(sheet, plan)
    _footer(sheet, plan)
    return sheet.finish()


def _heading(sheet: Sheet, plan: _Plan) -> None:
    for i, line in enumerate(plan.title):
        sheet.text(MARGIN, 64 + 46 * i, line, 38)
    right = WIDTH - MARGIN
    for name, colour, x in (("left side", LEFT, right - 206), ("right side", RIGHT, right - 88)):
        sheet.box(x - 22, 45, x - 6, 61, colour, 8)
        sheet.text(x, 60, name, 19, QUIET)


def _panorama(sheet: Sheet, plan: _Plan) -> None:
    """Every figure at its true place on one floor."""
    y, h, camera, flat = plan.top, plan.panorama, plan.camera, plan.flat
    view = sheet.panel(MARGIN, y, plan.inner, h, camera, plan.middle, plan.far)
    side = camera.axes[0] * float(plan.middle @ camera.axes[0])
    across = camera.axes[0] * (plan.inner / plan.far / 2)
    near, far = flat * (plan.depth.max() + _BORDER), flat * (plan.depth.min() - _BORDER)
    stage = np.stack([side - across + far, side + across + far, side + across + near, side - across + near])
    view.floor(stage)
    for frame in plan.apart:
        view.shadow(plan.body.points[frame])
    view.grid(stage)
    view.path(plan.root, len(plan.root) - 1)
    for frame in sorted(plan.apart, key=lambda f: float(plan.depth[f])):
        view.figure(plan.body.points[frame])
    for frame in plan.apart:
        top = view.pixels(plan.body.points[frame, 22] + [0.0, 0.22, 0.0])[:2] / sheet.scale
        sheet.text(float(top[0]), float(top[1]), str(plan.keys.index(frame) + 1), 17, QUIET, "ms")
    _scale_bar(sheet, WIDTH - MARGIN - 20, float(view.pixels(stage)[2, 1]) / sheet.scale - 16, plan.far)


def _apart(along: Doubles, frames: list[int]) -> list[int]:
    """Of ``frames``, the last and those before it that would not be drawn over another; ``along [T]`` in metres."""
    kept = [frames[-1]]
    for frame in frames[-2::-1]:
        if all(abs(float(along[frame] - along[other])) > 0.42 for other in kept):
            kept.append(frame)
    return kept[::-1]


def _cells(sheet: Sheet, plan: _Plan) -> None:
    for i, frame in enumerate(plan.keys):
        x, y = plan.cell_x(i), plan.cells_at
        under = plan.root[frame] * [1, 0, 1]
        view = sheet.panel(
            x, y + 30, plan.cell, plan.cell_height - 40, plan.camera, under + plan.cell_middle, plan.near
        )
        stage = disc_on_floor(under, min(plan.reach, plan.cell / plan.near / 2))
        view.floor(stage)
        view.shadow(plan.body.points[frame])
        view.grid(stage)
        near = np.linalg.norm((plan.root - plan.root[frame])[:, [0, 2]], axis=1) < np.ptp(stage[:, 0]) / 2
        first = int(np.flatnonzero(~near[:frame])[-1]) + 1 if not near[:frame].all() else 0
        last = frame + int(np.argmin(near[frame:])) if not near[frame:].all() else len(near)
        view.path(plan.root[first:last], frame - first)
        view.figure(plan.body.points[frame])
        sheet.text(x + 4, y + 18, str(i + 1), 19, INK)
        sheet.text(x + plan.cell - 4, y + 18, f"{frame / plan.motion.fps:.2f} s", 17, QUIET, "rs")
    if not plan.panorama:
        _scale_bar(sheet, WIDTH - MARGIN - 110, plan.height - 31, plan.near)


def _scale_bar(sheet: Sheet, right: float, y: float, scale: float) -> None:
    metres = 1.0 if scale > 80 else 2.0 if scale > 40 else 5.0
    left = right - metres * scale
    sheet.box(left, y - 2, right, y, INK)
    for x in (left, right - 2):
        sheet.box(x, y - 7, x + 2, y + 5, INK)
    sheet.text((left + right) / 2, y - 9, f"{metres:.0f} m", 16, INK, "ms")


def _feet(sheet: Sheet, plan: _Plan) -> None:
    """When each foot stands; the time axis runs from the middle of the first cell to the middle of the last."""
    y, contacts = plan.bars_at, plan.motion.contacts
    start, end = (plan.cell_x(i) + plan.cell / 2 for i in (0, len(plan.keys) - 1))
    step = (end - start) / (len(contacts) - 1)
    for row, (name, colour) in enumerate((("left down", LEFT), ("right down", RIGHT))):
        top = y + 24 * row
        standing = contacts[:, 2 * row : 2 * row + 2].any(axis=1)
        sheet.text(start - 16, top + 13, name, 16, QUIET, "rs")
        sheet.box(start - 3, top, end + 3, top + 15, STAGE, 7)
        change = np.flatnonzero(np.diff(np.concatenate([[False], standing, [False]]).astype(np.int8)))
        for on, off in change.reshape(-1, 2).tolist():
            # Half a frame to either side, which in a clip of a few frames would reach into the names.
            left, right = max(start + (on - 0.45) * step, start - 3), min(start + (off - 0.55) * step, end + 3)
            sheet.box(left, top, right, top + 15, tint(colour, 0.15), 5)
    for frame in plan.keys:
        x = start + frame * step
        sheet.box(x - 0.75, y - 8, x + 0.75, y + 44, QUIET)


def _footer(sheet: Sheet, plan: _Plan) -> None:
    motion, y = plan.motion, plan.height - 26
    distance = quality.travelled(motion.joints)
    facts = (
        f"{motion.duration:.2f} s",
        f"{len(motion)} frames at {motion.fps:g} fps",
        f"{distance:.2f} m travelled",
        f"{distance / motion.duration:.2f} m/s on average",
        "floor grid 0.5 m",
    )
    sheet.text(MARGIN, y, "   \u00b7   ".join(facts), 19, QUIET)
    sheet.text(WIDTH - MARGIN, y, "kinetok", 19, PATH, "rs")
