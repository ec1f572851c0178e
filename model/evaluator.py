"""The evaluator: sentences and motions as points of one space, whose distances are the measures of section 7.

Two transformers of one shape, one over word states and one over frames. Each reads a learned mu and a logvar token in
front of its sequence; the output at the mu token is the embedding. Names of the parameters are the released ones.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kinetok.errors import UserError, missing_package
from kinetok.model.config import _Config, _positive
from kinetok.model.released import check_keys
from kinetok.model.restricted import read_tensors
from kinetok.motion.features import FEATURES

MAX_FRAMES = 300
POSITIONS = 5000
TEXT_MODEL = "text_model."
_LAYER = re.compile(r"motionencoder\.seqTransEncoder\.layers\.(\d+)\.norm1\.weight")
_BRANCHES = ("textencoder.", "motionencoder.")
DISTILBERT_HEADS = {768: 12}
LIMIT = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatorConfig(_Config):
    """Sizes of both branches; the defaults are the released ones on DistilBERT states."""

    latent_dim: int = 512
    num_layers: int = 4
    num_heads: int = 4
    ff_size: int = 1024
    text_dim: int = 768

    def __post_init__(self) -> None:
        _positive(self, "latent_dim", "num_layers", "num_heads", "ff_size", "text_dim")
        if self.latent_dim % self.num_heads or self.latent_dim % 2:
            raise UserError(
                f"EvaluatorConfig: expected latent_dim to be even and a multiple of num_heads {self.num_heads}, "
                f"got {self.latent_dim}"
            )


def sinusoids(count: int, dim: int) -> Tensor:
    """Position codes fp32 ``[count, dim]``: sines on even channels, cosines on odd ones, base 10000."""
    rates = torch.exp(torch.arange(0, dim, 2, dtype=torch.float64) * (-math.log(10000.0) / dim))
    angles = torch.arange(count, dtype=torch.float64)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).float()


class _Positions(nn.Module):
    pe: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("pe", sinusoids(POSITIONS, dim), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pe[: x.shape[1]]


class _Branch(nn.Module):
    def __init__(self, config: EvaluatorConfig) -> None:
        super().__init__()
        d = config.latent_dim
        self.mu_token = nn.Parameter(torch.randn(d))
        self.logvar_token = nn.Parameter(torch.randn(d))
        self.sequence_pos_encoding = _Positions(d)
        layer = nn.TransformerEncoderLayer(d, config.num_heads, config.ff_size, 0.0, "gelu", batch_first=True)
        self.seqTransEncoder = nn.TransformerEncoder(layer, config.num_layers, enable_nested_tensor=False)

    def _encode(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded sequences ``[B, L, d]`` to the outputs at the two tokens, mu and logvar, both ``[B, d]``."""
        tokens = torch.stack((self.mu_token, self.logvar_token)).expand(len(x), 2, -1)
        x = self.sequence_pos_encoding(torch.cat((tokens, x), dim=1))
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None] + 2
        x = self.seqTransEncoder(x, src_key_padding_mask=padding)
        return x[:, 0], x[:, 1]


