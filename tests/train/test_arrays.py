"""Files that nobody has looked at yet: whatever their bytes are, an array or one clear line."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.train.data.arrays import MOST_FRAMES, check_features, plain_bytes, read_features


def npy(array: np.ndarray, **given: object) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **given)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_every_kind_of_number_and_layout(dtype: str, order: str, version: tuple[int, int]) -> None:
    features = np.asarray(np.random.default_rng(0).standard_normal((7, 272)), dtype, order)  # type: ignore[call-overload]
    read = read_features(npy(features, version=version))
    np.testing.assert_array_equal(read, features)
    checked = check_features(read, 7)
    assert checked.dtype == np.float32 and checked.flags.c_contiguous
    np.testing.assert_array_equal(checked, features.astype(np.float32))


WHOLE = npy(np.ones((3, 272), np.float32))


@given(st.lists(st.tuples(st.integers(0, 140), st.integers(0, 255)), max_size=6), st.integers(0, len(WHOLE) + 5))
@settings(max_examples=300, deadline=None)
def test_damaged_bytes_give_features_or_one_line(changes: list[tuple[int, int]], length: int) -> None:
    content = bytearray(WHOLE)
    for at, value in changes:
        content[at] = value
    try:
        features = read_features(bytes(content[:length]))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert features.shape == (3, 272) and features.dtype.kind == "f"


def header(shape: str) -> bytes:
    return WHOLE.replace(b"(3, 272), }" + b" " * len(shape), shape.encode() + b", }" + b" " * 8)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read"),
        (b"PK\3\4", "cannot be read"),
        (npy(np.zeros((3, 263), np.float32)), r"expected features \[T, 272\], got float32 \[3, 263\]"),
        (npy(np.zeros((3, 272), np.int64)), "got int64"),
        (npy(np.zeros((2, 3, 272), np.float32)), r"got float32 \[2, 3, 272\]"),
        (npy(np.array([[None] * 272] * 3)), "got object"),
        (npy(np.zeros((3, 272), "f4"), version=(3, 0)), "a .npy of version 3.0"),
        (header("(9000000000000, 272)"), f"expected at most {MOST_FRAMES} frames, got 9000000000000"),
        (header("(-3, 272)"), "not .-3, 272. of float32"),
        (header("(100000, 272)"), r"not \[100000, 272\] of float32"),
        (WHOLE + b"1", "it has 3393 bytes"),
    ],
)
def test_what_is_no_clip(content: bytes, says: str) -> None:
    assert content != WHOLE
    with pytest.raises(UserError, match=says):
        read_features(content)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1001])
def test_numbers_that_no_body_has(bad: float) -> None:
    features = np.zeros((40, 272), np.float32)
    features[17, 5] = bad
    with pytest.raises(UserError, match=f"expected finite numbers up to 1000, got {bad}"):
        check_features(features, 30)
    with pytest.raises(UserError, match="expected at least 30 frames, got 0"):
        check_features(features[:0], 30)


def test_only_plain_files_of_a_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert plain_bytes(path, 5) == b"12345"
    with pytest.raises(UserError, match="expected at most 4 bytes, got 5"):
        plain_bytes(path, 4)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("link")
    for name, says in (
        ("pipe", "plain file"),
        ("link", "symbolic links"),
        (".", "directory"),
        ("none", "no such file"),
        ("x" * 300, "too long"),
        ("a\0b", "null"),
    ):
        with pytest.raises(UserError, match=says):
            plain_bytes(tmp_path / name, 5)
