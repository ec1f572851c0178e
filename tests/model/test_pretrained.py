"""Model directories: bit-exact round trips, and one clear line for everything that is not an intact model."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kinetok.errors import UserError
from kinetok.model import pretrained
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.pretrained import ModelBundle, load_pretrained, own_tensors, save_pretrained
from kinetok.model.tensor_files import Pieces, read_safetensors, shard, write_safetensors
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion.skeleton import CANONICAL_OFFSETS

TOKENIZER = TokenizerConfig(nb_code=256, code_dim=8, width=8, depth=2)
MEAN = np.linspace(-1, 1, 272)
STD = np.linspace(0.1, 2, 272)


def networks(dtype: torch.dtype = torch.float32, tied: bool = False) -> tuple[MotionTokenizer, MotionDecoder]:
    torch.manual_seed(1)
    config = DecoderConfig(n_layer=2, n_head=2, n_embd=16, codebook=240, text_dim=12, tie_weights=tied)
    return MotionTokenizer(TOKENIZER), MotionDecoder(config).to(dtype)


def save(path: Path, dtype: torch.dtype = torch.float32, tied: bool = False, **changes) -> tuple:
    tokenizer, decoder = networks(dtype, tied)
    values = {
        "mean": MEAN,
        "std": STD,
        "skeleton_offsets": CANONICAL_OFFSETS,
        "text_encoder": {"type": "minilm", "name": "x"},
        "sampling": {"temperature": 0.9},
        "provenance": {"trained on": "nothing"},
        "licence": "CC0-1.0",
        **changes,
    }
    save_pretrained(path, tokenizer, decoder, **values)
    return tokenizer, decoder


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    a, b = own_tensors(first), own_tensors(second)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_exact(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    tokenizer, decoder = save(tmp_path / "a", dtype, tied, shard_bytes=3000)
    bundle = load_pretrained(tmp_path / "a", device="cpu", dtype="stored")
    assert equal(bundle.tokenizer, tokenizer) and equal(bundle.decoder, decoder)
    assert bundle.tokenizer.config == tokenizer.config and bundle.decoder.config == decoder.config
    assert np.array_equal(bundle.mean, MEAN) and np.array_equal(bundle.std, STD) and bundle.std.dtype == np.float64
    assert np.array_equal(bundle.offsets, CANONICAL_OFFSETS)
    assert (bundle.text_encoder, bundle.sampling) == ({"type": "minilm", "name": "x"}, {"temperature": 0.9})
    assert bundle.licence == "CC0-1.0" and bundle.bank is None and not bundle.decoder.training
    assert len(list((tmp_path / "a").glob("decoder-*.safetensors"))) > 2
    again(bundle, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def again(bundle: ModelBundle, out: Path) -> None:
    save_pretrained(
        out,
        bundle.tokenizer,
        bundle.decoder,
        bundle.mean,
        bundle.std,
        bundle.offsets,
        bundle.text_encoder,
        bundle.sampling,
        bundle.provenance,
        bundle.licence,
        shard_bytes=3000,
    )


def test_outputs_are_those_of_the_saved_model(tmp_path: Path) -> None:
    tokenizer, decoder = save(tmp_path / "a")
    bundle = load_pretrained(tmp_path / "a", device="cpu")
    tokens, text = torch.randint(0, 240, (2, 9)), torch.randn(2, 4, 12)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        assert torch.equal(bundle.decoder(tokens, text, mask), decoder.eval()(tokens, text, mask))
        assert torch.equal(bundle.tokenizer.decode(tokens), tokenizer.eval().decode(tokens))


def test_dtype_of_the_decoder(tmp_path: Path) -> None:
    save(tmp_path / "a", torch.bfloat16)
    for dtype, wanted in (("auto", torch.float32), ("stored", torch.bfloat16), ("float16", torch.float16)):
        bundle = load_pretrained(tmp_path / "a", device="cpu", dtype=dtype)
        assert {value.dtype for value in bundle.decoder.parameters()} == {wanted}
        assert {value.dtype for value in bundle.tokenizer.parameters()} == {torch.float32}
    assert next(load_pretrained(tmp_path / "a", "cpu", torch.float64).decoder.parameters()).dtype == torch.float64
    with pytest.raises(UserError, match="expected dtype"):
        load_pretrained(tmp_path / "a", device="cpu", dtype="int3")


def test_bank_travels_along(tmp_path: Path) -> None:
    bank = tmp_path / "prompts.safetensors"
    bank.write_bytes(b"bank")
    save(tmp_path / "a", bank=bank)
    found = load_pretrained(tmp_path / "a", device="cpu").bank
    assert found is not None and found.read_bytes() == b"bank"


def test_existing_model_is_replaced_and_other_folders_are_not(tmp_path: Path) -> None:
    save(tmp_path / "a", shard_bytes=3000)
    save(tmp_path / "a")
    assert len(list((tmp_path / "a").glob("decoder-*"))) == 1
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="other files"):
        save(tmp_path / "a")
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        save(tmp_path / "file")
    with pytest.raises(UserError, match="cannot write"):
        save(tmp_path / "file" / "below")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "file"]


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path / "a")
    before = contents(tmp_path / "a")
    real = pretrained.write_safetensors

    def full(path, tensors):
        real(path, tensors)
        if path.name.startswith("decoder"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained, "write_safetensors", full)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path / "a")
    assert contents(tmp_path / "a") == before and [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mean": MEAN[:271]}, "272"),
        ({"mean": MEAN[None]}, "272"),
        ({"mean": np.where(MEAN > 0.99, np.nan, MEAN)}, "NaN"),
        ({"mean": "abc"}, "272"),
        ({"std": np.where(STD < 0.11, 0, STD)}, "zero or negative"),
        ({"std": -STD}, "zero or negative"),
        ({"std": STD * np.inf}, "infinite"),
        ({"skeleton_offsets": np.zeros((24, 3))}, "22 x 3"),
        ({"skeleton_offsets": np.full((22, 3), np.nan)}, "22 x 3"),
        ({"sampling": {"x": object()}}, "JSON"),
        ({"shard_bytes": 0}, "shard size"),
    ],
)
def test_bad_values_are_refused(tmp_path: Path, changes: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        save(tmp_path / "a", **changes)
    assert not list(tmp_path.iterdir())


def edit(folder: Path, change) -> None:
    path = folder / "kinetok.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(format="other"), "expected the format"),
        (lambda m: m.update(version=2), "version 1"),
        (lambda m: m.pop("decoder"), "'decoder'"),
        (lambda m: m["decoder"].update(n_layers=3), "unknown keys"),
        (lambda m: m["decoder"].update(n_layer=3), "missing"),
        (lambda m: m["decoder"].update(n_layer=1), "unexpected"),
        (lambda m: m["decoder"].update(text_dim=13), r"wrong shape.*\[16, 13\]"),
        (lambda m: m["decoder"].update(n_head="2"), "positive whole number"),
        (lambda m: m["skeleton"].update(names=["a"]), "skeleton"),
        (lambda m: m["skeleton"].update(offsets=[1]), "offsets"),
        (lambda m: m["files"].update(decoder=["../a.safetensors"]), "not the name"),
        (lambda m: m["files"].update(decoder=["decoder-00001-of-00009.safetensors"]), "cannot read"),
        (lambda m: m["files"].update(decoder=[]), "list of decoder files"),
        (lambda m: m["files"].update(decoder=m["files"]["decoder"] * 2), "earlier file"),
        (lambda m: m.update(files=3), "'files'"),
    ],
)
def test_damaged_manifests_are_refused(tmp_path: Path, change, says: str) -> None:
    save(tmp_path / "a")
    edit(tmp_path / "a", change)
    with pytest.raises(UserError, match=says) as caught:
        load_pretrained(tmp_path / "a", device="cpu")
    assert "\n" not in str(caught.value)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a")
    (tmp_path / "a" / "kinetok.json").write_bytes(b"\xff{")
    with pytest.raises(UserError, match="expected JSON"):
        load_pretrained(tmp_path / "a")
    (tmp_path / "a" / "kinetok.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="expected JSON"):
        load_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match="no kinetok model"):
        load_pretrained(tmp_path)
    save(tmp_path / "b")
    for path in sorted((tmp_path / "b").glob("*.safetensors")):
        content = path.read_bytes()
        for cut in (0, 5, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:cut])
            with pytest.raises(UserError):
                load_pretrained(tmp_path / "b", device="cpu")
        path.write_bytes(content)
    load_pretrained(tmp_path / "b", device="cpu")


def test_unknown_models_are_named(tmp_path: Path, monkeypatch) -> None:
    for name in ("no-such-model", str(tmp_path / "absent"), "a/b/c", ""):
        if name:
            with pytest.raises(UserError, match="unknown model"):
                load_pretrained(name)
    monkeypatch.setattr(pretrained, "DEFAULT_MODEL", tmp_path)
    with pytest.raises(UserError, match="no default model"):
        load_pretrained(None)


def test_hub_ids(tmp_path: Path, monkeypatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the hub client comes with the text extra")
    save(tmp_path / "a")
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path / "a")

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert load_pretrained("someone/kinetok-7b", device="cpu").directory == tmp_path / "a"
    assert asked == [("someone/kinetok-7b", ["kinetok.json", "*.safetensors"])]

    def offline(name, allow_patterns):
        raise hub.errors.LocalEntryNotFoundError("no network\nand nothing cached")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="no network and nothing cached"):
        load_pretrained("someone/kinetok-7b")


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(["F32", "BF16", "I64", "U8"])), max_size=5
    )
)
def test_safetensors_agree_with_the_library(tmp_path_factory: pytest.TempPathFactory, specs: list) -> None:
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}
    tensors = {f"t{i}": (torch.randn(shape) * 50).to(kinds[kind]) for i, (shape, kind) in enumerate(specs)}
    folder = tmp_path_factory.mktemp("st")
    write_safetensors(folder / "ours", [Pieces(name, (value,)) for name, value in tensors.items()])
    save_file(tensors, folder / "theirs.safetensors")
    for read in (load_file(folder / "ours"), read_safetensors(folder / "theirs.safetensors")):
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[k], tensors[k]) and read[k].dtype == tensors[k].dtype for k in tensors)


def test_pieces_are_written_in_chunks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("kinetok.model.tensor_files.CHUNK_BYTES", 64)
    first, second = torch.randn(7, 5, 3), torch.randn(4, 5, 3)
    pieces = Pieces("x", (first.transpose(1, 2), second.transpose(1, 2)))
    write_safetensors(tmp_path / "a.safetensors", [pieces, Pieces("y", (torch.tensor(3.0),))])
    read = load_file(tmp_path / "a.safetensors")
    assert torch.equal(read["x"], torch.cat((first, second)).transpose(1, 2)) and read["y"] == 3.0
    assert [len(group) for group in shard([pieces] * 4, pieces.nbytes * 2)] == [2, 2]
    assert [len(group) for group in shard([pieces] * 2, 1)] == [1, 1]


def header(value: object, data: bytes = b"") -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + data


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"123",
        (1 << 60).to_bytes(8, "little"),
        header(b"[" * 100_000),
        header([1]),
        header({"a": 3}),
        header({"a": {**GOOD, "dtype": "F31"}}, bytes(8)),
        header({"a": {**GOOD, "dtype": ["F32"]}}, bytes(8)),
        header({"a": {**GOOD, "shape": [-2]}}, bytes(8)),
        header({"a": {**GOOD, "shape": [2.0]}}, bytes(8)),
        header({"a": {**GOOD, "shape": [1 << 61, 8]}}, bytes(8)),
        header({"a": {**GOOD, "data_offsets": [8, 0]}}, bytes(8)),
        header({"a": {**GOOD, "data_offsets": [0]}}, bytes(8)),
        header({"a": {**GOOD, "data_offsets": [1 << 70, 1 << 71]}}, bytes(8)),
        header({"a": GOOD}, bytes(4)),
        header({"a": GOOD}, bytes(12)),
        header({"a": GOOD, "b": GOOD}, bytes(8)),
        header({"a": {**GOOD, "shape": [0, 1 << 61, 1 << 61], "data_offsets": [0, 0]}}),
    ],
)
def test_damaged_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_safetensors(tmp_path / "absent.safetensors")
    if os.name == "posix" and os.geteuid() != 0:
        path = tmp_path / "locked.safetensors"
        path.write_bytes(b"x")
        path.chmod(0)
        with pytest.raises(UserError, match="cannot read"):
            read_safetensors(path)
