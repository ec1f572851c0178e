import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kinetok
from kinetok.errors import UserError
from kinetok.kernels.kinematics import matrix_from_6d
from kinetok.motion import Motion
from kinetok.motion.render import save_mp4, save_png
from kinetok.motion.render_figure import LEFT, LIMBS, RIGHT, Body, Camera

Image = pytest.importorskip("PIL.Image")


def clip(frames: int, speed: float = 0.0, seed: int | None = None, text: str = "a person walks", fps: float = 30.0):
    rotations = np.tile(np.eye(3), (frames, 22, 1, 1))
    if seed is not None:
        rotations = matrix_from_6d(torch.from_numpy(np.random.default_rng(seed).normal(size=(frames, 22, 6)))).numpy()
    root = np.zeros((frames, 3)) + np.array([0.0, 0.95, 0.0])
    root[:, 2] += np.arange(frames) / fps * speed
    return Motion(rotations=rotations, root=root, fps=fps, text=text)


def near(image, colour) -> np.ndarray:
    return np.abs(np.asarray(image).astype(int) - colour).sum(-1) < 30


def test_a_walk_shows_both_sides_and_the_panorama(tmp_path):
    save_png(clip(90, speed=1.4), tmp_path / "walk.png")
    save_png(clip(90), tmp_path / "still.png")
    walk, still = Image.open(tmp_path / "walk.png"), Image.open(tmp_path / "still.png")
    assert walk.mode == "RGB" and walk.width == still.width == 1800
    assert walk.height > still.height + 200
    for image in (walk, still):
        assert near(image, LEFT).sum() > 3000 and near(image, RIGHT).sum() > 3000


@pytest.mark.parametrize("frames", [1, 2, 3, 9])
@pytest.mark.parametrize("text", ["", "a", "word " * 500, "x" * 100_000, "two\nlines\tand \u8d70"])
def test_short_clips_and_any_sentence(tmp_path, frames, text):
    save_png(clip(frames, speed=3.0, text=text), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").height < 2000


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 99), frames=st.integers(1, 40), speed=st.sampled_from([0.0, -2.0, 300.0]))
def test_any_pose_can_be_drawn(tmp_path_factory, seed, frames, speed):
    path = tmp_path_factory.mktemp("sheet") / "a.png"
    save_png(clip(frames, speed, seed), path)
    assert Image.open(path).height < 3000


def test_same_motion_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        save_png(clip(30, 1.0, seed=3), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("speed", [0.0, 1.0, -1.0])
def test_the_camera_sees_the_face_and_its_axes_are_a_rotation(speed):
    body = Body.of(clip(60, speed))
    camera = Camera.watching(body)
    np.testing.assert_allclose(camera.axes @ camera.axes.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(camera.axes) == pytest.approx(1.0)
    assert body.facing[0] @ camera.axes[2] > 0.3
    # Seen from the front, the person's left is on the viewer's right.
    left = body.points[0, 16] - body.points[0, 17]
    assert left @ camera.axes[0] > 0


def test_limbs_of_one_side_have_its_colour():
    for a, b, _, _, colour in LIMBS:
        points = Body.of(clip(1)).points[0]
        if colour in (LEFT, RIGHT):
            assert (points[a, 0] > 0) == (points[b, 0] > 0) == (colour == LEFT)


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        save_png(clip(3), tmp_path / "file" / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_film_has_every_frame_and_reports_progress(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    seen = []
    save_mp4(clip(11, 1.0, fps=24.0), tmp_path / "a.mp4", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 11) for i in range(11)]
    frames, seconds = ffmpeg.count_frames_and_secs(str(tmp_path / "a.mp4"))
    assert frames == 11 and seconds == pytest.approx(11 / 24, abs=0.05)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_a_film_interrupted_leaves_nothing(tmp_path):
    pytest.importorskip("imageio_ffmpeg")

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_mp4(clip(5), tmp_path / "a.mp4", progress=stop)
    assert not list(tmp_path.iterdir())


def test_ffmpeg_that_fails_is_one_clear_line(tmp_path, monkeypatch):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")

    def broken(*args, **kwargs):
        yield
        raise OSError("Broken pipe\n\nFFMPEG LOG:\nno space left on device")

    monkeypatch.setattr(ffmpeg, "write_frames", broken)
    with pytest.raises(UserError, match=r"ffmpeg stopped: no space left on device$"):
        save_mp4(clip(3), tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_pillow_is_imported_only_to_draw():
    code = "import sys, kinetok.motion.render; assert not [m for m in sys.modules if m.startswith(('PIL', 'imageio'))]"
    source = str(Path(kinetok.__path__[0]).parent)
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": source})
