"""Bundles from strangers: whatever a manifest or a file says, reading and replaying end in an answer or one line."""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.export.bundle import export_bundle
from kinetok.export.replay import replay
from kinetok.runtime.bundle import file_digest, read_bundle
from kinetok.runtime.manifest import MANIFEST, MANIFEST_BYTES, read_manifest

EXAMPLES = int(os.environ.get("KINETOK_FUZZ", "60"))
ODD: list[Any] = [
    None, True, -1, 0, 1, 2, 3, 40, 255, 1 << 24, 1 << 40, 1 << 63, 10**400, -(10**400), 0.5, -0.0, 1e-300, 1e308,
    float("nan"), float("inf"), "", ".", "..", "../weights.bin", "/etc/passwd", "weights.bin", "golden.bin", "x" * 9999,
    "\ud800", "a\nb", "float32", "float16", "int32", "decode", [], {}, [[]], [0], [-1], [1 << 62, 1 << 62],
    [1 << 20, 1 << 20], ["batch"], {"file": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def bundle(model_of, tmp_path_factory) -> Path:
    return export_bundle(model_of(), tmp_path_factory.mktemp("bundle") / "out", check=False)


@pytest.fixture
def copied(bundle, tmp_path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every element of a JSON value with its owner."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in pairs for place in [(value, key), *places(inner)]]


def mutated(manifest: dict[str, Any], choose: Any) -> dict[str, Any]:
    """One to three of: an element replaced by something odd or by another element, taken out, or doubled."""
    manifest = copy.deepcopy(manifest)
    for _ in range(choose(st.integers(1, 3))):
        # Sections first, so that the 544 statistics do not take most of the chances.
        section = choose(st.sampled_from(sorted(manifest) or ["format"]))
        inner = places(manifest.get(section, {}))
        owner, key = choose(st.sampled_from(inner)) if inner and choose(st.integers(0, 9)) else (manifest, section)
        kind = choose(st.sampled_from(["odd", "odd", "other", "gone", "double"]))
        if kind == "gone":
            owner.pop(key, None) if isinstance(owner, dict) else owner.pop(key)
        elif kind == "double" and isinstance(owner, list):
            owner.append(copy.deepcopy(owner[key]))
        elif kind == "other" and inner:
            other, at = choose(st.sampled_from(inner))
            owner[key] = (
                copy.deepcopy(other[at]) if (at in other if isinstance(other, dict) else at < len(other)) else None
            )
        else:
            owner[key] = copy.deepcopy(choose(st.sampled_from(ODD)))
    return manifest


def answered(call: Any) -> bool:
    """Whether it raised one line; any other exception is a failure."""
    try:
        call()
    except UserError as error:
        assert str(error) and len(str(error)) < 2000, error
        return True
    return False


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_mutated_manifest(bundle, tmp_path, data) -> None:
    """Replayed where it is still readable; files are as they were."""
    manifest = mutated(json.loads((bundle / MANIFEST).read_text()), data.draw)
    folder = tmp_path / "mutated"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in bundle.iterdir():
        if path.name != MANIFEST:
            os.link(path, folder / path.name)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    if not answered(lambda: read_manifest(folder)):
        answered(lambda: replay(folder))


@settings(max_examples=EXAMPLES // 5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_files_under_a_right_hash(bundle, tmp_path, data) -> None:
    """Bytes of any file but the graphs, which are programs; sizes may shrink."""
    folder = tmp_path / "mutated"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    name = data.draw(st.sampled_from(["golden.bin", "bank.bin", "weights.bin", "detokenizer.bin"]))
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(content) - 5)) // 4 * 4
        content[at : at + 4] = data.draw(
            st.sampled_from([b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff\xff\xff\xff", b"\0\0\0\x80"])
        )
    (folder / name).write_bytes(content[: len(content) - data.draw(st.sampled_from([0, 0, 1, 4096]))])
    digest, size = file_digest(folder / name)
    manifest["files"][name] = {"sha256": digest, "bytes": size}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    answered(lambda: replay(folder))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"1" * 5000, b'{"format": NaN}', b"null"]
)
def test_what_is_no_manifest(tmp_path, content) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=f"{MANIFEST}: expected .*: export the model again, or fetch an intact copy"):
        read_bundle(tmp_path)


def test_a_manifest_without_end(tmp_path) -> None:
    with (tmp_path / MANIFEST).open("wb") as file:
        file.truncate(MANIFEST_BYTES + 1)
    with pytest.raises(UserError, match="expected at most"):
        read_bundle(tmp_path)
    (tmp_path / MANIFEST).unlink()
    os.mkfifo(tmp_path / MANIFEST)  # would block for ever
    with pytest.raises(UserError, match="expected a file"):
        read_bundle(tmp_path)


def test_files_without_end(copied) -> None:
    (copied / "bank.bin").unlink()
    (copied / "bank.bin").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"bank\.bin: expected a file"):
        read_bundle(copied)
    (copied / "bank.bin").unlink()
    with (copied / "bank.bin").open("wb") as file:
        file.truncate(1 << 40)  # a hole; hashing it would take an hour
    with pytest.raises(UserError, match=r"bank\.bin: not the file"):
        read_bundle(copied)


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd"])
def test_a_graph_cannot_read_files_outside_its_folder(copied, location) -> None:
    (copied.parent / "secret.bin").write_bytes(bytes(1 << 20))
    model = onnx.load(str(copied / "decode.onnx"), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (copied / "decode.onnx").write_bytes(model.SerializeToString())
    manifest = json.loads((copied / MANIFEST).read_text())
    digest, size = file_digest(copied / "decode.onnx")
    manifest["files"]["decode.onnx"] = {"sha256": digest, "bytes": size}
    (copied / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="onnxruntime cannot load it"):
        replay(copied)


def test_a_graph_that_is_not_what_the_manifest_says(copied) -> None:
    """Buffers are as large as the manifest says, so another graph must not be let near them."""
    shutil.copy(copied / "prefill.onnx", copied / "decode.onnx")
    manifest = json.loads((copied / MANIFEST).read_text())
    manifest["files"]["decode.onnx"] = manifest["files"]["prefill.onnx"]
    (copied / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="not the graph that"):
        replay(copied)


def test_logits_that_are_no_numbers_fail_the_replay(copied) -> None:
    manifest = json.loads((copied / MANIFEST).read_text())
    reference = manifest["golden"][0]["features"]
    data = np.fromfile(copied / "golden.bin", np.uint8)
    data[reference["offset"] :][:4].view(np.float32)[0] = np.nan
    (copied / "golden.bin").write_bytes(data.tobytes())
    digest, size = file_digest(copied / "golden.bin")
    manifest["files"]["golden.bin"] = {"sha256": digest, "bytes": size}
    (copied / MANIFEST).write_text(json.dumps(manifest))
    failed = [check.name for check in replay(copied).checks if not check.passed]
    assert failed == ["0.first_logits", "0.last_logits", "0.greedy", "0.sampled"]
