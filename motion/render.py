"""Pictures of a motion: a PNG contact sheet (Pillow) and an MP4 (imageio-ffmpeg)."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kinetok.errors import UserError, missing_package
from kinetok.files import whole_file
from kinetok.motion.render_figure import Body, Camera, Doubles, disc_on_floor

if TYPE_CHECKING:
    from kinetok.motion.motion import Motion

VIDEO_SIZE = (1024, 576)


def _need_pillow(purpose: str) -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise missing_package("pillow", "files", purpose) from error


def save_png(motion: "Motion", path: str | Path) -> None:
    """Write the contact sheet: the sentence, the figures along their path, 8 poses in time, when the feet stand.

    Needs Pillow. Raises ``UserError`` where it is missing or ``path`` cannot be written.
    """
    _need_pillow("a contact sheet (.png)")
    from kinetok.motion.render_sheet import contact_sheet

    image = contact_sheet(motion)
    with whole_file(path) as temporary:
        image.save(temporary, format="PNG", compress_level=5)


def save_mp4(motion: "Motion", path: str | Path, *, progress: Callable[[int, int], None] | None = None) -> None:
    """Write a film of 1024 x 576 pixels at the motion's own frame rate, the camera following the figure.

    ``progress(done, total)`` is called after every frame. Needs Pillow and imageio-ffmpeg. Raises ``UserError`` where
    one is missing, ``path`` cannot be written or ffmpeg fails.
    """
    _need_pillow("a film (.mp4)")
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise missing_package("imageio-ffmpeg", "files", "a film (.mp4)") from error

    film = _Film(motion)
    with whole_file(path) as temporary:
        writer = imageio_ffmpeg.write_frames(
            str(temporary), VIDEO_SIZE, fps=motion.fps, quality=7, macro_block_size=2, ffmpeg_log_level="error"
        )
        with contextlib.closing(writer):
            try:
                writer.send(None)
                for frame in range(len(motion)):
                    writer.send(film.picture(frame).tobytes())
                    if progress is not None:
                        progress(frame + 1, len(motion))
            except OSError as error:
                last = str(error).strip().splitlines()[-1:] or ["no reason given"]
                raise UserError(f"cannot write {path}: ffmpeg stopped: {last[0]}") from error
        if not temporary.stat().st_size:
            raise UserError(f"cannot write {path}: ffmpeg left an empty file; is the disk full?")


class _Film:
    """One picture a frame; the camera keeps its angle and follows a smoothed root."""

    def __init__(self, motion: "Motion") -> None:
        self.motion, self.body = motion, Body.of(motion)
        self.camera = Camera.watching(self.body)
        self.root = self.body.points[:, 0]
        self.target = _smooth(self.root * [1, 0, 1], round(0.4 * motion.fps))
        # Room for a jump or for raised arms, and no closer than a standing person needs.
        tall = max(2.1, float(self.body.points[..., 1].max()) + 0.3)
        self.scale = 0.88 * VIDEO_SIZE[1] / tall
        self.middle = self.camera.axes[1] * (tall / 2 - 0.16)

    def picture(self, frame: int) -> Any:
        from kinetok.motion.render_sheet import INK, QUIET, Sheet, title_lines

        width, height = VIDEO_SIZE
        sheet, points = Sheet(width, height), self.body.points[frame]
        under = self.target[frame]
        view = sheet.panel(0, 0, width, height, self.camera, under + self.middle, self.scale)
        stage = disc_on_floor(under, 2.4, 72)
        view.floor(stage)
        view.shadow(points)
        view.grid(stage)
        close = np.flatnonzero(np.linalg.norm((self.root - under)[:, [0, 2]], axis=1) > 2.3)
        first = int(close[close < frame].max(initial=-1)) + 1
        last = int(close[close > frame].min(initial=len(self.root)))
        view.path(self.root[first:last], frame - first)
        view.figure(points)
        sheet.text(28, 44, title_lines(self.motion.text, width - 180, 24, lines=1)[0], 24, INK)
        sheet.text(width - 28, 44, f"{frame / self.motion.fps:.2f} s", 22, QUIET, "rs")
        return sheet.finish()


def _smooth(x: Doubles, reach: int) -> Doubles:
    """Mean over ``reach`` frames to either side, the ends repeated: ``[T, 3]`` to ``[T, 3]``."""
    padded = np.concatenate([x[:1].repeat(reach, 0), x, x[-1:].repeat(reach, 0)])
    total = np.concatenate([np.zeros((1, 3)), padded.cumsum(0)])
    return (total[2 * reach + 1 :] - total[: -2 * reach - 1]) / (2 * reach + 1)
