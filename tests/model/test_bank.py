"""Prompt banks: round trips, hostile files, and the encoder that looks into a bank first."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kinetok.errors import UserError
from kinetok.model import bank as bank_module
from kinetok.model.bank import FORMAT, BankedEncoder, PromptBank

WORDS = st.text("abc xyzé走", min_size=1, max_size=20).filter(str.strip)


class Letters:
    """An encoder of one row a character, that counts what it encodes."""

    dim, name = 4, "letters"

    def __init__(self):
        self.seen = []

    def encode(self, texts):
        self.seen += texts
        return [torch.tensor([[1.0, 0.1, 0, 0], *([ord(letter), 0, 1, -1] for letter in text)]) for text in texts]


def write(path, *, features=None, offsets=None, prompts='["", "a"]', **metadata):
    tensors = {
        "features": torch.ones(3, 4).half() if features is None else features,
        "offsets": torch.tensor([0, 1, 3]) if offsets is None else offsets,
    }
    save_file(tensors, path, {"format": FORMAT, "encoder": "letters", "prompts": prompts} | metadata)
    return path


@settings(deadline=None, max_examples=25)
@given(st.lists(WORDS, max_size=6))
def test_a_bank_survives_the_disk(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("bank") / "bank.safetensors"
    built = PromptBank.build(texts, Letters())
    built.save(path)
    loaded = PromptBank.load(path)
    assert (loaded.name, loaded.dim, loaded.prompts) == ("letters", 4, built.prompts)
    assert set(loaded.prompts) == {" ".join(text.split()) for text in texts}
    for prompt in ["", *built.prompts]:
        features = loaded.encode([prompt])[0]
        assert features.dtype == torch.float32
        assert torch.equal(features, built.encode([prompt])[0])
        assert torch.equal(features, Letters().encode([prompt])[0].half().float())


def test_each_prompt_is_encoded_once_and_reported():
    encoder, told = Letters(), []
    PromptBank.build(["b", " a ", "a", "b"], encoder, progress=lambda *numbers: told.append(numbers))
    assert encoder.seen == ["", "b", "a"]
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("text", ["", " ", "x" * 20_000, "a\x00"])
def test_bad_prompts_are_not_banked(text):
    with pytest.raises(UserError, match="expected"):
        PromptBank.build(["a", text], Letters())


def test_an_unknown_prompt_names_its_neighbours():
    bank = PromptBank.build(["a person walks", "a person runs", "a cat", "someone jumps"], Letters())
    with pytest.raises(UserError, match=r"nearest: 'a person walks'.*kinetok embed") as caught:
        bank.encode(["a", "a person walk"][1:])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="nearest: none"):
        PromptBank.build([], Letters()).encode(["a"])


def test_a_folder_is_not_overwritten(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        PromptBank.build([], Letters()).save(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        {"offsets": torch.tensor([0, 1, 4])},
        {"offsets": torch.tensor([0, 2, 2])},
        {"offsets": torch.tensor([0, 4, 3])},
        {"offsets": torch.tensor([1, 2, 3])},
        {"offsets": torch.tensor([-1, 1, 3])},
        {"offsets": torch.tensor([0, 3])},
        {"offsets": torch.tensor([0, 2**62, 3])},
        {"offsets": torch.tensor([-(2**63), 2**63 - 1, 3])},
        {"offsets": torch.tensor([[0, 1, 3]])},
        {"offsets": torch.tensor(0)},
        {"offsets": torch.tensor([0.0, 1.0, 3.0])},
        {"features": torch.ones(3, 4)},
        {"features": torch.ones(3, 4).long()},
        {"features": torch.ones(12).half()},
        {"features": torch.full((3, 4), torch.nan).half()},
        {"features": torch.ones(200, 4).half(), "offsets": torch.tensor([0, 1, 200])},
        {"prompts": ""},
        {"prompts": "["},
        {"prompts": "[" * 100_000},
        {"prompts": "{}"},
        {"prompts": "[1, 2]"},
        {"prompts": '["", ""]'},
        {"prompts": '["a", "b"]'},
        {"prompts": '["", ["a"]]'},
        {"format": "kinetok-bank-9"},
    ],
    ids=lambda damage: " ".join(f"{key} {str(value)[:20]}" for key, value in damage.items()).replace("\n", " "),
)
def test_a_damaged_bank_is_refused(tmp_path, damage):
    assert PromptBank.load(write(tmp_path / "whole.safetensors")).prompts == ["a"]
    with pytest.raises(UserError, match="prompt bank") as caught:
        PromptBank.load(write(tmp_path / "bank.safetensors", **damage))
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "bank.safetensors"
    for name in (".", "absent.safetensors"):
        with pytest.raises(UserError, match="prompt bank"):
            PromptBank.load(tmp_path / name)
    save_file({"features": torch.ones(3, 4).half()}, path, {"format": FORMAT})
    with pytest.raises(UserError, match="cannot be read"):
        PromptBank.load(path)
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(UserError, match=r"prompt bank"):
        PromptBank.load(path)
    header = json.dumps({"features": {"dtype": "F16", "shape": [1 << 40, 4], "data_offsets": [0, 1 << 43]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match="cannot be read"):
        PromptBank.load(path)


def test_every_truncation_is_refused(tmp_path):
    path = write(tmp_path / "bank.safetensors")
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="cannot be read"):
            PromptBank.load(path)


def test_banked_prompts_need_no_encoder(monkeypatch):
    def load(spec):
        loaded.append(spec)
        return Letters()

    loaded = []
    monkeypatch.setattr(bank_module, "text_encoder", load)
    encoder = BankedEncoder(PromptBank.build(["a"], Letters()), {"type": "minilm", "name": "letters"}, 4)
    assert (encoder.dim, encoder.name) == (4, "letters")
    assert [len(features) for features in encoder.encode(["", "a", "a"])] == [1, 2, 2]
    assert loaded == []
    assert [len(features) for features in encoder.encode(["a", "bcd", "ef"])] == [2, 4, 3]
    assert loaded == [{"type": "minilm", "name": "letters"}]
    assert len(BankedEncoder(None, {"type": "minilm"}, 4).encode([""])[0]) == 1


def test_an_encoder_of_another_width_is_refused(monkeypatch):
    monkeypatch.setattr(bank_module, "text_encoder", lambda spec: Letters())
    with pytest.raises(UserError, match="expected 2048 numbers a token, got 4"):
        BankedEncoder(None, {"type": "minilm"}, 2048).encode(["a"])


def test_a_model_without_an_encoder_has_its_bank_alone():
    with pytest.raises(UserError, match="nearest: 'a'"):
        BankedEncoder(PromptBank.build(["a"], Letters()), {"type": "none"}, 4).encode(["b"])
    with pytest.raises(UserError, match="only prompts of its bank"):
        BankedEncoder(None, {"type": "none"}, 4).encode(["b"])
