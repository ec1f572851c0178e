"""Prefill and decode graphs against ``MotionDecoder``: the 7B's head sizes at small width, ragged texts, every precision."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch

from kinetok.export.golden import stored_decoder
from kinetok.model.graphs.builder import WeightFile
from kinetok.model.graphs.decoder import DecoderExport, module_tensors
from kinetok.model.graphs.precision import Precision

CAPACITY = 30


def sessions(folder_of_graphs, decoder, precision="fp32", kv=np.float32, opset=23):
    export = DecoderExport(
        config=decoder.config,
        tensors=module_tensors(decoder),
        precision=Precision(name=precision),
        kv_dtype=np.dtype(kv),
        opset=opset,
    )
    return folder_of_graphs(export.prefill, export.decode)


def cache_of(config, rows, kv=np.float32):
    shape = (rows, config.n_head, CAPACITY, config.head_dim)
    return {
        f"past_key_values.{i}.{part}": np.zeros(shape, kv) for i in range(config.n_layer) for part in ("key", "value")
    }


def call(session, feeds):
    """Logits, and the cache that the next call takes."""
    names = [value.name for value in session.get_outputs()]
    results = dict(zip(names, session.run(names, feeds), strict=True))
    return results.pop("logits"), {name.replace("present", "past_key_values"): value for name, value in results.items()}


def compare(graphs, decoder, tolerance, kv=np.float32, steps=6):
    """Logits of three ragged texts and some forced tokens; returns the largest difference."""
    config, draw = decoder.config, torch.Generator().manual_seed(5)
    texts = [torch.randn(length, config.text_dim, generator=draw) for length in (4, 9, 1)]
    torch_cache = decoder.new_cache(3, CAPACITY)
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).numpy()
    lengths = np.array([len(text) for text in texts])
    feeds = {"text_features": padded, "text_lengths": lengths, **cache_of(config, 3, kv)}
    worst = 0.0
    with torch.inference_mode():
        wanted = decoder.prefill(texts, torch_cache)
        got, cache = call(graphs["prefill"], feeds)
        for step in range(steps):
            assert got.dtype == np.float32 and got.shape == wanted.shape
            worst = max(worst, float(np.abs(got - wanted.numpy()).max()))
            tokens = torch.randint(0, config.codebook, (3,), generator=draw)
            wanted = decoder.decode_step(tokens, torch_cache)
            ids = {"input_ids": tokens.numpy()[:, None], "position_ids": (lengths + step)[:, None]}
            got, cache = call(graphs["decode"], {**ids, **cache})
    assert worst <= tolerance
    return worst


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_head": 2, "n_embd": 128},
        {"n_head": 1, "n_embd": 100},
        {"n_head": 1, "n_embd": 128, "rope": "bf16"},
        {"tie_weights": True},
    ],
    ids=["head 32", "head 64", "head 100", "head 128, bf16 table", "tied"],
)
def test_fp32_agrees_with_the_decoder(decoder_of, folder_of_graphs, changes, opset) -> None:
    decoder = decoder_of(**changes)
    compare(sessions(folder_of_graphs, decoder, opset=opset), decoder, 1e-4)


@pytest.mark.parametrize("opset", [18, 23])
def test_fp16_agrees_with_rounded_weights(decoder_of, folder_of_graphs, opset) -> None:
    decoder = decoder_of()
    graphs = sessions(folder_of_graphs, decoder, "fp16", np.float16, opset)
    rounded = stored_decoder(decoder, Precision(name="fp16"))
    largest = float(rounded.head.weight.detach().norm(dim=1).max())
    compare(graphs, rounded, 5e-3 * largest, np.float16)


@pytest.mark.parametrize(("precision", "tolerance"), [("int8", 0.05), ("int4", 0.1)])
@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("kv", [np.float32, np.float16])
def test_integers_agree_with_dequantised_weights(
    decoder_of, folder_of_graphs, precision, tolerance, tie_weights, kv
) -> None:
    """int4 differs from the model by more than from its own dequantised weights, which is what makes this a check."""
    decoder = decoder_of(tie_weights=tie_weights)
    graphs = sessions(folder_of_graphs, decoder, precision, kv)
    rounded = stored_decoder(decoder, Precision(name=precision))
    compare(graphs, rounded, tolerance * float(rounded.head.weight.detach().norm(dim=1).max()), kv)


@pytest.mark.parametrize(
    ("precision", "kv", "changes", "operator"),
    [
        ("int8", np.float32, {}, "GroupQueryAttention"),
        ("int4", np.float32, {}, "GroupQueryAttention"),
        ("int8", np.float16, {}, "Attention"),
        ("int8", np.float32, {"n_head": 1, "n_embd": 100}, "Attention"),
        ("fp32", np.float32, {}, "Attention"),
    ],
)
def test_which_operator_attends_in_a_step(decoder_of, tmp_path, precision, kv, changes, operator) -> None:
    """ONNX Runtime's own one only where the graph is its own anyway and the operator takes cache and heads."""
    decoder = decoder_of(**changes)
    export = DecoderExport(
        config=decoder.config,
        tensors=module_tensors(decoder),
        precision=Precision(name=precision),
        kv_dtype=np.dtype(kv),
    )
    with (tmp_path / "weights.bin").open("wb") as file:
        weights = WeightFile(file, "weights.bin")
        kinds = {
            graph.name: [node.op_type for node in graph.model().graph.node if "Attention" in node.op_type]
            for graph in (export.prefill(weights), export.decode(weights))
        }
    assert kinds == {"prefill": ["Attention"] * 2, "decode": [operator] * 2}


