import socket
import urllib.request

import numpy as np
import pytest

from kinetok.errors import UserError
from kinetok.motion import Motion, viewer
from kinetok.motion.render_figure import LIMBS

viser = pytest.importorskip("viser")


def clip(frames: int = 12, fps: float = 30.0, text: str = "a person walks") -> Motion:
    root = np.stack([np.zeros(frames), np.full(frames, 0.95), np.arange(frames) * 0.1], 1)
    return Motion(rotations=np.tile(np.eye(3), (frames, 22, 1, 1)), root=root, fps=fps, text=text)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def server():
    server = viser.ViserServer(host="127.0.0.1", port=free_port())
    yield server
    server.stop()


@pytest.fixture
def clean(server):
    server.scene.reset()
    server.gui.reset()
    return server


def test_steps_loops_and_stops(clean):
    player = viewer.build(clean, clip())
    for frame in (1, 2, 3):
        player.step(1 / 30)
        assert player.frame == frame == player.slider.value
    player.step(10 / 30)
    assert player.frame == 1, "12 frames: 3 + 10 wraps to 1"
    player.loop.value = False
    player.step(10.0)
    assert player.frame == 11 and not player.playing and player.button.label == "Play"
    player.step(1.0)
    assert player.frame == 11
    player.toggle()
    assert player.frame == 0 and player.playing
    player.speed.value = "0.5x"
    player.step(4 / 30)
    assert player.frame == 2


def test_the_figure_is_where_the_motion_says(clean):
    motion = clip()
    player = viewer.build(clean, motion)
    figure = player.figures[0]
    player.show(7)
    balls = np.asarray(figure.balls.batched_positions)
    for i, (a, b, *_) in enumerate(LIMBS):
        for row, joint in ((i, a), (i + len(LIMBS), b)):
            if joint < 22:
                np.testing.assert_allclose(balls[row], motion.joints[7, joint], atol=1e-5)
    # A tube is its two ends: the middle and the turned Y axis.
    w, x, y, z = np.asarray(figure.tubes.batched_wxyzs).T
    axis = np.stack([2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)], 1)
    half = axis * np.asarray(figure.tubes.batched_scales)[:, 1:2] / 2
    np.testing.assert_allclose(np.asarray(figure.tubes.batched_positions) + half, balls[len(LIMBS) : -1], atol=1e-4)
    np.testing.assert_allclose(player.stage.position, [0, 0, -0.7], atol=1e-6)
    player.show(99)
    assert player.frame == 11
    player.show(-1)
    assert player.frame == 0


def test_contacts_are_green_and_read_out(clean):
    root = np.tile([0.0, 0.95, 0.0], (8, 1))
    root[4:, 1] = 2.0
    player = viewer.build(clean, Motion(rotations=np.tile(np.eye(3), (8, 22, 1, 1)), root=root))
    green = [tuple(c) == viewer.STANDING for c in np.asarray(player.figures[0].tubes.batched_colors).tolist()]
    assert sum(green) == 4 and "on the floor: left and right" in player.readout.content
    player.show(6)
    assert viewer.STANDING not in {tuple(c) for c in np.asarray(player.figures[0].tubes.batched_colors).tolist()}
    assert "on the floor: no foot" in player.readout.content
    player.joint.value = "left_wrist"
    assert "left_wrist: x " in player.readout.content and player.marker.visible
    player.names.value = True
    assert all(label.visible for label in player.labels)


def test_two_motions_of_different_length_and_rate(clean):
    player = viewer.build(clean, [clip(12), clip(48, fps=60.0, text="")])
    assert player.frames == 24
    player.show(20)
    assert [figure.frame_at(player.seconds) for figure in player.figures] == [11, 40]
    gap = player.figures[1].points[0, 0] - player.figures[0].points[0, 0]
    np.testing.assert_allclose(gap, [viewer.SPACING, 0, 0], atol=1e-6)


def test_one_frame(clean):
    player = viewer.build(clean, clip(1))
    player.step(0.5)
    assert player.frame == 0


def test_no_motion_is_an_error(clean):
    with pytest.raises(UserError, match="at least one motion"):
        viewer.build(clean, [])


def test_view_serves_a_page_and_stops(monkeypatch):
    pages = []

    def once(player):
        player.step(0.1)
        with urllib.request.urlopen(f"http://127.0.0.1:{player.server.get_port()}", timeout=10) as page:
            pages.append(page.status)

    monkeypatch.setattr(viewer, "run", once)
    monkeypatch.setattr(viewer.webbrowser, "open", lambda url: pages.append(url))
    viewer.view(clip(), port=free_port())
    assert pages[0].startswith("http://127.0.0.1:") and pages[1] == 200


def test_an_interrupt_ends_the_run(clean, monkeypatch):
    player = viewer.build(clean, clip())

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(player, "step", interrupt)
    viewer.run(player)


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("203.0.113.1", 8080, "cannot serve the viewer at 203.0.113.1:8080"),
        ("127.0.0.1", 80_000, "from 1 to 65535"),
        ("127.0.0.1", 0, "from 1 to 65535"),
    ],
)
def test_addresses_that_cannot_be_served(host, port, message):
    with pytest.raises(UserError, match=message):
        viewer.view(clip(), host=host, port=port, open_browser=False)


def test_a_port_in_use_is_replaced(server, monkeypatch):
    ports = []
    monkeypatch.setattr(viewer, "run", lambda player: ports.append(player.server.get_port()))
    viewer.view(clip(), port=server.get_port(), open_browser=False)
    assert ports and ports[0] != server.get_port()
