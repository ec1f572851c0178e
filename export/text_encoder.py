"""MiniLM as a graph: ids of one sentence to the features that the decoder takes (``model/text_minilm.py``)."""

from typing import Any

import numpy as np
from torch import Tensor

from kinetok.export.graph import Graph, WeightFile
from kinetok.export.ops import attention, gelu, layer_norm
from kinetok.export.precision import Precision, linear, to_numpy
from kinetok.model.text_minilm import EPS, MAX_FEATURES, MiniLM

FLOAT = np.dtype(np.float32)


def text_graph(encoder: MiniLM, weights: WeightFile, precision: str, opset: int) -> Graph:
    """Ids int64 ``[1, L]`` to features fp32 ``[1, L + 1, 384]`` (L without the sentence's own vector).

    Computes in fp32. fp16 halves the stored weights; int8 and int4 store the embedding in fp16 and products in 8 bits.
    """
    half = precision != "fp32"
    bits = 8 if precision in ("int8", "int4") else 0
    # Products take fp32 activations whatever the storage.
    products = Precision(name="int8" if bits else "fp32")
    g = Graph("text_encoder", weights, opset)
    ids = g.input("input_ids", np.int64, [1, "ids"])
    length = g.size(ids, 1)

    def tensors(name: str) -> Tensor:
        return encoder.weights[name]

    def stored(name: str) -> str:
        value = tensors(name)
        kind = np.dtype(np.float16) if half and value.ndim == 2 else FLOAT
        held = g.weight(name, lambda: to_numpy(value, kind, name))
        return g.cast(held, np.float32) if kind != FLOAT else held

    def product(x: str, name: str) -> str:
        rows, columns = tensors(f"{name}.weight").shape
        if bits or not half:
            y = linear(g, x, f"{name}.weight", tensors, products, (rows, columns), bits)
        else:
            half_type = np.dtype(np.float16)
            held = g.weight(f"{name}.weight", lambda: to_numpy(tensors(f"{name}.weight").T, half_type, name))
            y = g.node("MatMul", x, g.cast(held, np.float32))
        return g.node("Add", y, stored(f"{name}.bias"))

    def norm(x: str, name: str) -> str:
        return layer_norm(g, x, stored(f"{name}.weight"), stored(f"{name}.bias"), EPS)

    words = "embeddings.word_embeddings.weight"
    kind = np.dtype(np.float16) if half else FLOAT
    x = g.node("Gather", g.weight(words, lambda: to_numpy(tensors(words), kind, words)), ids)
    x = g.cast(x, np.float32) if half else x
    place = g.slice(stored("embeddings.position_embeddings.weight"), 0, 0, length)
    segment = g.slice(stored("embeddings.token_type_embeddings.weight"), 0, 0, 1)
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
        "max_ids": MAX_FEATURES - bool(encoder.pooled_scale),
    }


def find_minilm(spec: dict[str, Any]) -> MiniLM | str:
    """The encoder that a model names where it can be exported, otherwise why it cannot."""
    kind = spec.get("type")
    if kind == "minilm":
        return MiniLM(pooled_scale=float(spec.get("pooled_scale", 10.0)))
    if kind == "flan-t5":
        return "Flan-T5 is not exported: bank the prompts with kinetok embed, or send features from a service"
    return "the model names no text encoder: only prompts of its bank can be generated"