def test_a_graph_in_memory_adds_and_normalises_in_one_operator(decoder_of) -> None:
    """All sums but the last, whose norm is taken of one position; what nobody reads has no name and is not computed."""
    onnx = pytest.importorskip("onnx", reason="needs the extra 'onnx'")
    from kinetok.model.graphs.live import decoder_graph

    nodes = onnx.load_from_string(decoder_graph(decoder_of())[0]).graph.node
    fused = [node for node in nodes if node.op_type == "SkipSimplifiedLayerNormalization"]
    assert len(fused) == 2 * 2 - 1 and all(list(node.output[1:3]) == ["", ""] for node in fused)


def test_integers_of_heads_that_need_standard_attention(decoder_of, folder_of_graphs) -> None:
    decoder = decoder_of(n_head=1, n_embd=100)
    rounded = stored_decoder(decoder, Precision(name="int8"))
    tolerance = 0.05 * float(rounded.head.weight.detach().norm(dim=1).max())
    compare(sessions(folder_of_graphs, decoder, "int8"), rounded, tolerance)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_neither_padding_nor_what_lies_beyond_a_row_is_seen(decoder_of, folder_of_graphs, precision) -> None:
    decoder = decoder_of()
    config, graphs = decoder.config, sessions(folder_of_graphs, decoder, precision)
    text = np.random.default_rng(0).normal(size=(1, 3, config.text_dim)).astype(np.float32)
    results = []
    for filler in (0.0, 1e3):
        padded = np.concatenate((text, np.full((1, 4, config.text_dim), filler, np.float32)), axis=1)
        past = {name: np.full_like(value, filler) for name, value in cache_of(config, 1).items()}
        logits, cache = call(graphs["prefill"], {"text_features": padded, "text_lengths": np.array([3]), **past})
        ids = {"input_ids": np.array([[7]]), "position_ids": np.array([[3]])}
        results.append((logits, call(graphs["decode"], {**ids, **cache})[0]))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize(("opset", "capacity"), [(18, None), (23, None), (24, CAPACITY)])
@pytest.mark.parametrize(("text", "given", "tie"), [(1, 0, False), (1, 1, True), (5, 8, False), (CAPACITY, 0, False)])
def test_one_graph_takes_texts_and_tokens_in_pieces_of_any_size(
    decoder_of, folder_of_graphs, text, given, tie, opset, capacity
) -> None:
    """Two rows, caches with something in them, up to the last position, against the training layout in float64."""
    decoder = decoder_of(tie_weights=tie)
    config, draw = decoder.config, torch.Generator().manual_seed(text + given)
    features = torch.randn(2, text, config.text_dim, generator=draw)
    tokens = torch.randint(0, config.codebook, (2, CAPACITY - text), generator=draw)
    rows = torch.cat((torch.full((2, text), config.pad_id), tokens), 1)
    with torch.inference_mode():
        projected = decoder.text_proj(features).numpy()
        wanted = copy.deepcopy(decoder).double()(rows, features, torch.ones(2, text)).numpy()
    export = DecoderExport(
        config=config,
        tensors=module_tensors(decoder),
        precision=Precision(name="fp32"),
        kv_dtype=np.dtype(np.float32),
        opset=opset,
        capacity=capacity,
    )
    session = folder_of_graphs(export.extend)["extend"]
    none = np.zeros((2, 0, config.n_embd), np.float32)
    cache = {name: value + 1e3 for name, value in cache_of(config, 2).items()}  # which nothing may see
    first = 0
    # The text and some tokens, one token, three at once, and the rest.
    for last in sorted({text + given, *(min(text + given + more, CAPACITY) for more in (1, 4)), CAPACITY}):
        feeds = {
            "text_embeds": none if first else projected,
            "input_ids": tokens.numpy()[:, max(0, first - text) : last - text],
            "position_ids": np.broadcast_to(np.arange(first, last), (2, last - first)),
        }
        logits, cache = call(session, {**feeds, **cache})
        np.testing.assert_allclose(logits, wanted[:, last - 1], atol=1e-4)
        first = last


def test_both_graphs_read_one_weights_file_in_which_each_weight_lies_once(
    decoder_of, folder_of_graphs, tmp_path
) -> None:
    decoder = decoder_of()
    sessions(folder_of_graphs, decoder)
    import onnx

    places = {}
    for name in ("prefill", "decode"):
        for tensor in onnx.load(str(tmp_path / f"{name}.onnx"), load_external_data=False).graph.initializer:
            if tensor.external_data:
                about = {entry.key: entry.value for entry in tensor.external_data}
                assert about["location"] == "weights.bin" and int(about["offset"]) % 4096 == 0
                assert places.setdefault(tensor.name, about) == about
    spans = sorted((int(a["offset"]), int(a["offset"]) + int(a["length"])) for a in places.values())
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    products = sum(value.numel() * 4 for value in decoder.parameters())
    assert products <= spans[-1][1] < products + 4096 * (len(spans) + 1) + 2 * 40 * 16 * 4
