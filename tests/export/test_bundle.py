"""A bundle: what the manifest says is what the files hold, it replays, and nothing half-written is left behind."""

import copy
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from kinetok.errors import UserError
from kinetok.export.bundle import export_bundle
from kinetok.export.replay import replay
from kinetok.model.packed import Quantisation
from kinetok.runtime.backends import open_backend
from kinetok.runtime.backends.tensorrt import COMPILED
from kinetok.runtime.bundle import only_holds, read_bundle
from kinetok.runtime.engines import ENGINES
from kinetok.runtime.manifest import MANIFEST


@pytest.fixture(scope="module")
def bundle(model_of, tmp_path_factory) -> Path:
    return export_bundle(model_of(), tmp_path_factory.mktemp("bundle") / "out")


@pytest.fixture
def copied(bundle, tmp_path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def edit(folder: Path, **changes) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))


@pytest.mark.parametrize(
    ("dtype", "kv", "opset"),
    [
        ("fp32", None, 23),
        ("fp32", None, 24),
        ("fp32", "fp16", 18),
        ("fp16", None, 23),
        ("int8", None, 23),
        ("int4", "fp16", 18),
    ],
)
def test_what_is_written_replays(model_of, tmp_path, dtype, kv, opset) -> None:
    out = export_bundle(model_of(), tmp_path / "out", dtype=dtype, kv=kv, opset=opset, check=False)
    report = replay(out)
    assert report.passed, str(report)
    names = {check.name.split(".")[1] for check in report.checks}
    expected = {"first_logits", "last_logits", "greedy", "sampled", "frames", "streamed"}
    assert names == (expected | {"weights"} if "int" in dtype else expected)
    manifest = json.loads((out / MANIFEST).read_text())
    nodes = [n for path in out.glob("*.onnx") for n in onnx.load(str(path), load_external_data=False).graph.node]
    domains = {node.domain for node in nodes}
    assert domains == set(manifest["domains"]) == ({"", "com.microsoft"} if "int" in dtype else {""})
    kinds = {node.op_type for node in nodes if node.domain}
    attends = {"GroupQueryAttention"} if "int" in dtype and kv is None else set()
    assert kinds == ({"MatMulNBits", "SkipSimplifiedLayerNormalization", *attends} if "int" in dtype else set())


def test_the_manifest_says_what_is_there(bundle, model_of) -> None:
    manifest, model = json.loads((bundle / MANIFEST).read_text()), model_of()
    assert set(manifest["files"]) == {path.name for path in bundle.iterdir()} - {MANIFEST}
    for name, about in manifest["files"].items():
        data = (bundle / name).read_bytes()
        assert about == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    for about in manifest["graphs"].values():
        proto = onnx.load(str(bundle / about["file"]), load_external_data=False).graph
        for side, values in (("inputs", proto.input), ("outputs", proto.output)):
            assert [value["name"] for value in about[side]] == [value.name for value in values]
    assert manifest["skeleton"]["offsets"] == model.offsets.tolist()
    assert manifest["features"]["mean"] == model.mean.tolist()
    assert manifest["sampling"]["guidance"] == 2.0 and manifest["provenance"] == {"made": "for a test"}
    assert manifest["absent"].keys() == {"text_encoder"} and "bank" in manifest["absent"]["text_encoder"]
    opened = read_bundle(bundle)
    rows = opened.tensor(manifest["bank"]["features"])
    about = manifest["bank"]["prompts"][1]
    from kinetok.model.bank import PromptBank

    kept = PromptBank.load(model.bank).features[about["text"]].numpy()  # type: ignore[arg-type]
    np.testing.assert_array_equal(rows[about["row"] : about["row"] + about["rows"]], kept)


def test_the_same_model_gives_the_same_bytes(bundle, model_of, tmp_path) -> None:
    again = export_bundle(model_of(), tmp_path / "out", check=False)
    for path in bundle.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", ["weights.bin", "decode.onnx", "bank.bin"])
def test_an_edited_file_is_noticed(copied, name) -> None:
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}: not the file that was exported"):
        read_bundle(copied)
    (copied / name).unlink()
    with pytest.raises(UserError, match=r"cannot read .*: export the model again, or fetch an intact copy"):
        read_bundle(copied)


