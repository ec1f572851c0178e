"""The house: rooms reached through links, nothing bare importable, few dependencies, a small tree."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "motion", "model", "runtime", "train", "export")
OPTIONAL = ["transformers", "pybvh", "pygltflib", "PIL", "imageio_ffmpeg", "viser", "tensorboard", "scipy", "pywt"]
OPTIONAL += ["onnx", "triton", "matplotlib"]
POSIX_ONLY = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "syslog"}


def tracked() -> list[Path]:
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("not a git checkout, so there is no list of tracked files")
    return [ROOT / name for name in run.stdout.split("\0") if name]


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_links_and_refuse_to_be_bare(room: str) -> None:
    link = ROOT / "src" / "kinetok" / room
    assert link.is_symlink() and link.resolve() == ROOT / room
    run = subprocess.run([sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode and "ImportError" in run.stderr


def test_the_tree_is_small_and_names_no_machine() -> None:
    files = [path for path in tracked() if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in files) < 50e6
    assert max(path.stat().st_size for path in files) <= 15e6
    needles = [b"/wo" + b"rk/", b"pypi" + b".org", b"registry.npm" + b"js"]
    found = [path.name for path in files if any(needle in path.read_bytes() for needle in needles)]
    assert found == []


def test_every_operator_family_has_its_test() -> None:
    families = {path.parent.name for path in (ROOT / "kernels").glob("*/reference.py")}
    assert families | {"ops", "launcher"} == {  # and what holds for all of them
        path.stem.removeprefix("test_") for path in (ROOT / "tests" / "kernels").glob("test_*.py")
    }


def test_the_public_names_need_few_packages_and_no_network() -> None:
    program = f"""
import importlib.util, socket, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name.split(".")[0] in {OPTIONAL!r} else find(name)
def refuse(*_, **__): raise OSError("no network here")
socket.socket.connect = refuse
import kinetok, kinetok.cli
from kinetok import Engine, Motion, SamplingParams, load
print(len(load().generate("a person walks forward", seconds=1)[0]))
"""
    environment = {"PYTHONPATH": str(ROOT / "src"), "PATH": ""}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.stdout.split() == ["30"], run.stderr


def test_the_package_calls_nothing_that_only_posix_has() -> None:
    for path in (path for room in (*ROOMS, "src/kinetok/cli") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            assert not POSIX_ONLY & set(names), path
            posix = isinstance(node, ast.Attribute) and node.attr in ("fork", "setsid", "getuid", "mkfifo")
            assert not (posix and ast.unparse(node.value) == "os"), path
