"""Whatever a user gets wrong: one line that says what was expected, exit code 2, and nothing left behind."""

import errno
import os
import sys

import numpy as np
import pytest
import torch

from kinetok.model.restricted import read_tensors
from kinetok.motion import Motion
from kinetok.motion.skeleton import CANONICAL_OFFSETS

WALK = "a person walks forward"


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def motion():
    rotations = np.broadcast_to(np.eye(3), (8, 22, 3, 3))
    return Motion(rotations=rotations, root=np.tile([0.0, 0.9, 0.0], (8, 1)), offsets=CANONICAL_OFFSETS)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", "empty prompt"),
        (" \t\n ", "empty prompt"),
        ("walk " * 20_000, "characters, got 100000"),
        ("a person \udcff walks", "plain text"),
        ("a person \x00 walks", "plain text"),
    ],
)
def test_prompts(refused, model, tmp_path, prompt, expected):
    assert expected in refused("generate", prompt, "--model", model, "-o", tmp_path / "out")
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "one prompt a line"),
        (b"\n  \n", "one prompt a line"),
        (b"a person walks\n\xff\xfe\n", "UTF-8"),
        (b"a person walks\n" + b"x" * 100_000, "line 2"),
        (None, "cannot read"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "embed"])
def test_prompt_files(refused, model, tmp_path, command, content, expected):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    before = tree(tmp_path)
    source = ("--prompts", file) if command == "generate" else (file,)
    assert expected in refused(command, *source, "--model", model, "-o", tmp_path / "out")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--seconds", "-1"), "seconds"),
        (("--seconds", "0"), "seconds"),
        (("--seconds", "1e9"), "0.001 to 600"),
        (("--seconds", "nan"), "seconds"),
        (("--seconds", "long"), "--seconds"),
        (("--seed", "-1"), "seed"),
        (("--seed", str(2**64)), "seed"),
        (("--temperature", "-0.5"), "temperature"),
        (("--top-p", "1.5"), "top_p"),
        (("--top-k", "-1"), "top_k"),
        (("--guidance", "inf"), "guidance"),
        (("--max-tokens", "0"), "max_tokens"),
        (("--format", "fbx"), "fbx"),
        (("--format", ","), "--format"),
        (("--device", "toaster"), "'cpu', 'cuda'"),
        (("--device", "meta"), "'cpu', 'cuda'"),
        (("--device", f"cuda:{torch.cuda.device_count()}"), "CUDA devices"),
        (("--dtype", "int3"), "int3"),
        (("--secnds", "3"), "--seconds"),
        (("--backend", "vulkan"), "tensorrt:DIR"),
        (("--backend", "onnx:."), "."),
        (("--kv", "int3"), "kv: expected one of auto, fp32, fp16, bf16, fp8, got"),
        (("--kv", "bf16"), "kv: this model keeps keys and values as auto, fp32"),
        (("--kv", "fp8"), "kv: fp8 is for the backend fused alone"),
        (("--kv", "fp8", "--backend", "torch"), "kv: fp8 is for the backend fused alone"),
        (("--kv", "fp32", "--backend", "onnx:."), "kv: expected auto, for kinetok export has fixed"),
    ],
)
def test_options(refused, model, tmp_path, options, expected):
    assert expected in refused("generate", WALK, "--model", model, "-o", tmp_path / "out" / "deep", *options)
    assert tree(tmp_path) == []


@pytest.mark.parametrize("arguments", [("genrate",), ("generate",), ("train",), ("convert", "a.bvh"), ("--colour",)])
def test_usage_errors_are_one_line(refused, arguments):
    refused(*arguments)


def test_unknown_model(refused, tmp_path):
    assert "unknown model" in refused("generate", WALK, "--model", "./no-such-model", "-o", tmp_path / "out")
    assert "unknown model" in refused("embed", __file__, "--model", "./no-such-model", "-o", tmp_path / "bank")
    assert tree(tmp_path) == []


def test_a_prompt_without_an_encoder(refused, model, tmp_path):
    assert "not in the bank" in refused("generate", "a cat sleeps", "--model", model, "-o", tmp_path / "out")
    assert tree(tmp_path) == []


