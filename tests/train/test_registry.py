"""Texts that are numbered on the disk."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.train.data import registry
from kinetok.train.data.registry import Registry


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=3), max_size=40), st.integers(0, 10))
@settings(max_examples=50, deadline=None)
def test_it_is_a_dictionary(texts: list[str], start: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, Registry(Path(folder) / "texts") as numbered:
        wanted: dict[str, int] = {}
        for text in texts:
            new = text not in wanted
            assert numbered.number(text) == (wanted.setdefault(text, len(wanted)), new)
        assert len(numbered) == len(wanted)
        assert list(numbered.texts(start)) == list(wanted)[start:]


def test_it_is_scratch(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "texts"
    path.write_bytes(b"what a crash left")
    monkeypatch.setattr(registry, "ROWS", 3)
    with Registry(path) as numbered:
        assert [numbered.number(str(n % 8))[0] for n in range(20)] == [n % 8 for n in range(20)]
        assert list(numbered.texts(0)) == [str(n) for n in range(8)]
    assert not path.exists()


def test_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*texts: unable to open"), Registry(tmp_path / "none" / "texts"):
        pass
    with Registry(tmp_path / "texts") as numbered:
        numbered._base.execute("PRAGMA max_page_count=5")
        with pytest.raises(UserError, match=r"cannot write .*is full.*Run it again and it goes on"):
            for n in range(10_000):
                numbered.number(f"caption {n}")
