"""The restricted reader: what torch.save writes comes back bit by bit, hostile files are refused, no code runs."""

import collections
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.model.restricted import PICKLE_BYTES, Stub, read_tensors

PERSISTENT = b"ctorch\nFloatStorage\n"


def save(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


def archive(path: Path, program: bytes, storages: dict[str, bytes] | None = None, **kwargs: object) -> Path:
    """A .pth file with a hand-written pickle; every storage is aligned as torch aligns it."""
    with zipfile.ZipFile(path, "w", **kwargs) as file:
        for name, content in {"data.pkl": program, **{f"data/{k}": v for k, v in (storages or {}).items()}}.items():
            info = zipfile.ZipInfo(f"archive/{name}")
            at = file.fp.tell() + 30 + len(info.filename) + 4
            info.extra = struct.pack("<2H", 0x4246, -at % 64) + b"Z" * (-at % 64)
            info.compress_type = kwargs.get("compression", zipfile.ZIP_STORED)
            file.writestr(info, content)
    return path


def tensor_program(size: str, stride: str, offset: str = "I0\n", count: str = "I4\n", key: str = "V0\n") -> bytes:
    """The pickle of {"net": tensor}; the pieces are in pickle's text form."""
    storage = b"(Vstorage\n" + PERSISTENT + key.encode() + b"Vcpu\n" + count.encode() + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset.encode() + size.encode() + stride.encode()
    return b"\x80\x02}Vnet\n" + call + b"I00\n}tRs."


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.uint8],
)
def test_every_type_comes_back_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.arange(-20, 40).reshape(3, 4, 5).to(dtype)
    path = save(tmp_path / "a.pth", {"net": collections.OrderedDict(a=value, b=value[1:, 2], c=value.transpose(0, 2))})
    got = read_tensors(path)["net"]
    for name, wanted in (("a", value), ("b", value[1:, 2]), ("c", value.transpose(0, 2))):
        assert got[name].dtype == dtype and torch.equal(got[name], wanted)
    assert got["a"].untyped_storage().data_ptr() == got["c"].untyped_storage().data_ptr()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 4), max_size=4), st.integers(0, 3), st.randoms(use_true_random=False))
def test_any_view_comes_back(tmp_path_factory: pytest.TempPathFactory, shape: list[int], start: int, random) -> None:
    base = torch.randn([size + start for size in shape])
    view = base[tuple(slice(start, None) for _ in shape)]
    order = list(range(len(shape)))
    random.shuffle(order)
    view = view.permute(order)
    path = save(tmp_path_factory.mktemp("view") / "a.pth", {"trans": {"x": view}, "nb_iter": 7})
    got = read_tensors(path)
    assert torch.equal(got["trans"]["x"], view) and got["nb_iter"] == 7


@pytest.mark.parametrize("name", ["tokenizer_p1.pth", "tokenizer_nopatcher_alt.pth", "transformer_small.pth"])
def test_released_files_match_torch(golden, name: str) -> None:
    path = golden(name)
    wanted, got = torch.load(path, weights_only=True), read_tensors(path)
    assert list(wanted) == list(got)
    for top, tensors in wanted.items():
        assert list(tensors) == list(got[top])
        assert all(torch.equal(tensors[key], got[top][key]) for key in tensors)


class Attack:
    def __reduce__(self):
        return os.system, ("echo ran > ran.txt",)


class Evil(torch.nn.Module):
    def __setstate__(self, state):
        raise AssertionError("code of the file ran")