@pytest.mark.parametrize("damage", ["truncated", "not json", "missing"])
def test_damaged_model(refused, model, tmp_path, damage):
    copy = tmp_path / "model"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    if damage == "truncated":
        shard = next(copy.glob("decoder-*"))
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "not json":
        (copy / "kinetok.json").write_text("{", encoding="utf-8")
    else:
        next(copy.glob("tokenizer-*")).unlink()
    refused("generate", WALK, "--model", copy, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Attack:
    def __reduce__(self):
        return os.system, ("echo ran > ran.txt",)


@pytest.mark.parametrize("kind", ["code", "code in place of tensors", "truncated", "empty", "text", "missing"])
def test_hostile_checkpoints(refused, golden, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    decoder = tmp_path / "decoder.pth"
    whole = golden("transformer_small.pth").read_bytes()
    if kind == "code":
        torch.save(Attack(), decoder)
    elif kind == "code in place of tensors":
        # The matrices stay, so that reading goes on until the weights are looked at one by one.
        weights = read_tensors(golden("transformer_small.pth"))["trans"]
        torch.save({"trans": {name: w.clone() if w.ndim > 1 else Attack() for name, w in weights.items()}}, decoder)
    elif kind != "missing":
        decoder.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}[kind])
    np.save("mean.npy", np.zeros(272))
    np.save("std.npy", np.ones(272))
    before = tree(tmp_path)
    line = refused(
        "import-checkpoint", "out", "--decoder", decoder, "--tokenizer", golden("tokenizer_p1.pth"),
        "--mean", "mean.npy", "--std", "std.npy", "--config", "n_head=4",
    )  # fmt: skip
    assert "decoder.pth" in line and (kind != "code in place of tensors" or "ln_f.scale (expected a tensor" in line)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("mean", np.zeros(271)),
        ("mean", np.full(272, np.nan)),
        ("std", np.ones(263)),
        ("std", np.zeros(272)),
        ("std", np.where(np.arange(272) == 5, 0.0, 1.0)),
        ("std", np.array([Attack()] * 272, dtype=object)),
    ],
)
def test_statistics(refused, golden, tmp_path, monkeypatch, name, values):
    monkeypatch.chdir(tmp_path)
    for file, array in {"mean": np.zeros(272), "std": np.ones(272), name: values}.items():
        np.save(f"{file}.npy", array)
    before = tree(tmp_path)
    line = refused(
        "import-checkpoint", "out", "--decoder", golden("transformer_small.pth"), "--tokenizer",
        golden("tokenizer_p1.pth"), "--mean", "mean.npy", "--std", "std.npy",
    )  # fmt: skip
    assert f"{name}" in line
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "damage", ["missing joints", "no frames", "nan", "truncated", "empty", "bytes", "not a number", "missing"]
)
def test_bvh(refused, motion, tmp_path, damage):
    source = tmp_path / "clip.bvh"
    motion.save(source)
    text = source.read_text(encoding="utf-8")
    head, _, rows = text.partition("Frame Time:")
    time, *lines = rows.strip().split("\n")
    if damage == "missing joints":
        text = (
            "HIERARCHY\nROOT Hips\n{\nOFFSET 0 0 0\nCHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation "
            "Yrotation\nEnd Site\n{\nOFFSET 0 1 0\n}\n}\nMOTION\nFrames: 1\nFrame Time: 0.033333\n0 0 0 0 0 0\n"
        )
    elif damage == "no frames":
        text = head.replace("Frames: 8", "Frames: 0") + f"Frame Time: {time}\n"
    elif damage == "nan":
        text = text.replace(lines[3], " ".join(["nan", *lines[3].split()[1:]]))
    elif damage == "truncated":
        text = text[: len(text) * 2 // 3]
    elif damage == "empty":
        text = ""
    elif damage == "not a number":
        text = text.replace(lines[3], " ".join(["much", *lines[3].split()[1:]]))
    source.write_text(text, encoding="utf-8")
    if damage == "bytes":
        source.write_bytes(b"HIERARCHY\xff\x00\x9c")
    elif damage == "missing":
        source.unlink()
    before = tree(tmp_path)
    assert "clip.bvh" in refused("convert", source, tmp_path / "clip.glb")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("suffix", ["glb", "npz", "npy"])
@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_other_motion_files(refused, motion, tmp_path, suffix, content):
    source = tmp_path / f"clip.{suffix}"
    motion.save(source)
    source.write_bytes(content if content is not None else source.read_bytes()[:-40])
    assert f"clip.{suffix}" in refused("convert", source, tmp_path / "clip.bvh")
    assert tree(tmp_path) == [source.name]


def test_convert_options(refused, motion, tmp_path):
    source = tmp_path / "clip.npz"
    motion.save(source)
    assert "Y" in refused("convert", source, tmp_path / "clip.bvh", "--up", "W")
    assert "scale" in refused("convert", source, tmp_path / "clip.bvh", "--scale", "0")
    assert "--up" in refused("convert", source, tmp_path / "clip.glb", "--up", "Z")
    assert ".fbx" in refused("convert", source, tmp_path / "clip.fbx")
    assert tree(tmp_path) == ["clip.npz"]


def test_a_file_in_place_of_a_folder(refused, model, motion, tmp_path):
    blocked = tmp_path / "blocked"
    blocked.write_text("mine", encoding="utf-8")
    clip = tmp_path / "clip.npz"
    motion.save(clip)
    refused("generate", WALK, "--model", model, "-o", blocked)
    refused("generate", WALK, "--model", model, "-o", blocked / "below")
    refused("convert", clip, blocked / "clip.bvh")
    refused("convert", clip, tmp_path)
    refused("embed", blocked, "-o", blocked / "bank")
    assert "folder" in refused("generate", WALK, "--model", model, "-o", tmp_path / "walk.bvh")
    assert tree(tmp_path) == ["blocked", "clip.npz"] and blocked.read_text(encoding="utf-8") == "mine"


def test_a_name_that_is_too_long(refused, model, tmp_path):
    long = "a" * 300
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(WALK, encoding="utf-8")
    for out in (tmp_path / long, tmp_path / "new" / long):
        assert "cannot write" in refused("generate", WALK, "--model", model, "-o", out)
        assert "cannot write" in refused("evaluate", "prompts", "--model", model, "-o", out)
    assert "cannot write" in refused("embed", prompts, "-o", tmp_path / long)
    assert "expected a folder" in refused("generate", WALK, "--model", model, "-o", tmp_path / f"{long}.bvh")
    assert tree(tmp_path) == ["prompts.txt"]


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root writes to read-only folders as well")
def test_a_read_only_folder(refused, model, motion, tmp_path):
    clip = tmp_path / "clip.npz"
    motion.save(clip)
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    refused("generate", WALK, "--model", model, "-o", folder)
    refused("convert", clip, folder / "clip.bvh")
    assert tree(folder) == []


@pytest.mark.parametrize("suffix", ["bvh", "glb", "npz", "npy", "png"])
def test_a_full_disk(refused, motion, tmp_path, monkeypatch, suffix):
    source = tmp_path / "clip.npz"
    motion.save(source)
    target = tmp_path / f"other.{suffix}"
    target.write_text("the file of an earlier run", encoding="utf-8")
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no device that is always full")

    def full(*, prefix, suffix, dir):
        link = os.path.join(dir, f"{prefix}full{suffix}")
        os.symlink("/dev/full", link)
        return os.open(os.devnull, os.O_RDWR), link

    with monkeypatch.context() as patch:
        patch.setattr("kinetok.files.tempfile.mkstemp", full)
        assert "No space left on device" in refused("convert", source, target)
    assert tree(tmp_path) == sorted([source.name, target.name])
    assert target.read_text(encoding="utf-8") == "the file of an earlier run"


def test_a_disk_that_fills_up_at_the_rename(refused, model, tmp_path, monkeypatch):
    def full(self, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.replace", full)
    line = refused("generate", WALK, "--model", model, "-o", tmp_path, "--format", "npz", "--seconds", 0.2)
    assert os.strerror(errno.ENOSPC) in line
    assert tree(tmp_path) == []


def test_train_and_verify(refused, model, tmp_path):
    assert "recipe" in refused("train", "tokenizer", "--recipe", "maxi", "--out", tmp_path / "run")
    refused("train", "tokenizer", "--data", tmp_path / "nothing", "--out", tmp_path / "run")
    refused("train", "decoder", "--tokenizer", tmp_path / "nothing.pt", "--out", tmp_path / "run")
    refused("verify-checkpoint", model, "--against", tmp_path / "nothing.npz")
    refused("verify-checkpoint", tmp_path / "nothing", "--against", __file__)
    assert tree(tmp_path) == []
