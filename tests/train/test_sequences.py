"""The caches beside a clip store: tokens and text features, made once, going on after a kill, and read."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from kinetok.errors import UserError
from kinetok.model.config import TokenizerConfig
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.train.data import sequences
from kinetok.train.data.sequences import Sequences, mean_lengths, tokens_name, write_text, write_tokens
from kinetok.train.data.shard_import import import_shards
from kinetok.train.data.shards import ClipStore

pytest.importorskip("pyarrow", reason="a clip store has a Parquet index, and pyarrow is not installed")
ROOT = Path(__file__).resolve().parents[2]


class Encoder:
    """A feature a letter; ``seen`` is what was encoded, ``stop`` the number of texts after which it is interrupted."""

    dim, name = 5, "letters"
    value = 1.0

    def __init__(self, stop: int | None = None) -> None:
        self.seen: list[str] = []
        self.stop = stop

    def on(self, device: str) -> "Encoder":
        self.device = device
        return self

    def encode(self, texts):
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt
        self.seen += texts
        return [torch.full((len(text), 5), len(text) * self.value) for text in texts]


@pytest.fixture
def encoder(monkeypatch) -> Encoder:
    one = Encoder()
    monkeypatch.setattr(sequences, "text_encoder", lambda spec, device: one.on(device))
    return one


@pytest.fixture
def folder(motionmillion: Path, tmp_path: Path) -> Path:
    """A store, and something in the place of a tokenizer's file."""
    import_shards(motionmillion, tmp_path / "store", clips=10)
    (tmp_path / "tokenizer.pt").write_bytes(b"a tokenizer")
    return tmp_path


def tokenize(folder: Path, tokenizer: MotionTokenizer, **given) -> Path:
    mean, std = torch.zeros(272, dtype=torch.float64), torch.ones(272, dtype=torch.float64)
    return write_tokens(ClipStore(folder / "store"), folder / "tokenizer.pt", tokenizer, mean, std, **given)