def test_other_classes_become_stubs_and_nothing_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "kinetok_evil_module.py"
    module.write_text("raise SystemError('imported')\n")
    sys.path.insert(0, str(tmp_path))
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {
        "trans": model.state_dict(),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "optimizer": optimizer,
        "state": optimizer.state_dict(),
        "attack": Attack(),
        "evil": Evil(),
        "shape": torch.Size([1, 2]),
        "array": np.float64(2.0),
        "sets": [{1, 2}, frozenset((3,))],
        "default": collections.defaultdict(list, {"a": [1]}),
        ("tuple", "key"): 1,
    }
    path = save(tmp_path / "a.pth", state)
    try:
        got = read_tensors(path)
    finally:
        sys.path.remove(str(tmp_path))
    assert not (tmp_path / "ran.txt").exists() and "kinetok_evil_module" not in sys.modules
    assert torch.equal(got["trans"]["weight"], model.weight)
    assert torch.equal(got["parameter"], torch.ones(3)) and got["shape"] == (1, 2)
    assert torch.equal(got["state"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    for name in ("optimizer", "attack", "evil", "array", "default"):
        assert isinstance(got[name], Stub), name


def test_unknown_module_is_not_imported(tmp_path: Path) -> None:
    program = b"\x80\x02}(Vnet\n}Vx\nckinetok_no_such_module\nBoom\n)\x81}Va\nI1\nsbVy\ncos\nsystem\n(Vexit 3\ntRu."
    got = read_tensors(archive(tmp_path / "a.pth", program))
    assert isinstance(got["x"], Stub) and got["y"].name == "os.system"


def test_tensor_with_python_attributes(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.arange(4.0))
    parameter.note = "deepspeed"
    tensor = torch.arange(3.0)
    tensor.note = "x"
    got = read_tensors(save(tmp_path / "a.pth", {"p": parameter, "t": tensor}))
    assert torch.equal(got["p"], torch.arange(4.0)) and torch.equal(got["t"], torch.arange(3.0))


FOUR = {"0": np.arange(4, dtype=np.float32).tobytes()}


def test_hand_written_program(tmp_path: Path) -> None:
    got = read_tensors(archive(tmp_path / "a.pth", tensor_program("(I2\nI2\nt", "(I2\nI1\nt"), FOUR))
    assert torch.equal(got["net"], torch.arange(4.0).reshape(2, 2))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": "(I5\nt", "stride": "(I1\nt"}, "outside"),
        ({"size": "(I2\nt", "stride": "(I4\nt"}, "outside"),
        ({"size": "(I2\nt", "stride": "(I1\nt", "offset": "I3\n"}, "outside"),
        ({"size": "(I2\nt", "stride": "(I-1\nt"}, "impossible"),
        ({"size": "(I-2\nt", "stride": "(I1\nt"}, "impossible"),
        ({"size": "(I2\nt", "stride": "(I1\nt", "offset": "I-1\n"}, "impossible"),
        ({"size": "(L9223372036854775807L\nt", "stride": "(I0\nt"}, "impossible"),
        ({"size": "(I1099511627776\nt", "stride": "(I0\nt"}, "outside"),
        ({"size": "(I4611686018427387903\nI4\nt", "stride": "(I0\nI0\nt"}, "impossible"),
        ({"size": "(I0\nI4611686018427387903\nI8\nt", "stride": "(I0\nI0\nI0\nt"}, "impossible"),
        ({"size": "(I2\nI2\nt", "stride": "(I1\nt"}, "impossible"),
        ({"size": "(F2.0\nt", "stride": "(I1\nt"}, "impossible"),
        ({"size": "(I01\nt", "stride": "(I1\nt"}, "impossible"),
        ({"size": "V2\n", "stride": "(I1\nt"}, "impossible"),
        ({"size": "(I4\nt", "stride": "(I1\nt", "count": "I5\n"}, "damaged"),
        ({"size": "(I4\nt", "stride": "(I1\nt", "count": "I-1\n"}, "damaged"),
        ({"size": "(I4\nt", "stride": "(I1\nt", "count": "I4611686018427387904\n"}, "damaged"),
        ({"size": "(I4\nt", "stride": "(I1\nt", "key": "V../0\n"}, "damaged"),
        ({"size": "(I4\nt", "stride": "(I1\nt", "key": "I0\n"}, "damaged"),
    ],
)
def test_hostile_tensors_are_refused(tmp_path: Path, changes: dict[str, str], says: str) -> None:
    assert says in refused(archive(tmp_path / "a.pth", tensor_program(**changes), FOUR))


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b".",
        b"\x80\x02.",
        b"\x80\x02}",
        b"\x80\x02]N.",
        b"\x80\x02Na.",
        b"\x80\x02h\x05.",
        b"\x80\x02}]Nu.",
        b"\x80\x02}(Ku.",
        b"\x80\x02\x85.",
        b"\x80\x02t.",
        b"\x80\x02}(Nu.",
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.",
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
        b"\x80\x02\x8b" + struct.pack("<i", 0x7FFFFFFF) + b"x.",
        b"\x80\x02\x8b" + struct.pack("<i", -1) + b".",
        b"\x80\x02I" + b"9" * 10_000 + b"\n.",
        b"\x80\x02Pabc\n.",
        b"\x80\x05\x97.",
        b"\x80\x02K\x01Q.",
        b"\x80\x02K\x01K\x02\x93.",
        b"\xff\xfe",
        b"\x80\x02I1\n.",
        b"\x80\x02" + b"V" + b"a" * 600 + b"\nV" + b"b" * 600 + b"\n\x93.",
    ],
)
def test_broken_pickles_are_refused(tmp_path: Path, program: bytes) -> None:
    refused(archive(tmp_path / "a.pth", program))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_pickles_never_crash(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    torch.save({"net": {"a": torch.ones(2, 3), "b": torch.zeros(1)}, "o": {"lr": 0.1, "x": (1, None, [True])}}, buffer)
    with zipfile.ZipFile(buffer) as file:
        program = bytearray(file.read(next(n for n in file.namelist() if n.endswith("data.pkl"))))
    for _ in range(data.draw(st.integers(1, 4))):
        program[data.draw(st.integers(0, len(program) - 1))] = data.draw(st.integers(0, 255))
    path = archive(tmp_path_factory.mktemp("fuzz") / "a.pth", bytes(program), {"0": bytes(24), "1": bytes(4)})
    try:
        read_tensors(path)
    except UserError as error:
        assert "\n" not in str(error)


def test_deep_nesting_and_repeats_cost_nothing(tmp_path: Path) -> None:
    deep = b"\x80\x02}Vnet\n" + b")" + b"\x85" * 200_000 + b"s."
    assert isinstance(read_tensors(archive(tmp_path / "deep.pth", deep))["net"], tuple)
    key = b"\x80\x02})" + b"\x85" * 200_000 + b"Ns."
    assert read_tensors(archive(tmp_path / "key.pth", key)) == {}
    laughs = b"\x80\x02}Vnet\n)" + b"2\x86" * 2000 + b"s."
    assert isinstance(read_tensors(archive(tmp_path / "laughs.pth", laughs))["net"], tuple)
    memo = b"\x80\x02}r" + struct.pack("<I", 0xFFFFFFFF) + b"Vnet\nNs."
    assert read_tensors(archive(tmp_path / "memo.pth", memo)) == {"net": None}


def test_huge_pickle_is_refused(tmp_path: Path) -> None:
    assert "bytes of pickle" in refused(archive(tmp_path / "a.pth", b"N" * (PICKLE_BYTES + 1)))


def test_compressed_and_encrypted_archives_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pth", tensor_program("(I4\nt", "(I1\nt"), FOUR, compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(path)


def test_zip_tricks_are_refused(tmp_path: Path) -> None:
    good = archive(tmp_path / "a.pth", tensor_program("(I4\nt", "(I1\nt"), FOUR).read_bytes()
    path = tmp_path / "b.pth"
    start = good.index(b"PK\x01\x02")
    second = good.index(b"PK\x01\x02", start + 4)

    def edited(at: int, content: bytes) -> Path:
        path.write_bytes(good[:at] + content + good[at + len(content) :])
        return path

    assert "different names" in refused(edited(second + 42, struct.pack("<L", 0)))
    assert "outside" in refused(edited(second + 42, struct.pack("<L", 0xFFFFFF)))
    longer = int.from_bytes(good[start + 20 : start + 24], "little") + 40
    assert "overlap" in refused(edited(start + 20, struct.pack("<2L", longer, longer)))
    assert "compressed" in refused(edited(start + 20, struct.pack("<L", 3)))
    assert "encrypted" in refused(edited(start + 8, struct.pack("<H", 1)))
    assert "damaged" in refused(edited(start, b"PKxx"))
    assert "outside" in refused(edited(len(good) - 10, struct.pack("<L", 1 << 30)))
    path.write_bytes(good[:-22] + good[-22:-6] + struct.pack("<LH", 0xFFFFFFFF, 0))
    assert "damaged" in refused(path)
    twice = good.replace(b"archive/data/0", b"archive/data.x")
    path.write_bytes(twice)
    refused(path)
    for cut in (0, 1, 4, 30, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:cut])
        refused(path)
    path.write_bytes(good + b"tail")
    refused(path)
    path.write_bytes(b"#!/bin/sh\n" + good)
    refused(path)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_archives_never_crash(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("zip")
    good = bytearray(archive(folder / "a.pth", tensor_program("(I4\nt", "(I1\nt"), FOUR).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "b.pth"
    path.write_bytes(good)
    try:
        read_tensors(path)
    except UserError as error:
        assert "\n" not in str(error)


def test_other_files_are_refused(tmp_path: Path) -> None:
    legacy = tmp_path / "legacy.pth"
    torch.save({"net": torch.ones(1)}, legacy, _use_new_zipfile_serialization=False)
    assert "legacy" in refused(legacy) and "torch.save" in refused(legacy)
    assert "No such file" in refused(tmp_path / "absent.pth")
    assert refused(tmp_path)
    text = tmp_path / "x.pth"
    text.write_text("hello")
    assert "expected a .pth" in refused(text)
    text.write_bytes(pickle.dumps({"net": 1}, protocol=0))
    refused(text)
    with zipfile.ZipFile(tmp_path / "z.pth", "w") as file:
        file.writestr("notes.txt", "no tensors")
    assert "data.pkl" in refused(tmp_path / "z.pth")
    assert "dictionary" in refused(save(tmp_path / "t.pth", torch.ones(2)))
    big = archive(tmp_path / "big.pth", tensor_program("(I4\nt", "(I1\nt"), FOUR)
    with zipfile.ZipFile(big, "a") as file:
        file.writestr("archive/byteorder", "big")
    assert "little-endian" in refused(big)


def test_reading_uses_the_mapping_not_memory(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the private memory of a process is read from /proc")
    path = save(tmp_path / "a.pth", {"net": {"x": torch.zeros(20_000_000, dtype=torch.int16)}})
    script = (
        "from kinetok.model.restricted import read_tensors\n"
        "private = lambda: int(open('/proc/self/status').read().split('RssAnon:')[1].split()[0])\n"
        f"read_tensors({str(path)!r})['net']['x'][:9].max()\n"
        f"before = private(); x = read_tensors({str(path)!r})['net']['x']; x.max(); print(private() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=_environment()
    )
    assert int(done.stdout) < 10_000  # kB; the file has 40,000


def _environment() -> dict[str, str]:
    source = str(Path(__file__).parents[2] / "src")
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