class TextBranch(_Branch):
    """Word states ``[B, L, text_dim]`` to mu and logvar. ``text_model``, where there is one, is the frozen word encoder."""

    def __init__(self, config: EvaluatorConfig, text_model: nn.Module | None = None) -> None:
        super().__init__(config)
        self.text_model = text_model
        self.projection = nn.Sequential(nn.ReLU(), nn.Linear(config.text_dim, config.latent_dim))

    def forward(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self._encode(self.projection(states), lengths)


class MotionBranch(_Branch):
    """Normalised frames ``[B, T, 272]`` to mu and logvar."""

    def __init__(self, config: EvaluatorConfig) -> None:
        super().__init__(config)
        self.skel_embedding = nn.Linear(FEATURES, config.latent_dim)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self._encode(self.skel_embedding(frames), lengths)


class Evaluator(nn.Module):
    """Both branches. What lies behind a sequence's length never matters; standard deviations are exp(logvar / 2)."""

    def __init__(self, config: EvaluatorConfig, text_model: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.textencoder = TextBranch(config, text_model)
        self.motionencoder = MotionBranch(config)

    def embed_motion(self, frames: Sequence[Tensor]) -> Tensor:
        """Embeddings ``[N, d]`` of clips of normalised frames ``[T_i, 272]``, of which the first 300 frames are read."""
        clips = [clip[:MAX_FRAMES] for clip in frames]
        return self.motionencoder(*_padded(clips, FEATURES, "frames"))[0]

    def embed_text(self, states: Sequence[Tensor]) -> Tensor:
        """Embeddings ``[N, d]`` of sentences, each given as its words' states ``[L_i, text_dim]``."""
        return self.textencoder(*_padded(states, self.config.text_dim, "word states"))[0]


def _padded(sequences: Sequence[Tensor], width: int, name: str) -> tuple[Tensor, Tensor]:
    for sequence in sequences:
        if sequence.ndim != 2 or not len(sequence) or sequence.shape[1] != width:
            raise UserError(f"{name}: expected the shape [L, {width}], L > 0, got {list(sequence.shape)}")
        if len(sequence) > POSITIONS - 2:
            raise UserError(f"{name}: expected at most {POSITIONS - 2} positions, got {len(sequence)}")
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return nn.utils.rnn.pad_sequence(list(sequences), batch_first=True), lengths


class DistilBertStates:
    """Word states of the DistilBERT inside a released evaluator; its tokenizer comes from a folder with its files."""

    name = "distilbert"

    def __init__(self, model: nn.Module, tokenizer: str | Path) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
        except (OSError, ValueError) as error:
            detail = " ".join(str(error).split())[:200]
            raise UserError(
                f"{tokenizer}: expected a folder with DistilBERT's tokenizer files, but {detail}"
            ) from error
        self.model = model

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Last hidden states fp32 ``[L_i, dim]`` of each text on its own."""
        rows = (self.tokenizer(text, truncation=True, return_tensors="pt") for text in texts)
        return [self.model(input_ids=row.input_ids).last_hidden_state[0].float() for row in rows]


def load_released_evaluator(path: str | Path, *, text_heads: int | None = None, num_heads: int = 4) -> Evaluator:
    """The evaluator of a released file (``state_dict`` with ``textencoder.*`` and ``motionencoder.*``), ready to use.

    The numbers of heads leave no trace in a file: 4 in the branches as released, 12 in a DistilBERT of width 768; for
    other sizes give them. Needs transformers. Raises ``UserError`` naming what is missing, unexpected or mis-shaped.
    """
    content = read_tensors(path)
    state = content.get("state_dict")
    if not isinstance(state, dict):
        raise UserError(f"{path}: expected the evaluator's weights under 'state_dict', got {_keys(content)}")
    state = {str(name): value for name, value in state.items() if str(name).startswith(_BRANCHES)}
    sizes = _sizes(state, path)
    config = EvaluatorConfig(num_heads=num_heads, **sizes)
    text_prefix = _BRANCHES[0] + TEXT_MODEL
    bert = {name.removeprefix(text_prefix): v for name, v in state.items() if name.startswith(text_prefix)}
    make = _distilbert(bert, text_heads, path)
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in Evaluator(config, make()).state_dict().items()}
    # The position codes are in the file but follow from a formula.
    computed = frozenset(f"{branch}sequence_pos_encoding.pe" for branch in _BRANCHES)
    check_keys(state, wanted, computed, str(path))
    evaluator = Evaluator(config, make())
    evaluator.load_state_dict({name: state[name] for name in wanted})
    return evaluator.eval().requires_grad_(False)


def _keys(content: Mapping[str, Any]) -> str:
    return ", ".join(str(key)[:40] for key in list(content)[:8]) or "nothing"


def _sizes(state: Mapping[str, Any], path: str | Path) -> dict[str, int]:
    def shape(name: str) -> tuple[int, ...]:
        value = state.get(name)
        if not isinstance(value, Tensor) or value.ndim != 2 or not value.numel() or max(value.shape) > LIMIT:
            raise UserError(f"{path}: expected a matrix {name} of usual size, which tells a size of the evaluator")
        return tuple(value.shape)

    layers = {int(match[1]) for match in map(_LAYER.fullmatch, state) if match}
    latent, text = shape("textencoder.projection.1.weight")
    return {
        "latent_dim": latent,
        "text_dim": text,
        "num_layers": max(1, len(layers)),
        "ff_size": shape("motionencoder.seqTransEncoder.layers.0.linear1.weight")[0],
    }


def _distilbert(state: Mapping[str, Any], heads: int | None, path: str | Path) -> Any:
    """A maker of the DistilBERT with the sizes that its tensors show."""
    try:
        from transformers import DistilBertConfig, DistilBertModel
    except ImportError as error:
        raise missing_package("transformers", "text", "the released evaluator") from error
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)

    def shape(name: str) -> tuple[int, ...]:
        value = state.get(name)
        if not isinstance(value, Tensor) or value.ndim != 2 or not value.numel() or max(value.shape) > LIMIT:
            raise UserError(f"{path}: expected a matrix textencoder.{TEXT_MODEL}{name[:60]} of usual size")
        return tuple(value.shape)

    words, dim = shape("embeddings.word_embeddings.weight")
    heads = heads or DISTILBERT_HEADS.get(dim)
    if heads is None or dim % heads:
        raise UserError(f"{path}: the heads of a DistilBERT of width {dim} are not known: give text_heads, a divisor")
    config = DistilBertConfig(
        vocab_size=words,
        dim=dim,
        max_position_embeddings=shape("embeddings.position_embeddings.weight")[0],
        n_layers=len({name.split(".")[2] for name in state if name.startswith("transformer.layer.")}),
        n_heads=heads,
        hidden_dim=shape("transformer.layer.0.ffn.lin1.weight")[0],
    )
    return lambda: DistilBertModel(config)