@pytest.mark.parametrize(
    ("dtype", "weight", "noticed"),
    [
        ("fp32", "blocks.0.attn_out.weight", "0.first_logits"),
        ("fp16", "blocks.0.attn_out.weight", "0.first_logits"),
        # 8-bit activations would hide it.
        ("int8", "blocks.0.attn_out.weight.scale", "0.weights"),
        ("int4", "blocks.1.down.weight.scale", "0.weights"),
    ],
)
def test_weights_that_changed_with_their_hash_are_found_by_the_replay(
    model_of, tmp_path, dtype, weight, noticed
) -> None:
    """One matrix of a twentieth more, under a right hash: only running it can tell, and the report names what went wrong."""
    out = export_bundle(model_of(), tmp_path / "out", dtype=dtype)
    tensors = onnx.load(str(out / "decode.onnx"), load_external_data=False).graph.initializer
    tensor = next(tensor for tensor in tensors if tensor.name == weight)
    place = {entry.key: entry.value for entry in tensor.external_data}
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    path, start, size = out / "weights.bin", int(place["offset"]), int(place["length"])
    data = np.fromfile(path, np.uint8)
    values = data[start : start + size].view(kind)
    values[:] = (values * 1.05).astype(kind)
    path.write_bytes(data.tobytes())
    files = json.loads((out / MANIFEST).read_text())["files"]
    files["weights.bin"]["sha256"] = hashlib.sha256(data.tobytes()).hexdigest()
    edit(out, files=files)
    report = replay(out)
    assert not report.passed
    first = next(check for check in report.checks if not check.passed)
    assert first.name == noticed and "first beyond it at" in first.text


def test_graphs_that_are_far_off_are_not_excused_by_a_measured_tolerance(model_of, tmp_path, monkeypatch) -> None:
    import kinetok.export.bundle as module

    real = module.golden_cases

    def wrong(*arguments):
        cases = real(*arguments)
        cases[0]["last_logits"] = cases[0]["last_logits"] * 1.1
        return cases

    monkeypatch.setattr(module, "golden_cases", wrong)
    with pytest.raises(UserError, match=r"disagree with the model, nothing was written: 0\.last_logits"):
        export_bundle(model_of(), tmp_path / "out", dtype="int8")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": 2}, "newer than this kinetok reads"),
        ({"format": "zip"}, "expected the format"),
        ({"version": "1"}, "expected the format"),
        ({"files": {"../weights.bin": {}}}, r"files\.\.\./weights\.bin to be a plain file name"),
        ({"files": []}, "files to be an object"),
    ],
)
def test_a_manifest_that_cannot_be_read(copied, changes, why) -> None:
    edit(copied, **changes)
    with pytest.raises(UserError, match=why):
        read_bundle(copied)


@pytest.mark.parametrize(
    "reference",
    [
        None,
        {"file": "bank.bin", "dtype": "float64", "shape": [1], "offset": 0},
        {"file": "../bank.bin", "dtype": "float32", "shape": [1], "offset": 0},
        {"file": "bank.bin", "dtype": "float32", "shape": [1 << 40], "offset": 0},
        {"file": "bank.bin", "dtype": "float32", "shape": [-1], "offset": 0},
        {"file": "bank.bin", "dtype": "float32", "shape": [1], "offset": 4},
        {"file": "bank.bin", "dtype": "float32", "shape": [1], "offset": "0"},
    ],
)
def test_tensors_outside_their_file_are_refused(bundle, reference) -> None:
    with pytest.raises(UserError):
        read_bundle(bundle).tensor(reference)


def test_a_failure_leaves_the_old_bundle_and_nothing_else(model_of, tmp_path, bundle) -> None:
    out = Path(shutil.copytree(bundle, tmp_path / "out"))
    model = model_of()
    with torch.no_grad():
        model.decoder.blocks[1].down.weight[0, 0] = 1e6
    with pytest.raises(UserError, match="do not fit into float16"):
        export_bundle(model, out, dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / MANIFEST).read_bytes() == (bundle / MANIFEST).read_bytes()


def test_a_graph_that_disagrees_is_never_put_in_place(model_of, tmp_path, monkeypatch) -> None:
    import kinetok.export.bundle as module

    real = module.golden_cases

    def wrong(*arguments):
        cases = real(*arguments)
        cases[0]["frames"] = cases[0]["frames"] + 1
        return cases

    monkeypatch.setattr(module, "golden_cases", wrong)
    with pytest.raises(UserError, match=r"disagree with the model, nothing was written: 0\.frames"):
        export_bundle(model_of(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"opset": 17}, {"kv": "int8"}])
