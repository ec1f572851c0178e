"""The encoder half of a T5 as a graph (``model/text_t5.py``), and its tokenizer as one file."""

import math
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from kinetok.errors import UserError
from kinetok.export.text_weights import FLOAT, TextWeights
from kinetok.model.graphs.builder import Graph
from kinetok.model.graphs.ops import gelu, gelu_tanh, rms_norm, silu
from kinetok.model.text_t5 import MAX_FEATURES, MAX_TOKENS, FlanT5

ACTIVATIONS = {
    "relu": lambda g, x: g.node("Relu", x),
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "silu": silu,
}


def distance_buckets(reach: int, buckets: int, largest: int) -> Tensor:
    """int64 ``[2 reach - 1]``: the bucket of key minus query position, from -(reach - 1) to reach - 1.

    Half of the buckets are for keys behind the query, half for those before it. Of each half, one half holds a distance
    each; the others grow by a constant factor up to ``largest``, from which on the last one holds all.
    """
    away = torch.arange(-(reach - 1), reach)
    half, far = buckets // 2, away.abs()
    exact = half // 2
    # In fp32, in the order of T5's own arithmetic: at a power of the factor the last bit decides the bucket.
    grown = torch.log(far.float().clamp(min=1) / exact) / math.log(largest / exact) * (half - exact)
    rough = (exact + grown.long()).clamp(max=half - 1)
    return torch.where(far < exact, far, rough) + half * (away > 0)


def t5_graph(g: Graph, encoder: FlanT5, precision: str) -> Graph:
    """Ids int64 ``[1, L]``, L <= 512, to features fp32 ``[1, min(L, 150), d]``.

    No scale before the softmax, one table of position biases for all layers, RMS norms. Raises ``UserError`` for an
    activation that the exporter does not know.
    """
    config, state = encoder.model.config, encoder.model.state_dict()
    held = TextWeights(g, state.__getitem__, precision)
    heads, each = config.num_heads, config.d_kv
    if config.dense_act_fn not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"{encoder.name}: the exporter knows the activations {known}, got {config.dense_act_fn!r}")
    activation = ACTIVATIONS[config.dense_act_fn]
    ids = g.input("input_ids", np.int64, [1, "ids"])

    def norm(x: str, name: str) -> str:
        return rms_norm(g, x, held.whole(f"{name}.weight"), FLOAT, config.layer_norm_epsilon)

    x = held.rows("encoder.embed_tokens.weight", ids)
    bias = _position_bias(g, encoder, g.size(ids, 1))
    for index in range(config.num_layers):
        block = f"encoder.block.{index}.layer"
        normed = norm(x, f"{block}.0.layer_norm")
        q, k, v = (
            g.transpose(
                g.reshape(held.product(normed, f"{block}.0.SelfAttention.{part}.weight"), 0, 0, heads, each), 0, 2, 1, 3
            )
            for part in "qkv"
        )
        scores = g.node("Add", g.node("MatMul", q, g.transpose(k, 0, 1, 3, 2)), bias)
        mixed = g.transpose(g.node("MatMul", g.node("Softmax", scores, axis=-1), v), 0, 2, 1, 3)
        joined = g.reshape(mixed, 0, 0, heads * each)
        x = g.node("Add", x, held.product(joined, f"{block}.0.SelfAttention.o.weight"))
        normed, dense = norm(x, f"{block}.1.layer_norm"), f"{block}.1.DenseReluDense"
        if config.is_gated_act:
            gate = activation(g, held.product(normed, f"{dense}.wi_0.weight"))
            hidden = g.node("Mul", gate, held.product(normed, f"{dense}.wi_1.weight"))
        else:
            hidden = activation(g, held.product(normed, f"{dense}.wi.weight"))
        x = g.node("Add", x, held.product(hidden, f"{dense}.wo.weight"))
    kept = g.slice(norm(x, "encoder.final_layer_norm"), 1, 0, MAX_FEATURES)
    g.output(kept, "text_features", np.float32, [1, "features", encoder.dim])
    return g


def _position_bias(g: Graph, encoder: FlanT5, length: str) -> str:
    """fp32 ``[1, H, L, L]``, added to the scores of every layer."""
    config = encoder.model.config
    table = encoder.model.state_dict()["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    buckets = distance_buckets(
        MAX_TOKENS, config.relative_attention_num_buckets, config.relative_attention_max_distance
    )
    by_distance = g.weight("position_bias", lambda: table[buckets].float().T.contiguous().numpy())  # [H, 2 * 512 - 1]
    at = g.range(length)
    away = g.node("Sub", g.node("Unsqueeze", at, g.const([0])), g.node("Unsqueeze", at, g.const([1])))
    rows = g.node("Add", away, g.const(MAX_TOKENS - 1))
    return g.node("Unsqueeze", g.node("Gather", by_distance, rows, axis=1), g.const([0]))


def tokenizer_file(encoder: FlanT5) -> tuple[str, dict[str, Any]]:
    """``tokenizer.json`` in the format of the ``tokenizers`` library, which gives ids with the end token last."""
    backend = Tokenizer.from_str(encoder.tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend.to_str(), {
        "tokenizer": "tokenizer.json",
        "end_id": encoder.tokenizer.eos_token_id,
        "max_ids": MAX_TOKENS,
    }
