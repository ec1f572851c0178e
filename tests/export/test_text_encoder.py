"""Text encoders as graphs against the encoders, and what another language rebuilds their tokenizers from."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from kinetok.errors import UserError
from kinetok.export.text_encoder import find_encoder, text_graph, write_tokenizer
from kinetok.export.text_minilm import vocabulary
from kinetok.export.text_t5 import distance_buckets
from kinetok.model.text_minilm import PACKAGE, MiniLM
from kinetok.model.text_t5 import FlanT5

TEXTS = ("", "a person walks forward", "A man kicks; then he [SEP] jumps, 3 times! caf\u00e9 " * 3)


def compare(folder_of_graphs, encoder, texts, precision, opset, tolerance) -> None:
    session = folder_of_graphs(lambda weights: text_graph(encoder, weights, precision, opset))["text_encoder"]
    for text in texts:
        got = session.run(None, {"input_ids": np.array([encoder.ids(text)])})[0][0]
        np.testing.assert_allclose(got, encoder.encode([text])[0].numpy(), atol=tolerance)


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    pytest.importorskip(PACKAGE, reason="MiniLM's weights are not installed")
    return MiniLM()


@pytest.mark.parametrize(
    ("precision", "opset", "tolerance"), [("fp32", 23, 2e-5), ("fp32", 18, 2e-5), ("fp16", 23, 0.02), ("int8", 23, 0.3)]
)
def test_minilm(folder_of_graphs, minilm, precision, opset, tolerance) -> None:
    compare(folder_of_graphs, minilm, TEXTS, precision, opset, tolerance)


def test_the_vocabulary_is_the_tokenizers(minilm) -> None:
    text, about = vocabulary(minilm)
    pieces = text.split("\n")[:-1]
    assert [minilm.tokenizer.token_to_id(piece) for piece in pieces] == list(range(len(pieces)))
    ids = minilm.tokenizer.encode("walks \U0001f600").ids
    assert ids[0] == about["start_id"] and ids[-1] == about["end_id"] and ids[-2] == about["unknown_id"]
    assert about["special"]["[SEP]"] == about["end_id"]


@pytest.mark.parametrize(
    ("changes", "precision", "opset", "tolerance"),
    [
        ({}, "fp32", 23, 3e-5),
        ({}, "fp32", 18, 3e-5),
        ({}, "fp16", 23, 5e-3),
        ({}, "int8", 23, 0.1),
        # An attention that is wider than the model, a lone activation, other buckets: the structure's other switches.
        ({"d_kv": 12, "feed_forward_proj": "relu", "relative_attention_num_buckets": 8}, "fp32", 23, 3e-5),
        ({"feed_forward_proj": "gated-silu", "num_layers": 3, "relative_attention_max_distance": 20}, "fp32", 23, 3e-5),
    ],
)
def test_t5_over_lengths_from_one_id_to_512(folder_of_graphs, t5_folder, changes, precision, opset, tolerance) -> None:
    """Features of size 1: RMS norms end the encoder. The last texts have 151, 512 and, cut, 512 ids."""
    encoder = FlanT5(str(t5_folder(**changes)))
    texts = ["", "a person walks forward", *(("runs a " * count).strip() for count in (75, 255, 300))]
    assert [len(encoder.ids(text)) for text in texts] == [1, 5, 151, 511, 512]
    compare(folder_of_graphs, encoder, texts, precision, opset, tolerance)


@pytest.mark.parametrize(("buckets", "largest"), [(32, 128), (8, 128), (32, 20), (16, 64)])
def test_distances_fall_into_the_buckets_of_transformers(buckets, largest) -> None:
    pytest.importorskip("transformers")
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    expected = T5Attention._relative_position_bucket(torch.arange(-511, 512), True, buckets, largest)
    assert torch.equal(distance_buckets(512, buckets, largest), expected)


def test_t5s_tokenizer_is_a_file_of_its_own(t5_folder, tmp_path) -> None:
    encoder = FlanT5(str(t5_folder()))
    about = write_tokenizer(encoder, tmp_path)
    alone = Tokenizer.from_file(str(tmp_path / about["tokenizer"]))
    for text in ("", "a person walks forward", "runs " * 300, "caf\u00e9 "):
        assert alone.encode(text).ids == encoder.ids(text)
        assert encoder.ids(text)[-1] == about["end_id"]
    longer = alone.encode("runs " * 600).ids
    assert [*longer[: about["max_ids"] - 1], about["end_id"]] == encoder.ids("runs " * 600)


@pytest.mark.parametrize(
    ("spec", "why"),
    [({"type": "none"}, "names no text encoder"), ({"type": "flan-t5", "name": "nobody/has-this"}, "nobody/has-this")],
)
def test_an_encoder_that_is_not_here_is_named_and_the_bank_is_the_way_out(spec, why) -> None:
    reason = find_encoder(spec)
    assert isinstance(reason, str) and why in reason and "bank" in reason and "\n" not in reason


def test_an_activation_that_has_no_graph(folder_of_graphs, t5_folder) -> None:
    encoder = FlanT5(str(t5_folder()))
    encoder.model.config.dense_act_fn = "mish"
    with pytest.raises(UserError, match="knows the activations relu, gelu, gelu_new, silu, got 'mish'"):
        folder_of_graphs(lambda weights: text_graph(encoder, weights, "fp32", 23))
