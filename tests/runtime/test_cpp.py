"""The C++ library: built and run under AddressSanitizer and UBSan, its numbers compared with Python's.

KINETOK_CPP_BUILD=DIR keeps the build, which takes most of the time.
"""

import math
import os
import struct
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from kinetok.kernels.kinematics import local_pose
from kinetok.kernels.sampling import draw, guide, gumbel
from kinetok.model.bank import PromptBank
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.pretrained import ModelBundle, load_pretrained
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion import Motion
from kinetok.motion.skeleton import CANONICAL_OFFSETS, PARENTS
from kinetok.runtime.sampling import CARRIED_SECONDS, KEPT_SECONDS, SamplingParams, token_budget
from kinetok.runtime.scheduler import Job, Scheduler

CAPTIONS = 1500  # benchmarks/runtime/captions.py does 10,000
BANKED, INLINE = 1, 8  # KT_OPEN_NO_TEXT, KT_OPEN_INLINE


@pytest.fixture(scope="module")
def build(cpp, tmp_path_factory) -> Path:
    kept = os.environ.get("KINETOK_CPP_BUILD")
    return cpp.build(
        Path(kept) if kept else tmp_path_factory.mktemp("cpp"),
        KINETOK_TESTS="ON",
        KINETOK_EXAMPLES="ON",
        KINETOK_SANITIZE="address,undefined",
        CMAKE_BUILD_TYPE="None",
        CMAKE_CXX_FLAGS="-O1 -Werror",
    )


@pytest.fixture(scope="module")
def model():
    return load_pretrained(None, "cpu", "float32")


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory) -> Path:
    from kinetok.export.bundle import export_bundle

    return export_bundle(model, tmp_path_factory.mktemp("bundle") / "default", check=False)


@pytest.fixture(scope="module")
def captions(script) -> ModuleType:
    return script("benchmarks/runtime/captions.py")


def test_the_tests_of_the_library_itself(cpp, build, bundle, tmp_path) -> None:
    for program in ("kinetok_tests", "kinetok_allocations"):
        print(cpp.own_tests(build, program, bundle, tmp_path))


def test_providers_that_are_not_here(cpp, build, bundle, tmp_path) -> None:
    stub = next((build / "tests").glob("*kinetok_stub_onnxruntime.*"))
    print(cpp.own_tests(build, "kinetok_stub_tests", bundle, tmp_path, KINETOK_ONNXRUNTIME=str(stub)))


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


def test_stored_logits_give_the_same_tokens(cpp, build) -> None:
    data, expected = b"", []
    for case in _cases(400):
        head = [case[name] for name in ("seed", "position", "request", "top_k")] + [len(case["logits"]), case["banned"]]
        data += struct.pack("<QQIIIIddd", *head, case["temperature"], case["top_p"], case["guidance"])
        data += case["logits"].tobytes() + case["empty"].tobytes()
        expected.append(_drawn(case))
    got = [int(line) for line in cpp.run(build / "tests" / "kinetok_probe", "sample", data=data).split()]
    assert got == expected


def test_ids_are_those_of_python(captions, build, bundle) -> None:
    result = captions.compare(build / "tests" / "kinetok_probe", bundle, CAPTIONS)
    assert result["unlike"] == 0, repr(result["first_unlike"])
    assert result["different_ids"] > 5000 and result["longest"] == 149


def _python(
    model, bundle: Path, steps, seed, request, temperature, top_k, top_p, guidance, seconds, spoken=()
) -> list[int]:
    """The same clip through the Python scheduler on the same graphs. steps: (prompt, tokens under it); spoken: features of
    prompts that are not in the bank."""
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
        features = dict(spoken)[text] if text in dict(spoken) else bank.encode([text])[0]
        empty = bank.features[""]
        room = config.block_size - max(len(features), len(empty))
        least, most = token_budget(params, model.sampling, rate, room)
        window = min(round(10 * rate), room)
        keep = min(round(KEPT_SECONDS * rate), window // 2)
        return Job(text=features, empty=empty if rows == 2 else None, params=params, least=written + least,
                   most=written + most, request=request, window=window, keep=keep)  # fmt: skip

    character = None
    for prompt, count in steps:
        if character is None:
            character = scheduler.submit(job(prompt, 0))
        else:
            scheduler.redirect(character, job(prompt, len(character.tokens)), round(CARRIED_SECONDS * rate))
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
        ((1, 0, 1.0, 0, 0.95, 1.5, math.inf), [("a person stands still", 200)]),  # the same with a held pose
        ((4, 0, 1.3, 0, 1.0, 1.0, math.inf), [("a person stands still", 200)]),  # whose newest token ends it
        ((1, 0, 1.0, 0, 0.95, 1.5, 6.0), [("a person stands still", 90)]),  # which fits its window
    ],
    ids=["end", "top_k", "greedy", "redirect", "window", "held", "moves", "fits"],
)
def test_a_clip_has_the_tokens_of_python(cpp, model, bundle, build, tmp_path, how, steps) -> None:
    said = cpp.run(
        build / "tests" / "kinetok_probe", "generate", bundle, tmp_path / "f", data=_script(how, steps).encode()
    )
    expected = _python(model, bundle, steps, *how)
    assert [int(word) for word in said.split()] == expected
    assert len(expected) > 20
    frames = np.concatenate([np.fromfile(tmp_path / f"f.{i}", np.float32).reshape(-1, 272) for i in range(len(steps))])
    scale, shift = (torch.from_numpy(x).float() for x in (model.std, model.mean))
    whole = model.tokenizer.decode(torch.tensor([expected]), scale, shift)[0].detach().numpy()
    assert frames.shape == whole.shape
    np.testing.assert_allclose(frames, whole, atol=2e-3)


