"""The Flan-T5 path on a tiny random model with a tiny tokenizer, without a network."""

import sys

import pytest
import torch

from kinetok.errors import UserError
from kinetok.model.text import text_encoder
from kinetok.model.text_t5 import FlanT5

EOS = 1
TEXTS = ["a person walks forward", "a person", "", "runs " * 200]


@pytest.fixture(scope="module")
def folder(t5_folder):
    return t5_folder()


@pytest.fixture(scope="module")
def encoder(folder):
    return text_encoder({"type": "flan-t5", "name": str(folder)})


def test_features_are_the_encoder_states_with_the_end_token(folder, encoder):
    import transformers

    reference = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval().get_encoder()
    assert (encoder.dim, encoder.name) == (16, str(folder))
    ids = torch.tensor([[3, 4, 5, 6, EOS]])  # no prefix before the words
    with torch.no_grad():
        expected = reference(ids).last_hidden_state[0]
    got = encoder.encode(TEXTS[:1])[0]
    assert got.dtype == torch.float32 and not got.requires_grad
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    assert encoder.encode([""])[0].shape == (1, 16)


def test_alone_equals_padded_in_a_batch(encoder):
    batch = encoder.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = encoder.model(**batch).last_hidden_state
    for row, mask, alone in zip(states, batch.attention_mask, encoder.encode(TEXTS), strict=True):
        assert len(alone) == min(int(mask.sum()), 150)
        torch.testing.assert_close(alone, row[: len(alone)], atol=1e-5, rtol=0)


def test_long_texts_are_cut_after_encoding(encoder):
    """Tokens up to 512 are seen by the encoder, features up to 150 are kept (section 3)."""
    short, long, longer = encoder.encode(["runs " * 149, "runs " * 511, "runs " * 2000])
    assert len(short) == len(long) == len(longer) == 150
    assert not torch.equal(short, long)
    assert torch.equal(long, longer)


@pytest.mark.parametrize("content", ["", "{", "{}"])
def test_what_is_no_t5_is_refused(tmp_path, content):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="expected a T5 directory or hub id") as caught:
        FlanT5(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_local_weights_alone_need_no_network(folder, encoder, monkeypatch):
    assert torch.equal(FlanT5(str(folder), local=True).encode(TEXTS[:1])[0], encoder.encode(TEXTS[:1])[0])
    with pytest.raises(UserError, match="expected a T5 directory or hub id"):
        FlanT5("nobody/has-this", local=True)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'kinetok\[text\]'"):
        FlanT5("google/flan-t5-xl")
