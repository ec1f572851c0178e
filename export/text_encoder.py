"""Text encoders as graphs: ids of one sentence to the features that the decoder takes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kinetok.errors import UserError
from kinetok.export.text_minilm import minilm_graph, vocabulary
from kinetok.export.text_t5 import t5_graph, tokenizer_file
from kinetok.model.graphs.builder import Graph, WeightFile
from kinetok.model.text_minilm import MiniLM
from kinetok.model.text_t5 import FlanT5

BANKED = (
    "generate the prompts of its bank (kinetok embed fills one), or hand over features that were computed elsewhere"
)


def text_graph(encoder: MiniLM | FlanT5, weights: WeightFile, precision: str, opset: int) -> Graph:
    """Ids int64 ``[1, ids]`` to features fp32 ``[1, features, dim]``; computes in fp32 whatever the weights' precision."""
    g = Graph("text_encoder", weights, opset)
    if isinstance(encoder, MiniLM):
        return minilm_graph(g, encoder, precision)
    return t5_graph(g, encoder, precision)


def write_tokenizer(encoder: MiniLM | FlanT5, folder: Path) -> dict[str, Any]:
    """Write what turns sentences into ids, and return what the manifest says of it."""
    if isinstance(encoder, MiniLM):
        pieces, about = vocabulary(encoder)
        (folder / about["vocab"]).write_text(pieces, encoding="utf-8", newline="\n")
        return about
    text, about = tokenizer_file(encoder)
    (folder / about["tokenizer"]).write_text(text, encoding="utf-8", newline="\n")
    return about


def find_encoder(spec: Mapping[str, Any]) -> MiniLM | FlanT5 | str:
    """The encoder that a model names, from this machine alone; otherwise a sentence that says why a bundle has none."""
    kind = spec.get("type")
    if kind == "minilm":
        return MiniLM(pooled_scale=float(spec.get("pooled_scale", 10.0)))
    if kind != "flan-t5":
        return f"the model names no text encoder: {BANKED}"
    try:
        return FlanT5(str(spec.get("name")), local=True)
    except UserError as error:
        return f"{error}; without it {BANKED}"
