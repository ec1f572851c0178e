"""The C++ library: built and run under AddressSanitizer and UBSan, its numbers compared with Python's.

KINETOK_CPP_BUILD=DIR keeps the build, which takes most of the time. KINETOK_CAPTIONS=10000 compares as many sentences.
"""

import math
import os
import random
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from kinetok.kernels.kinematics.reference import _matrix_from_quaternion
from kinetok.kernels.sampling import draw, guide, gumbel
from kinetok.model.pretrained import load_pretrained
from kinetok.model.text_minilm import MiniLM
from kinetok.motion import Motion
from kinetok.runtime.crowd import _stand
from kinetok.runtime.sampling import SamplingParams, token_budget
from kinetok.runtime.scheduler import Job, Scheduler

SOURCE = Path(__file__).resolve().parents[2] / "runtime" / "cpp"
SANITIZERS = "address,undefined"
CAPTIONS = int(os.environ.get("KINETOK_CAPTIONS", "1500"))


def _needs() -> str | None:
    """What is missing here, or None."""
    for program in ("cmake", os.environ.get("CXX", "c++")):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    for package in ("onnx", "onnxruntime"):
        try:
            __import__(package)
        except ImportError:
            return f"the package {package} is not installed: pip install 'kinetok[onnx]'"
    return None


pytestmark = pytest.mark.skipif(_needs() is not None, reason=str(_needs()))


def _run(*command: object, data: bytes | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([str(word) for word in command], input=data, capture_output=True, env=env)
    said = done.stdout.decode() + done.stderr.decode()
    assert done.returncode == 0, f"{command[0]}: exit code {done.returncode}\n{said[-4000:]}"
    return done.stdout.decode()


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    import onnxruntime

    library = next((Path(onnxruntime.__file__).parent / "capi").glob("*onnxruntime.so.*"))
    return {
        **os.environ,
        "KINETOK_ONNXRUNTIME": str(library),
        "ORT_DISABLE_TELEMETRY": "1",
        # ONNX Runtime keeps what it has until the process ends.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    kept = os.environ.get("KINETOK_CPP_BUILD")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("cpp")
    options = {
        "KINETOK_TESTS": "ON",
        "KINETOK_EXAMPLES": "ON",
        "KINETOK_SANITIZE": SANITIZERS,
        "CMAKE_BUILD_TYPE": "None",
        "CMAKE_CXX_FLAGS": "-O1 -Werror",
        "CMAKE_INSTALL_PREFIX": folder / "installed",
    }
    _run("cmake", "-S", SOURCE, "-B", folder, *[f"-D{name}={value}" for name, value in options.items()])
    _run("cmake", "--build", folder, "--parallel", "2")
    return folder


@pytest.fixture(scope="module")
def model():
    return load_pretrained(None, "cpu", "float32")


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory) -> Path:
    from kinetok.export.bundle import export_bundle

    return export_bundle(model, tmp_path_factory.mktemp("bundle") / "default", check=False)


def test_the_tests_of_the_library_itself(build, bundle, environment, tmp_path) -> None:
    for program in ("kinetok_tests", "kinetok_allocations"):
        print(_run(build / "tests" / program, bundle, tmp_path, env=environment))


def test_damaged_manifests_only_give_errors(build, bundle, environment) -> None:
    print(_run(build / "tests" / "kinetok_fuzz_bundle", bundle / "kinetok_bundle.json", 3, env=environment))


def test_an_installed_package_is_found_and_used(build, bundle, environment, tmp_path) -> None:
    _run("cmake", "--install", build)
    flags = f"-fsanitize={SANITIZERS}"
    _run("cmake", "-S", SOURCE / "tests" / "consumer", "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={build / 'installed'}",
         f"-DCMAKE_C_FLAGS={flags} -Wall -Wextra -Werror -std=c99 -pedantic", f"-DCMAKE_EXE_LINKER_FLAGS={flags}")  # fmt: skip
    _run("cmake", "--build", tmp_path)
    said = _run(tmp_path / "consumer", bundle, env=environment)
    height = float(said.split(" at ")[1].split()[0])
    assert said.startswith("version 100,") and 0.5 < height < 1.3


def _cases(count: int):
    """Draws of every kind over logits of odd sizes, with ties and banned tokens."""
    rng = np.random.default_rng(5)
    for number in range(count):
        classes = int(rng.choice([2, 3, 5, 97, 1001, 4376]))
        logits, empty = (rng.normal(0, 3, classes).astype(np.float32) for _ in range(2))
        if number % 3 == 0:
            logits, empty = logits.round(), empty.round()
        yield {
            "seed": int(rng.integers(0, 2**64, dtype=np.uint64)),
            "position": int(rng.integers(0, 2**33)),
            "request": int(rng.integers(0, 2**32)),
            "top_k": int(rng.choice([0, 1, 2, 50, 5000])),
            "temperature": float(rng.choice([0.0, 0.1, 0.7, 1.0, 1.3])),
            "top_p": float(rng.choice([1.0, 0.99999, 0.95, 0.9, 0.31, 1e-4])),
            "guidance": float(rng.choice([1.0, 0.0, 2.5, 7.1])),
            "banned": int(rng.integers(0, 2 * classes)),
            "logits": logits,
            "empty": empty,
        }


def _drawn(case) -> int:
    logits, empty = (torch.from_numpy(case[name])[None] for name in ("logits", "empty"))
    scores = guide(logits, empty, case["guidance"]) if case["guidance"] != 1 else logits.clone()
    if case["banned"] < scores.shape[1]:
        scores[:, case["banned"]] = -torch.inf
    seed = case["seed"] - (case["seed"] >> 63 << 64)
    key, position, request = (torch.tensor([value]) for value in (seed, case["position"], case["request"]))
    noise = gumbel(scores.shape[1], key, position, request)
    return int(draw(scores, noise, **{name: case[name] for name in ("temperature", "top_k", "top_p")}))


def test_stored_logits_give_the_same_tokens(build, environment) -> None:
    data, expected = b"", []
    for case in _cases(400):
        head = [case[name] for name in ("seed", "position", "request", "top_k")] + [len(case["logits"]), case["banned"]]
        data += struct.pack("<QQIIIIddd", *head, case["temperature"], case["top_p"], case["guidance"])
        data += case["logits"].tobytes() + case["empty"].tobytes()
        expected.append(_drawn(case))
    got = [int(line) for line in _run(build / "tests" / "kinetok_probe", "sample", data=data, env=environment).split()]
    assert got == expected


def _split(text: str) -> list[str]:
    return text.split(" ")


def _captions(count: int) -> list[str]:
    """Sentences, and what nobody would write: all scripts, marks, odd spaces, special tokens, endless words."""
    rng = random.Random(7)
    words = _split(
        "a person walks Forward, slowly; turns-left & right (twice)... naïve café İstanbul 日本語 한국어 straße ДОМ"
    )
    odd = _split("[SEP] [MASK] [sep] \u200b e\u0301 \ufb01 👩\u200d👩\u200d👧 … ﷺ ǆ")
    odd += ["x" * 101, "\u3000", "\t", "\r\n", "\u0085", "\u00a0"]
    scripts = [
        (0x20, 0x7F),
        (0xA0, 0x250),
        (0x370, 0x530),
        (0x590, 0x700),
        (0x900, 0xE00),
        (0x1E00, 0x2100),
        (0x3000, 0x3100),
    ]
    scripts += [(0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0xE000, 0x10000), (0x10000, 0x20000), (0x2F800, 0x2FA20)]
    captions = []
    for _ in range(count):
        parts = []
        for _ in range(rng.choice([1, 3, 8, 20])):
            kind = rng.random()
            if kind < 0.7:
                parts.append(rng.choice(words) + rng.choice(["", "", "s", "ing", "ed", "!"]))
            elif kind < 0.85:
                parts.append(rng.choice(odd))
            else:
                low, high = rng.choice(scripts)
                parts.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 6))))
        captions.append(rng.choice([" ", " ", "  ", ""]).join(parts))
    return captions


