"""MiniLM as a graph (``model/text_minilm.py``), and its vocabulary for a tokenizer in another language."""

from typing import Any

import numpy as np

from kinetok.export.text_weights import FLOAT, TextWeights
from kinetok.model.graphs.builder import Graph
from kinetok.model.graphs.ops import attention, gelu, layer_norm
from kinetok.model.text_minilm import EPS, MiniLM


def minilm_graph(g: Graph, encoder: MiniLM, precision: str) -> Graph:
    """Ids int64 ``[1, L]`` to features fp32 ``[1, L + 1, 384]`` (L without the sentence's own vector)."""
    held = TextWeights(g, encoder.weights.__getitem__, precision)
    ids = g.input("input_ids", np.int64, [1, "ids"])
    length = g.size(ids, 1)

    def product(x: str, name: str) -> str:
        return g.node("Add", held.product(x, f"{name}.weight"), held.whole(f"{name}.bias"))

    def norm(x: str, name: str) -> str:
        return layer_norm(g, x, held.whole(f"{name}.weight"), held.whole(f"{name}.bias"), EPS)

    x = held.rows("embeddings.word_embeddings.weight", ids)
    place = g.slice(held.whole("embeddings.position_embeddings.weight"), 0, 0, length)
    segment = g.slice(held.whole("embeddings.token_type_embeddings.weight"), 0, 0, 1)
    x = norm(g.node("Add", g.node("Add", x, place), segment), "embeddings.LayerNorm")
    width, heads = encoder.dim, encoder.heads
    visible = g.node("Expand", g.const(True, bool), g.node("Concat", g.const([1, 1]), length, length, axis=0))
    for index in range(encoder.layers):
        layer = f"encoder.layer.{index}"
        q, k, v = (
            g.transpose(
                g.reshape(product(x, f"{layer}.attention.self.{part}"), 0, 0, heads, width // heads), 0, 2, 1, 3
            )
            for part in ("query", "key", "value")
        )
        mixed = attention(g, q, k, v, visible, width // heads, FLOAT, target="ort")
        joined = g.reshape(g.transpose(mixed, 0, 2, 1, 3), 0, 0, width)
        out = product(joined, f"{layer}.attention.output.dense")
        x = norm(g.node("Add", x, out), f"{layer}.attention.output.LayerNorm")
        wide = gelu(g, product(x, f"{layer}.intermediate.dense"))
        x = norm(g.node("Add", x, product(wide, f"{layer}.output.dense")), f"{layer}.output.LayerNorm")
    if encoder.pooled_scale:
        mean = g.node("ReduceMean", x, g.const([1]), keepdims=1)
        square = g.node("ReduceSum", g.node("Mul", mean, mean), g.const([2]), keepdims=1)
        root = g.node("Max", g.node("Sqrt", square), g.const(1e-12, np.float32))
        pooled = g.node("Mul", g.node("Div", mean, root), g.const(encoder.pooled_scale, np.float32))
        x = g.node("Concat", pooled, x, axis=1)
    g.output(x, "text_features", np.float32, [1, "features", width])
    return g


def vocabulary(encoder: MiniLM) -> tuple[str, dict[str, Any]]:
    """``vocab.txt`` (a piece a line, its id the line's number from 0) and what else a WordPiece tokenizer has to know."""
    tokenizer = encoder.tokenizer
    ids = tokenizer.get_vocab(with_added_tokens=True)
    pieces = sorted(ids, key=ids.__getitem__)
    special = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    return "".join(f"{piece}\n" for piece in pieces), {
        "vocab": "vocab.txt",
        "lowercase": True,
        "special": special,
        "unknown_id": ids["[UNK]"],
        "start_id": ids["[CLS]"],
        "end_id": ids["[SEP]"],
        "max_word": 100,
        "max_ids": encoder.max_ids,
    }