def _script(how, steps, word: str = "say", flags: int = BANKED | INLINE) -> str:
    """What kinetok_probe is to do for a clip like ``_python``'s."""
    seed, request, temperature, top_k, top_p, guidance, seconds = how
    ahead = 2 * steps[0][1]  # frames; the library stops when so many lie unread
    lines = [f"new {seed} {request} {temperature} {top_k} {top_p} {guidance} {seconds or 0} {ahead} {flags}"]
    for prompt, _ in steps:
        lines += [f"{word} {prompt}", "run", "read 3"]
    return "\n".join([*lines, "tokens", ""])


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_have_the_tokens_of_python(cpp, model, build, tmp_path, precision) -> None:
    from kinetok.export.bundle import export_bundle

    other = export_bundle(load_pretrained(None, "cpu", "float32"), tmp_path / "b", dtype=precision, text=False)
    how, steps = (3, 4, 1.0, 0, 0.95, 2.0, math.inf), [(WALK, 30), (RUN, 30)]
    probe = build / "tests" / "kinetok_probe"
    said = cpp.run(probe, "generate", other, tmp_path / "f", data=_script(how, steps).encode())
    expected = _python(model, other, steps, *how)
    assert [int(word) for word in said.split()] == expected and len(expected) == 60


def test_a_sentence_has_the_tokens_of_python(cpp, captions, model, bundle, build, tmp_path) -> None:
    import onnxruntime

    text = "someone who is Very tired walks home, slowly"
    ids = np.array([captions.ids_of_python([text])[0]])
    encoder = onnxruntime.InferenceSession(bundle / "text_encoder.onnx", providers=["CPUExecutionProvider"])
    features = torch.from_numpy(encoder.run(None, {"input_ids": ids})[0][0])
    how, steps = (8, 0, 1.0, 0, 0.95, 2.5, math.inf), [(text, 50)]
    probe = build / "tests" / "kinetok_probe"
    said = cpp.run(probe, "generate", bundle, tmp_path / "f", data=_script(how, steps, "speak", INLINE).encode())
    expected = _python(model, bundle, steps, *how, spoken=[(text, features)])
    assert [int(word) for word in said.split()] == expected and len(expected) == 50