def test_options_that_do_not_exist(model_of, tmp_path, options) -> None:
    with pytest.raises(UserError, match="expected one of"):
        export_bundle(model_of(), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_quantised_model_is_no_source(model_of, tmp_path) -> None:
    with pytest.raises(UserError, match="quantised already"):
        export_bundle(replace(model_of(), quantisation=Quantisation(kind="int8")), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(model_of, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="other files"):
        export_bundle(model_of(), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match=r"but it is a file: name another"):
        export_bundle(model_of(), tmp_path / "notes.txt")


def test_what_a_user_keeps_beside_a_bundle_is_not_replaced_with_it(copied, model_of) -> None:
    (copied / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        export_bundle(model_of(), copied)
    (copied / "notes.txt").unlink()
    (copied / MANIFEST).write_text("{")  # nothing says what is in it
    with pytest.raises(UserError, match="holds other files"):
        export_bundle(model_of(), copied)


def test_what_a_gpu_compiled_is_replaced_with_its_engines(tmp_path) -> None:
    (tmp_path / ENGINES).write_text(json.dumps({"files": {"decode.engine": {}}}))
    for name in ("decode.engine", f"sm_86.{COMPILED}"):
        (tmp_path / name).write_bytes(b"")
    assert only_holds(tmp_path, ENGINES, COMPILED) and not only_holds(tmp_path, ENGINES)
    (tmp_path / "notes.txt").write_text("mine")
    assert not only_holds(tmp_path, ENGINES, COMPILED)


def test_the_folder_that_one_is_in_is_named_before_any_work(model_of, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (".", tmp_path):
        with pytest.raises(UserError, match="the folder that you are in: name another"):
            export_bundle(model_of(), out)


def test_a_t5_goes_with_its_tokenizer(model_of, t5_folder, tmp_path) -> None:
    spec = {"type": "flan-t5", "name": str(t5_folder())}
    out = export_bundle(replace(model_of(text_dim=16), bank=None, text_encoder=spec), tmp_path / "out", check=False)
    report = replay(out)
    assert report.passed and "0.features" in {check.name for check in report.checks}, str(report)
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["text"]["tokenizer"] == "tokenizer.json" in manifest["files"] and "vocab" not in manifest["text"]
    assert manifest["golden"][0]["text"] and manifest["bank"] is None
    with pytest.raises(UserError, match="expected 12 numbers a token, got 16"):
        export_bundle(replace(model_of(), text_encoder=spec), tmp_path / "other")


def test_a_model_without_a_bank_and_one_that_looks_ahead(model_of, tmp_path) -> None:
    model = replace(model_of({"causal": False}, tie_weights=True), bank=None)
    out = export_bundle(model, tmp_path / "out")
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["bank"] is None and manifest["decoder"]["banned_ids"] == [241]
    assert manifest["tokenizer"]["look_ahead_tokens"] > 0 < manifest["graphs"]["detokenize_ahead"]["delay_frames"]
    assert "0.streamed" in {check.name for check in replay(out).checks}
    with pytest.raises(UserError, match="no graph 'detokenize_stream': the tokenizer looks ahead"):
        read_bundle(out).graph("detokenize_stream")


def test_a_model_that_cannot_stream(model_of, tmp_path) -> None:
    out = export_bundle(model_of({"norm": "GN"}), tmp_path / "out")
    manifest = json.loads((out / MANIFEST).read_text())
    assert "whole clip" in manifest["absent"]["detokenize_stream"] and "detokenize_ahead" not in manifest["graphs"]
    assert "0.streamed" not in {check.name for check in replay(out).checks}


@pytest.mark.parametrize("part", ["text_proj.bias", "norm.scale", "embed.weight"])
def test_a_bundle_of_a_model_of_the_same_sizes_is_told_apart(bundle, model_of, part) -> None:
    """As before and after a fine-tuning; otherwise another model's motion would come out without a word."""
    opened, decoder = read_bundle(bundle), model_of().decoder
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        opened.check_weights(copy.deepcopy(decoder).to(dtype))
    with torch.no_grad():
        decoder.get_parameter(part).view(-1)[3] *= 1.01
    with pytest.raises(UserError, match=r"another model \(of the same sizes, with other weights\): export"):
        opened.check_weights(decoder)


def test_a_bundle_is_opened_for_its_own_model(bundle, model_of) -> None:
    model, other = model_of(), model_of()
    torch.nn.init.constant_(other.decoder.text_proj.bias, 0.5)
    assert open_backend(f"onnx:{bundle}", model, 1, 20).slots == 1
    with pytest.raises(UserError, match="another model"):
        open_backend(f"onnx:{bundle}", other, 1, 20)