@pytest.fixture
def tokenizer() -> MotionTokenizer:
    torch.manual_seed(0)
    return MotionTokenizer(TokenizerConfig(nb_code=256, code_dim=8, width=8, depth=1)).eval()


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_tokens_and_text_are_made_once(folder: Path, tokenizer: MotionTokenizer, encoder: Encoder, monkeypatch) -> None:
    store = ClipStore(folder / "store")
    with pytest.raises(UserError, match="kinetok data tokens"):
        Sequences(folder / "store", tokenizer=folder / "tokenizer.pt")
    monkeypatch.setattr(sequences, "BATCH_FRAMES", 200)
    made = tokenize(folder, tokenizer)
    assert made.name == tokens_name(folder / "tokenizer.pt")
    assert {path.name for path in made.iterdir()} == {"about.json", "tokens.bin"}
    with pytest.raises(UserError, match="kinetok data text"):
        Sequences(folder / "store", tokenizer=folder / "tokenizer.pt")
    assert mean_lengths(folder / "store", 20, 1, 99) is None
    for _ in range(2):
        write_text(store, {"type": "letters"})
    assert len(encoder.seen) == len(set(encoder.seen)) == 26  # 25 sentences of their own and one that all share
    with pytest.raises(UserError, match="delete that folder first"):
        write_text(store, {"type": "others"})
    data = Sequences(folder / "store", tokenizer=folder / "tokenizer.pt")
    for clip in (0, 7, 24):
        alone = tokenizer.encode(torch.from_numpy(store.read(clip))[None])[0]
        assert torch.equal(data.tokens(clip), alone.long()) and len(alone) == data.lengths[clip]
        for place, chance in enumerate((0.2, 0.9)):
            row = int(data.caption(np.array([clip]), np.array([chance]))[0])
            text = store.captions(clip)[place]
            assert data.caption_text(row) == text and len(data.text(row)) == data.text_lengths[row] == len(text)
            assert float(data.text(row)[0, 0]) == len(text)
    clips, captions, firsts, counts = (
        np.array([7, 0, 24]),
        np.array([3, 0, 3]),
        np.array([1, 0, 2]),
        np.array([4, 9, 0]),
    )
    text, tokens = data.rows(captions, np.array([5, 1, 14]), clips, firsts, counts)
    assert torch.equal(text, torch.cat([data.text(3)[:5], data.text(0)[:1], data.text(3)[:14]]).half())
    assert torch.equal(tokens, torch.cat([data.tokens(7)[1:5], data.tokens(0)[:9]]))
    codes = np.fromfile(made / "tokens.bin", np.int32)
    codes[3] = 240
    codes.tofile(made / "tokens.bin")
    with pytest.raises(UserError, match=r"tokens\.bin: expected tokens from 0 to 239"):
        data = Sequences(folder / "store", tokenizer=folder / "tokenizer.pt")
        data.rows(captions[:1], np.array([1]), np.array([0]), firsts[:1], np.array([9]))
    train = store.splits == "train"
    lengths = [
        len(text) for captions, here in zip(store.all_captions(), train, strict=True) if here for text in captions
    ]
    assert mean_lengths(folder / "store", 20, 1, 99) == (np.minimum(lengths, 20).mean(), data.lengths[train].mean())


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("tokens", r"tokens\.bin: expected \d+ bytes"),
        ("captions", r"captions\.bin: expected 200 bytes"),
        ("features", r"features\.bin: expected \d+ bytes"),
        ("lengths", r"lengths\.bin: expected 104 bytes"),
        ("captions number", "text: its captions are none of this store"),
        ("counts", "text: its captions are none of this store"),
        ("about", r"text: expected kinetok-text-2, but its dim is '0'; delete it"),
        ("form", r"tokens-\w+: expected kinetok-tokens-2, but it is 'kinetok-tokens-1'; delete it"),
        ("broken about", r"tokens-\w+: expected kinetok-tokens-2, but Expecting value"),
        ("other store", r"tokens-\w+: does not belong to the clips of this store"),
        ("other text", r"text: does not belong to the clips of this store"),
    ],
)
def test_caches_that_are_not_the_stores(
    folder: Path, tokenizer: MotionTokenizer, encoder: Encoder, motionmillion: Path, harm: str, says: str
) -> None:
    made = tokenize(folder, tokenizer)
    text = write_text(ClipStore(folder / "store"), {"type": "letters"})
    if harm == "tokens":
        (made / "tokens.bin").write_bytes(b"1234")
    elif harm in ("captions number", "counts"):
        path = text / f"{harm.split()[0]}.bin"
        numbers = np.fromfile(path, np.int32)
        numbers[:2] = (1, 26) if harm == "captions number" else (0, 4)
        numbers.tofile(path)
    elif harm in ("about", "form", "broken about"):
        path = (text if harm == "about" else made) / "about.json"
        changed = {
            **json.loads(path.read_text()),
            **({"dim": 0} if harm == "about" else {"format": "kinetok-tokens-1"}),
        }
        path.write_text("" if harm == "broken about" else json.dumps(changed))
    elif harm in ("captions", "features", "lengths"):
        (text / f"{harm}.bin").write_bytes(b"1234")
    else:
        # The same clips in another order have as many bytes.
        lists = motionmillion / "split/version1/t2m_60_300/train.txt"
        lists.write_text("\n".join(reversed(lists.read_text().split())))
        import_shards(motionmillion, folder / "other")
        for one in (made, text) if harm == "other store" else (text,):
            one.replace(folder / "other" / one.name)
        (folder / "store").rename(folder / "first")
        (folder / "other").rename(folder / "store")
        if harm == "other text":
            tokenize(folder, tokenizer)
    with pytest.raises(UserError, match=says) as told:
        Sequences(folder / "store", tokenizer=folder / "tokenizer.pt")
    assert "\n" not in str(told.value)
    if harm == "other store":
        with pytest.raises(UserError, match=says):
            tokenize(folder, tokenizer)
        with pytest.raises(UserError, match="text: does not belong"):
            write_text(ClipStore(folder / "store"), {"type": "letters"})