def test_a_tokenizer_that_looks_ahead_owes_its_last_frames(cpp, build, tmp_path) -> None:
    from kinetok.export.bundle import export_bundle

    torch.manual_seed(4)
    tokenizer = MotionTokenizer(
        TokenizerConfig(nb_code=256, code_dim=8, width=32, depth=2, patcher="none", causal=False)
    )
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "codebook": 240, "text_dim": 16, "block_size": 250}
    PromptBank({"": torch.ones(1, 16), WALK: torch.randn(3, 16)}, name="none", dim=16).save(tmp_path / "bank")
    model = ModelBundle(
        tokenizer=tokenizer.eval(), decoder=MotionDecoder(DecoderConfig(**sizes)).eval(), mean=np.linspace(-1, 1, 272),
        std=np.linspace(0.5, 2, 272), offsets=np.array(CANONICAL_OFFSETS), text_encoder={"type": "none", "name": "none"},
        sampling={"guidance": 1.0}, provenance={}, licence="none", bank=tmp_path / "bank", directory=tmp_path)  # fmt: skip
    ahead = export_bundle(model, tmp_path / "bundle", check=False)
    clip = [f"say {WALK}", "run", "read 3", "tokens"]
    # A clip that ends; the same character told to go on; one that never ends, stopped by what lies unread.
    script = ["new 1 0 1 0 1 1 3 300 9", *clip, *clip, "new 1 0 1 0 1 1 inf 100 9", *clip, ""]
    probe = build / "tests" / "kinetok_probe"
    said = cpp.run(probe, "generate", ahead, tmp_path / "f", data="\n".join(script).encode()).splitlines()
    frames = [np.fromfile(tmp_path / f"f.{i}", np.float32).reshape(-1, 272) for i in range(3)]
    each, scale, shift = (
        tokenizer.config.frames_per_token,
        *(torch.from_numpy(x).float() for x in (model.std, model.mean)),
    )
    tokens = [[int(word) for word in line.split()] for line in said]
    whole = [tokenizer.decode(torch.tensor([row]), scale, shift)[0].detach().numpy() for row in tokens]
    rate = round(tokenizer.config.tokens_per_second)
    assert list(map(len, tokens[:2])) == [3 * rate, 6 * rate] and len(frames[0]) == len(frames[1]) == 3 * rate * each
    np.testing.assert_allclose(frames[0], whole[0], atol=1e-4)
    np.testing.assert_allclose(frames[1], whole[1][len(frames[0]) :], atol=1e-4)
    assert 100 - each < len(frames[2]) <= 100 < len(tokens[2]) * each
    np.testing.assert_allclose(frames[2], whole[2][: len(frames[2])], atol=1e-4)


# Where a layout's axes point in the model's (Y up, facing +Z, metres), a row each, and how many of its units a metre has.
LAYOUTS = {
    0: (np.eye(3), 1.0),
    1: (np.diag([-1.0, 1.0, 1.0]), 1.0),
    2: (np.array([[0.0, 0, 1], [-1, 0, 0], [0, 1, 0]]), 100.0),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=["gltf", "unity", "unreal"])
def test_poses_are_those_of_python(cpp, model, build, bundle, tmp_path, layout) -> None:
    how = ["new 3 0 1 0 0.9 2.5 3 200 9", f"say {RUN}", "run", "read 3"]
    how += ["new 3 0 1 0 0.9 2.5 3 40 9", f"say {RUN}", *["run", f"read {layout}"] * 3, f"joints {layout}", ""]
    probe = build / "tests" / "kinetok_probe"
    said = cpp.run(probe, "generate", bundle, tmp_path / "f", data="\n".join(how).encode())
    offsets = np.array([[float(word) for word in line.split()] for line in said.splitlines()])
    features = np.fromfile(tmp_path / "f.0", np.float32).reshape(-1, 272)
    poses = np.concatenate([np.fromfile(tmp_path / f"f.{i}", np.float32).reshape(-1, 91) for i in (1, 2, 3)])
    assert len(poses) == len(features) == 90

    rotations, root = local_pose(torch.from_numpy(features.astype(np.float64)))
    axes, scale = LAYOUTS[layout]
    assert np.linalg.det(axes) == (1 if layout == 0 else -1)  # the engines' worlds are left-handed
    np.testing.assert_allclose(poses[:, :3], scale * root.numpy() @ axes.T, atol=1e-4 * scale)
    matrix = Rotation.from_quat(poses[:, 3:].reshape(-1, 4).astype(np.float64)).as_matrix().reshape(90, 22, 3, 3)
    np.testing.assert_allclose(matrix, axes @ rotations.numpy() @ axes.T, atol=1e-4)
    # An engine that hangs the joints together gets the joints of Python, seen in its axes.
    joints = Motion(rotations=rotations.numpy(), root=root.numpy(), offsets=model.offsets).joints
    world, place = [matrix[:, 0]], [poses[:, :3].astype(np.float64)]
    for joint, parent in enumerate(PARENTS[1:], 1):
        place.append(place[parent] + world[parent] @ offsets[joint])
        world.append(world[parent] @ matrix[:, joint])
    np.testing.assert_allclose(np.stack(place, 1), scale * joints @ axes.T, atol=1e-3 * scale)


def test_the_example_plays_and_writes_files_that_open(cpp, build, bundle, tmp_path) -> None:
    said = cpp.run(build / "examples" / "npc_crowd" / "npc_crowd", bundle, tmp_path, 2, 2)
    assert said.splitlines()[-1].startswith("milliseconds a game frame: p50")
    for number in range(2):
        motion = Motion.load(tmp_path / f"npc_{number}.bvh")
        assert 16 <= len(motion) <= 60 and np.abs(np.asarray(motion.offsets)).max() > 0.3
