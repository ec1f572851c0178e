"""What a user can get wrong: one line that says what was expected, exit code 2, nothing half-written."""

import errno
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("prompt", "says"),
    [("", "empty"), ("  ", "empty"), ("x" * 100_000, "10000"), ("a\x00b", "U+0000")],
)
def test_prompts(refused, model, tmp_path: Path, prompt: str, says: str) -> None:
    assert says in refused("generate", prompt, "--model", model, "-o", tmp_path / "out")
    assert files(tmp_path) == []


@pytest.mark.parametrize("value", ["-1", "0", "1e9", "nan", "11"])
def test_seconds(refused, model, tmp_path: Path, value: str) -> None:
    assert "seconds" in refused("generate", "walk", "--model", model, f"--seconds={value}", "-o", tmp_path / "out")
    assert files(tmp_path) == []


def test_prompt_files(refused, model, tmp_path: Path) -> None:
    bad = tmp_path / "prompts.txt"
    for content, says in ((b"a person \xff walks\n", "UTF-8"), (b"\n \n", "none"), (b"ok\n" + b"y" * 20_000, "line 2")):
        bad.write_bytes(content)
        assert says in refused("generate", "--prompts", bad, "--model", model, "-o", tmp_path / "out")
    assert "cannot read" in refused("generate", "--prompts", tmp_path / "absent", "-o", tmp_path / "out")
    assert files(tmp_path) == ["prompts.txt"]


def test_models(refused, tmp_path: Path) -> None:
    assert "unknown model" in refused("generate", "walk", "--model", "nowhere", "-o", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "kinetok.json" in refused("generate", "walk", "--model", tmp_path / "empty", "-o", tmp_path / "out")


def test_output_that_cannot_be_written(refused, model, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "out").write_text("a file")
    assert "cannot write" in refused("generate", "a person runs", "--model", model, "-o", tmp_path / "out")
    before = files(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    arguments = ("generate", "a person runs", "--model", model, "--format", "npz", "-o", tmp_path / "full")
    assert "No space left" in refused(*arguments)
    assert [name for name in files(tmp_path) if name not in before] == ["full"]


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_checkpoints(refused, tmp_path: Path, golden) -> None:
    mean, std = tmp_path / "mean.npy", tmp_path / "std.npy"
    np.save(mean, np.zeros(272))
    np.save(std, np.ones(272))
    tokenizer, decoder = golden("tokenizer_p1.pth"), golden("transformer_small.pth")
    marker = tmp_path / "marker"
    torch.save({"net": Attack(marker)}, tmp_path / "hostile.pth")
    with zipfile.ZipFile(tmp_path / "hostile.pth") as archive:
        assert b"mkdir" in archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Attack(marker)))
    (tmp_path / "short.pth").write_bytes(tokenizer.read_bytes()[:50_000])
    np.save(tmp_path / "long.npy", np.ones(273))
    np.save(tmp_path / "zeros.npy", np.zeros(272))
    before = files(tmp_path)

    def said(**changes) -> str:
        paths = {"tokenizer": tokenizer, "decoder": decoder, "mean": mean, "std": std, **changes}
        options = [text for name, path in paths.items() for text in (f"--{name}", path)]
        return refused("import-checkpoint", tmp_path / "model", *options, "--config", "n_head=4")

    assert "hostile.pth" in said(tokenizer=tmp_path / "hostile.pth")
    assert "plain.pth" in said(tokenizer=tmp_path / "plain.pth")
    assert "short.pth" in said(tokenizer=tmp_path / "short.pth")
    assert "272" in said(mean=tmp_path / "long.npy")
    assert "positive" in said(std=tmp_path / "zeros.npy")
    assert "absent" in said(decoder=tmp_path / "absent")
    assert files(tmp_path) == before and not marker.exists()


BVH = """HIERARCHY
ROOT Hips
{
 OFFSET 0 0 0
 CHANNELS 6 Xposition Yposition Zposition Zrotation Yrotation Xrotation
 End Site
 {
  OFFSET 0 1 0
 }
}
MOTION
Frames: FRAMES
Frame Time: 0.0333333
ROWS
"""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BVH.replace("FRAMES", "1").replace("ROWS", "0 0 0 0 0 0"), "left_hip"),
        (BVH.replace("FRAMES", "0").replace("ROWS", ""), "frames"),
        (BVH.replace("FRAMES", "1").replace("ROWS", "0 nan 0 0 0 0"), "NaN"),
        (BVH.replace("FRAMES", "9").replace("ROWS", "0 0 0 0 0 0"), "truncated"),
        (BVH[:60], "MOTION"),
        ("not a figure", "HIERARCHY"),
        ("", "HIERARCHY"),
        (BVH.replace("}\nMOTION", "MOTION").replace("FRAMES", "1").replace("ROWS", "0 0 0 0 0 0"), "braces"),
    ],
)
def test_bvh(refused, tmp_path: Path, text: str, says: str) -> None:
    source = tmp_path / "a.bvh"
    source.write_text(text)
    assert says in refused("convert", source, tmp_path / "b.glb")
    assert files(tmp_path) == ["a.bvh"]


@pytest.mark.parametrize("suffix", ["bvh", "glb", "npz", "npy"])
def test_files_of_noise(refused, tmp_path: Path, suffix: str) -> None:
    source = tmp_path / f"a.{suffix}"
    source.write_bytes(np.random.default_rng(0).bytes(3000))
    refused("convert", source, tmp_path / "b.npz")
    assert "cannot read" in refused("convert", tmp_path / f"absent.{suffix}", tmp_path / "b.npz")
    assert files(tmp_path) == [source.name]


def test_words_that_do_not_exist(refused) -> None:
    for arguments in (("walk",), ("generate", "--nope"), ("train", "tokenizer", "--recipe", "maxi"), ("generate",)):
        refused(*arguments)
