"""kinetok export, verify and generate --backend onnx."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("onnx", reason="needs the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")


@pytest.fixture
def bundle(kinetok, model, tmp_path):
    outcome = kinetok("export", "onnx", model, "--out", tmp_path / "bundle")
    assert outcome.code == 0, outcome
    assert "golden fixtures replayed and agreed" in outcome.out
    return tmp_path / "bundle"


def test_verify_and_what_it_notices(kinetok, refused, bundle) -> None:
    outcome = kinetok("verify", bundle)
    assert outcome.code == 0 and outcome.out.rstrip().endswith("all arrays agree")
    path = bundle / "kinetok_bundle.json"
    manifest = json.loads(path.read_text())
    first, second = manifest["golden"][:2]
    path.write_text(json.dumps({**manifest, "golden": [{**first, "first_logits": second["first_logits"]}]}))
    outcome = kinetok("verify", bundle)
    assert outcome.code == 1 and "FAIL  0.first_logits" in outcome.out
    assert outcome.out.splitlines()[-1].startswith("first divergence: 0.first_logits: largest difference ")
    frames = {**first["frames"], "shape": [2, 271]}
    path.write_text(json.dumps({**manifest, "golden": [{**first, "frames": frames}]}))
    assert "expected a fixture's frames to be" in refused("verify", bundle)
    path.write_text(json.dumps({**manifest, "files": {"\x1b[31m\ud800": {}}}))
    # Nothing comes through that a terminal obeys, or that has no encoding.
    assert "files.\ufffd[31m\ufffd" in refused("verify", bundle)
    path.write_text(json.dumps(manifest))
    (bundle / "weights.bin").write_bytes(b"\0")
    assert "not the file that was exported" in refused("verify", bundle)
    path.write_text(json.dumps({**manifest, "version": 99}))
    assert "update kinetok" in refused("verify", bundle)


def test_the_same_clips_from_onnx_runtime(kinetok, bundle, model, tmp_path) -> None:
    tokens = []
    for number, name in enumerate(("torch", "onnx", f"onnx:{bundle}")):
        out = tmp_path / str(number)
        arguments = ("a person runs", "--model", model, "--format", "npz", "--backend", name, "-o", out)
        outcome = kinetok("generate", *arguments)
        assert outcome.code == 0, outcome
        tokens.append(next(out.glob("*.npz")).read_bytes())
    assert tokens[0] == tokens[1] == tokens[2]


def test_another_precision_is_compared_with_the_model(kinetok, refused, model, tmp_path) -> None:
    arguments = ("export", "onnx", model, "--out", tmp_path / "bundle", "--dtype")
    outcome = kinetok(*arguments, "fp16")
    assert outcome.code == 0 and "same greedy token  1.0000 (at least 0.95)" in outcome.out
    assert "no text_encoder: the model names no text encoder" in outcome.out
    found = json.loads((tmp_path / "bundle" / "kinetok_bundle.json").read_text())["agreement"]
    assert 0 < found["logit_error"] < 1e-2
    before = (tmp_path / "bundle" / "weights.bin").read_bytes()
    assert "int4 changes this model too much: " in refused(*arguments, "int4")
    assert (tmp_path / "bundle" / "weights.bin").read_bytes() == before
    outcome = kinetok(*arguments, "int4", "--force")
    assert outcome.code == 0 and "(at most 0.1)" in outcome.out


def test_bench_runs_on_a_bundle(kinetok, refused, bundle, model, tmp_path) -> None:
    report = tmp_path / "report.json"
    options = ("--model", model, "--seconds", "0.4", "--backend")
    outcome = kinetok("bench", "crowd", *options, f"onnx:{bundle}", "--characters", "2", "--json", report)
    assert outcome.code == 0, outcome
    assert f"onnx:{bundle}" in report.read_text()
    assert "is no bundle" in refused("bench", "crowd", *options, f"onnx:{tmp_path}", "--characters", "2")


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (("--opset", "17"), "expected one of 23, 24, 18"),
        (("--dtype", "bf16"), "expected one of fp32, fp16, int8, int4"),
        (("--kv", "int8"), "expected one of fp32, fp16"),
    ],
)
def test_options_that_do_not_exist(refused, model, tmp_path, arguments, remedy) -> None:
    assert remedy in refused("export", "onnx", model, "--out", tmp_path / "bundle", *arguments)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(refused, model, bundle, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install 'kinetok[onnx]'" in refused("verify", bundle)
    import kinetok

    if "kinetok.export" in sys.modules:  # the package that later tests patch has to be the one that is imported
        monkeypatch.setattr(kinetok, "export", sys.modules["kinetok.export"])
    for name in [name for name in sys.modules if name.startswith("kinetok.export")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "pip install 'kinetok[onnx]'" in refused("export", "onnx", model, "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_provider_that_is_not_there(refused, bundle) -> None:
    assert "install onnxruntime-gpu" in refused("verify", bundle, "--device", "cuda")


def test_a_bundle_of_another_model(refused, bundle, tmp_path) -> None:
    line = refused("generate", "a person runs", "--backend", f"onnx:{bundle}", "-o", tmp_path / "out")
    assert "another model" in line


@pytest.mark.parametrize("kind", ["tensorrt", "tensorrt-rtx"])
def test_engines_without_their_library(refused, model, tmp_path, monkeypatch, kind) -> None:
    monkeypatch.setitem(sys.modules, kind.replace("-", "_"), None)
    line = refused("export", kind, model, "--out", tmp_path / "engines")
    assert f"needs the package {kind}" in line and f"pip install 'kinetok[{kind}]'" in line
    assert "expected numbers" in refused("export", kind, model, "--out", tmp_path / "engines", "--batches", "one")
    assert not list(tmp_path.iterdir())


def test_engines_are_built_and_not_run_here(kinetok, refused, model, tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13 (Linux on x86-64), which is not installed")
    out = tmp_path / "engines"
    options = ("--out", out, "--batches", "1", "--positions", "40", "--dtype", "bf16", "--targets")
    assert "some of sm_120" in refused("export", "tensorrt-rtx", model, *options, "sm_90")
    outcome = kinetok("export", "tensorrt-rtx", model, *options, "sm_86,sm_89,sm_120")
    assert outcome.code == 0, outcome
    assert "decode.engine" in outcome.out and "built for sm_86, sm_89, sm_120, not run" in outcome.out
    manifest = json.loads((out / "kinetok_engines.json").read_text())
    assert manifest["positions"] == 40 and manifest["kv_dtype"] == "bfloat16"
    if not torch.cuda.is_available():
        assert "need an NVIDIA GPU" in refused("verify", out)
    (out / "decode.engine").write_bytes(b"no engine")
    assert "decode.engine: not the file that was exported" in refused("verify", out)


def test_engines_that_run(kinetok, tmp_path, monkeypatch) -> None:
    """With a backend that opens: there is no GPU here."""
    from kinetok.runtime import engines
    from kinetok.runtime.backends import tensorrt

    opened = []

    def opens(*about):
        opened.append(about)
        return SimpleNamespace(compiled=SimpleNamespace(state="sm_86.runtime.cache: 9 bytes reused"))

    monkeypatch.setattr(engines, "read_engines", lambda path: path)
    monkeypatch.setattr(tensorrt, "open_engines", opens)
    (tmp_path / engines.ENGINES).write_text("{}")
    outcome = kinetok("verify", tmp_path)
    assert outcome.code == 0 and "they run; compiled kernels: sm_86.runtime.cache: 9 bytes reused" in outcome.out
    assert opened == [(tmp_path, 1, 2, torch.device("cuda"))]


def test_engines_that_generate_cannot_use(refused, model, tmp_path) -> None:
    generate = ("generate", "a person runs", "--model", model, "-o", tmp_path / "out", "--backend")
    assert "make them with kinetok export tensorrt-rtx" in refused(*generate, "tensorrt")
    assert "holds no engines" in refused(*generate, f"tensorrt:{tmp_path}")
    assert "expected one of auto, torch, fused, onnx, onnx:DIR, tensorrt:DIR" in refused(*generate, "torch:x")