def test_ids_are_those_of_python(build, bundle, environment) -> None:
    encoder = MiniLM()
    captions = _captions(CAPTIONS)
    data = b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in captions)
    lines = _run(build / "tests" / "kinetok_probe", "ids", bundle, data=data, env=environment).splitlines()
    assert len(lines) == len(captions)
    for text, line in zip(captions, lines, strict=True):
        assert [int(word) for word in line.split()] == encoder.tokenizer.encode(text).ids[:149], repr(text)


def _python(model, bundle: Path, steps, seed, request, temperature, top_k, top_p, guidance, seconds) -> list[int]:
    """The same clip through the Python scheduler on the same graphs. steps: (prompt, tokens under it)."""
    from kinetok.model.bank import PromptBank
    from kinetok.runtime.backends.onnx import OnnxBackend
    from kinetok.runtime.bundle import read_bundle

    bank, config = PromptBank.load(model.bank), model.decoder.config
    rate = model.tokenizer.config.tokens_per_second
    rows = 1 if guidance == 1 else 2
    scheduler = Scheduler(OnnxBackend(read_bundle(bundle), rows, config.block_size), config, 1)
    params = SamplingParams(
        seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance, seconds=seconds
    )

    def job(text: str, written: int) -> Job:
        features, empty = bank.encode([text])[0], bank.features[""]
        room = config.block_size - max(len(features), len(empty))
        least, most = token_budget(params, model.sampling, rate, room)
        window = min(round(10 * rate), room)
        return Job(text=features, empty=empty if rows == 2 else None, params=params, least=written + least,
                   most=written + most, request=request, window=window, keep=min(round(5 * rate), window // 2))  # fmt: skip

    character = None
    for prompt, count in steps:
        if character is None:
            character = scheduler.submit(job(prompt, 0))
        else:
            scheduler.redirect(character, job(prompt, len(character.tokens)), round(rate))
        for _ in range(count):
            scheduler.step()
            if character.over:
                break
    assert character is not None and character.error is None
    return list(character.tokens)


WALK, RUN, JUMP = "a person walks forward", "a person runs", "a person jumps"


@pytest.mark.parametrize(
    ("how", "steps"),
    [
        ((7, 3, 1.0, 0, 0.9, 2.5, None), [(WALK, 150)]),  # until its end token
        ((2**64 - 1, 2**32 - 1, 0.8, 50, 1.0, 2.5, 4.0), [(RUN, 60)]),
        ((1, 0, 0.0, 0, 1.0, 1.0, 3.0), [(JUMP, 45)]),  # greedy, no guidance
        ((5, 1, 1.0, 0, 0.95, 2.5, math.inf), [(WALK, 20), (RUN, 20), (JUMP, 20)]),  # told otherwise twice
        ((9, 2, 1.0, 0, 0.9, 2.5, math.inf), [(WALK, 200)]),  # beyond its window
    ],
    ids=["end", "top_k", "greedy", "redirect", "window"],
)
def test_a_clip_has_the_tokens_of_python(model, bundle, build, environment, tmp_path, how, steps) -> None:
    seed, request, temperature, top_k, top_p, guidance, seconds = how
    ahead = 2 * steps[0][1]  # frames; the library stops when so many lie unread
    script = [f"new {seed} {request} {temperature} {top_k} {top_p} {guidance} {seconds or 0} {ahead} 9"]
    for prompt, _ in steps:
        script += [f"say {prompt}", "run", "read 3"]
    script = "\n".join([*script, "tokens", ""])
    said = _run(
        build / "tests" / "kinetok_probe", "generate", bundle, tmp_path / "f", data=script.encode(), env=environment
    )
    expected = _python(model, bundle, steps, *how)
    assert [int(word) for word in said.split()] == expected
    assert len(expected) > 20
    frames = np.concatenate([np.fromfile(tmp_path / f"f.{i}", np.float32).reshape(-1, 272) for i in range(len(steps))])
    scale, shift = (torch.from_numpy(x).float() for x in (model.std, model.mean))
    whole = model.tokenizer.decode(torch.tensor([expected]), scale, shift)[0].detach().numpy()
    assert frames.shape == whole.shape
    np.testing.assert_allclose(frames, whole, atol=2e-3)


def test_poses_are_those_of_python_in_every_layout(build, bundle, environment, tmp_path) -> None:
    script = ["new 3 0 1 0 0.9 2.5 3 200 9"]
    for layout in (3, 0):  # the features, and the same clip again as a pose, in two pieces
        script += [*(["new 3 0 1 0 0.9 2.5 3 40 9"] if layout == 0 else []), f"say {RUN}"]
        script += ["run", f"read {layout}"] * (1 if layout == 3 else 3)
    _run(
        build / "tests" / "kinetok_probe",
        "generate",
        bundle,
        tmp_path / "f",
        data="\n".join(script).encode(),
        env=environment,
    )
    features = np.fromfile(tmp_path / "f.0", np.float32).reshape(-1, 272)
    poses = np.concatenate([np.fromfile(tmp_path / f"f.{i}", np.float32).reshape(-1, 91) for i in (1, 2, 3)])
    rotations, root, _ = _stand(features, None)
    assert len(poses) == len(features) == 90
    np.testing.assert_allclose(poses[:, :3], root.numpy(), atol=1e-4)
    quaternions = torch.from_numpy(poses[:, 3:].reshape(-1, 4).astype(np.float64))
    matrix = _matrix_from_quaternion(quaternions[:, [3, 0, 1, 2]]).numpy()
    np.testing.assert_allclose(matrix.reshape(90, 22, 3, 3), rotations.numpy(), atol=1e-4)


def test_the_example_plays_and_writes_files_that_open(build, bundle, environment, tmp_path) -> None:
    said = _run(build / "examples" / "npc_crowd" / "npc_crowd", bundle, tmp_path, 2, 2, env=environment)
    assert said.splitlines()[-1].startswith("milliseconds a game frame: p50")
    for number in range(2):
        motion = Motion.load(tmp_path / f"npc_{number}.bvh")
        assert 16 <= len(motion) <= 60 and np.abs(np.asarray(motion.offsets)).max() > 0.3
