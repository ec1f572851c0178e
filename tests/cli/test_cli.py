"""The commands' shape: help with an example, exit codes, and a start that imports nothing heavy."""

import json
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest

from kinetok.motion import Motion
from kinetok.motion.skeleton import CANONICAL_OFFSETS
from kinetok.runtime.backends import BACKENDS

COMMANDS = (
    "generate",
    "view",
    "convert",
    "embed",
    "import-checkpoint",
    "verify-checkpoint",
    "train",
    "evaluate",
    "doctor",
    "aot",
    "bench",
    "quantize",
    "data",
    "verify",
)


@pytest.mark.parametrize(
    "command", [*((name,) for name in COMMANDS), ("train", "tokenizer"), ("train", "decoder"), ("evaluate", "default")]
)
def test_help_shows_an_example(kinetok, command):
    result = kinetok(*command, "--help")
    assert result.code == 0 and "Example" in result.out and f"kinetok {command[0]}" in result.out


def test_no_command_lists_them_all(kinetok):
    result = kinetok()
    assert result.code == 0 and all(name in result.out for name in COMMANDS)


def test_help_imports_nothing_heavy():
    program = (
        "import sys; sys.argv = ['kinetok', '--help']\n"
        "from kinetok.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'numpy', 'transformers', 'safetensors'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.strip() == "[]"


def test_a_bug_keeps_its_traceback(kinetok, monkeypatch, tmp_path):
    def broken(path):
        raise ZeroDivisionError

    monkeypatch.setattr(Motion, "load", broken)
    with pytest.raises(ZeroDivisionError):
        kinetok("convert", tmp_path / "a.npz", tmp_path / "b.npz")


def test_an_interrupt_is_one_line(kinetok, monkeypatch, tmp_path):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(Motion, "load", interrupted)
    result = kinetok("convert", tmp_path / "a.npz", tmp_path / "b.npz")
    assert (result.code, result.out, result.err) == (130, "", "kinetok: interrupted\n")


def test_an_interrupt_of_the_imports_is_one_line_too(capsys, monkeypatch):
    from kinetok import __main__ as entry

    class Interrupted(ModuleType):
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "kinetok.cli", Interrupted("kinetok.cli"))
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 130 and capsys.readouterr().err == "kinetok: interrupted\n"


def test_convert_between_all(kinetok, tmp_path):
    source = tmp_path / "clip.npz"
    root = np.stack([np.linspace(0, 1, 20), np.full(20, 0.9), np.zeros(20)], axis=-1)
    Motion(rotations=np.broadcast_to(np.eye(3), (20, 22, 3, 3)), root=root, offsets=CANONICAL_OFFSETS).save(source)
    for suffix in ("bvh", "glb", "npz"):
        target = tmp_path / f"other.{suffix}"
        result = kinetok("convert", source, target)
        assert result.code == 0 and str(target) in result.out
        np.testing.assert_allclose(Motion.load(target).joints, Motion.load(source).joints, atol=1e-4)
        source = target
    tall = tmp_path / "tall.bvh"
    assert kinetok("convert", source, tall, "--up", "Z", "--scale", 100).code == 0
    assert "Frames: 20" in tall.read_text(encoding="utf-8")


def test_doctor(kinetok, monkeypatch):
    from kinetok.runtime import memory
    from kinetok.runtime.bench import clock

    for name in ("copy_bandwidth", "read_bandwidth", "matmul_rate"):
        monkeypatch.setattr(clock, name, lambda *_: 2e10)
    monkeypatch.setattr(memory, "bytes_available", lambda device: 6 * 10**9)
    result = kinetok("doctor", "--json")
    report = json.loads(result.out)
    assert result.code == 0 and report["packages"]["torch"]["version"] and report["threads"] >= 1
    assert {"device", "driver", "default_model", "machine"} <= set(report)
    assert report["attention"]["sdpa"] is None and report["backends"]["torch"] is None
    assert {"norm", "linear", "attention"} <= set(report["kernels"])
    assert set(BACKENDS) <= set(report["backends"]) and report["default_model"]["backend_reason"]
    assert [set(row["bytes_by_precision"]) for row in report["memory"]["needed"]] == 9 * [
        {"fp32", "bf16", "int8", "fp8", "int4"}
    ]
    assert [line.split(" with")[0] for line in report["plan"]] == ["7B in int4", "3B in int8", "default in fp32"]
    assert ["slow" in line for line in report["plan"]] == [True, True, False]
    assert report["measured"]["copy_gb_per_s"] == 20 and len(report["memory"]["needed"]) == 9
    text = kinetok("doctor", "--characters", "64").out
    assert all(name in text for name in ("torch", "pybvh", "viser", "device", "default model", "copy_gb_per_s 20.0"))
    assert f"backend of the default model: {report['default_model']['backend']}, " in text
    assert "plan: 3B in int4 with 64" not in text and "plan: default in fp32 with 64 characters" in text


def test_doctor_says_why_nothing_runs_on_a_gpu(monkeypatch):
    from kinetok.cli import doctor

    card = ["NVIDIA H100, 570.1"]
    monkeypatch.setattr("torch.version.cuda", None)
    assert "without CUDA" in doctor._no_cuda([]) and "reports no GPU" in doctor._no_cuda([])
    assert "H100, 570.1, but this torch" in doctor._no_cuda(card)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert doctor._no_cuda([]) == "torch finds no CUDA device" and "though" in doctor._no_cuda(card)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert "onnx and onnxruntime" in doctor._backends(None)["onnx"] and doctor._backends(None)["fused"] is None
    assert "triton is not installed" in doctor._kernels(None)["norm"] and "H100" in doctor._kernels("H100")["norm"]


def test_verify_exits_with_one_when_arrays_differ(kinetok, model, tmp_path):
    against = tmp_path / "saved.npz"
    features = np.random.default_rng(0).standard_normal((4, 12)).astype(np.float32)
    np.savez(against, text_features=features, first_logits=np.full(241, 1e3, np.float32))
    result = kinetok("verify-checkpoint", model, "--against", against)
    assert result.code == 1 and "FAIL" in result.out and result.err == ""