def test_encoding_goes_on_where_it_was_interrupted(folder: Path, encoder: Encoder) -> None:
    store = ClipStore(folder / "store")
    encoder.stop = 9
    with pytest.raises(KeyboardInterrupt):
        write_text(store, {"type": "letters"})
    rows = folder / "store" / "text.writing" / "features.bin"
    rows.write_bytes(rows.read_bytes()[:-3])  # as a crash leaves it
    encoder.stop = None
    with pytest.raises(UserError, match=r"something else was being written there \(it differs in encoder\)"):
        write_text(store, {"type": "others"})
    with pytest.raises(UserError, match=r"it differs in device"):
        write_text(store, {"type": "letters"}, device="cuda")
    write_text(store, {"type": "letters"})
    assert encoder.device == "cpu"
    assert len(encoder.seen) == 26 + 1 and encoder.seen[8] == encoder.seen[9]


def test_tokens_go_on_where_they_were_interrupted(folder: Path, tokenizer: MotionTokenizer, monkeypatch) -> None:
    monkeypatch.setattr(sequences, "BATCH_FRAMES", 100)
    whole = tree(tokenize(folder, tokenizer))
    (folder / "store" / tokens_name(folder / "tokenizer.pt")).rename(folder / "whole")
    calls = []

    def stops(done: int, of: int, what: str) -> None:
        calls.append(done)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(folder, tokenizer, progress=stops)
    monkeypatch.setattr(sequences, "BATCH_FRAMES", 300)
    with pytest.raises(UserError, match=r"it differs in batch_frames.; delete that folder"):
        tokenize(folder, tokenizer)
    monkeypatch.setattr(sequences, "BATCH_FRAMES", 100)
    assert tree(tokenize(folder, tokenizer, progress=stops)) == whole
    assert calls == sorted(set(calls)) and calls[-1] == 25  # none was made twice


@pytest.mark.parametrize("job", ["tokens", "text"])
def test_killed_runs_end_in_the_same_bytes(folder: Path, killed, job: str) -> None:
    result = killed(job, folder, 12)
    assert result["killed"] >= 12 and result["points"] > 30 and result["differing"] == []


def test_features_that_16_bits_do_not_hold_are_refused(folder: Path, encoder: Encoder) -> None:
    encoder.value = 1e6
    with pytest.raises(UserError, match=r"features of 'a person walks.*' are not finite in 16 bits"):
        write_text(ClipStore(folder / "store"), {"type": "letters"})
    assert not (folder / "store" / "text").exists()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf, 65504, -65504, 6e-8, -0.0])
def test_features_that_are_no_longer_finite_are_named(
    folder: Path, tokenizer: MotionTokenizer, encoder: Encoder, bad: float
) -> None:
    """Not the learning rate, which a loss of NaN would be blamed on; every finite number passes."""
    tokenize(folder, tokenizer)
    path = write_text(ClipStore(folder / "store"), {"type": "letters"}) / "features.bin"
    rows = np.fromfile(path, np.float16)
    rows[7] = bad
    rows.tofile(path)
    data = Sequences(folder / "store", tokenizer=folder / "tokenizer.pt")
    one = np.array([0])

    def read() -> torch.Tensor:
        return data.rows(one, one + 3, one, one, one + 4)[0]

    if np.isfinite(bad):
        assert float(read()[1, 2]) == np.float16(bad)
    else:
        with pytest.raises(
            UserError, match=r"text/features\.bin: expected finite text features; delete its folder"
        ) as told:
            read()
        assert "\n" not in str(told.value)


def test_a_full_disk(folder: Path, tokenizer: MotionTokenizer, encoder: Encoder, monkeypatch) -> None:
    import errno

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(sequences, "_save", full)
        for call in (
            lambda: tokenize(folder, tokenizer),
            lambda: write_text(ClipStore(folder / "store"), {"type": "x"}),
        ):
            with pytest.raises(UserError, match=r"cannot write .*No space left on device; it goes on from there"):
                call()
    tokenize(folder, tokenizer)
    write_text(ClipStore(folder / "store"), {"type": "letters"})
    assert len(Sequences(folder / "store", tokenizer=folder / "tokenizer.pt").lengths) == 25
