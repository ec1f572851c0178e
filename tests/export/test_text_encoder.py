"""MiniLM's graph against the encoder, and the vocabulary that another language rebuilds its tokenizer from."""

import numpy as np
import pytest

from kinetok.export.text_encoder import find_minilm, text_graph, vocabulary
from kinetok.model.text_minilm import MiniLM

TEXTS = ("", "a person walks forward", "A man kicks; then he [SEP] jumps, 3 times! caf\u00e9 " * 3)


@pytest.fixture(scope="module")
def encoder() -> MiniLM:
    return MiniLM()


@pytest.mark.parametrize(
    ("precision", "opset", "tolerance"), [("fp32", 23, 2e-5), ("fp32", 18, 2e-5), ("fp16", 23, 0.02), ("int8", 23, 0.3)]
)
def test_features(folder_of_graphs, encoder, precision, opset, tolerance) -> None:
    session = folder_of_graphs(lambda weights: text_graph(encoder, weights, precision, opset))["text_encoder"]
    _, about = vocabulary(encoder)
    for text in TEXTS:
        ids = np.array([encoder.tokenizer.encode(text).ids[: about["max_ids"]]])
        got = session.run(None, {"input_ids": ids})[0][0]
        np.testing.assert_allclose(got, encoder.encode([text])[0].numpy(), atol=tolerance)


def test_the_vocabulary_is_the_tokenizers(encoder) -> None:
    text, about = vocabulary(encoder)
    pieces = text.split("\n")[:-1]
    assert [encoder.tokenizer.token_to_id(piece) for piece in pieces] == list(range(len(pieces)))
    ids = encoder.tokenizer.encode("walks \U0001f600").ids
    assert ids[0] == about["start_id"] and ids[-1] == about["end_id"] and ids[-2] == about["unknown_id"]
    assert about["special"]["[SEP]"] == about["end_id"]


@pytest.mark.parametrize("spec", [{"type": "none"}, {"type": "flan-t5", "name": "x"}])
def test_what_cannot_be_exported_says_why(spec) -> None:
    assert isinstance(find_minilm(spec), str)
