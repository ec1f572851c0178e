"""The released evaluator: the authors' numbers where they are, the file's form and its refusals everywhere."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kinetok.errors import UserError
from kinetok.model.evaluator import DistilBertStates, Evaluator, EvaluatorConfig, load_released_evaluator, sinusoids

SMALL = EvaluatorConfig(latent_dim=16, num_layers=2, num_heads=4, ff_size=24, text_dim=12)


def small(seed: int = 0) -> Evaluator:
    torch.manual_seed(seed)
    return Evaluator(SMALL).eval().requires_grad_(False)


def with_distilbert() -> Evaluator:
    transformers = pytest.importorskip("transformers", reason="the released text branch needs transformers")
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=19, dim=12, max_position_embeddings=64, n_layers=1, n_heads=4, hidden_dim=20
    )
    return Evaluator(SMALL, transformers.DistilBertModel(config)).eval()


def saved(path: Path, evaluator: Evaluator, **changes: Tensor | None) -> Path:
    codes = sinusoids(5000, SMALL.latent_dim)[:, None]
    branches = ("textencoder", "motionencoder")
    state = {**evaluator.state_dict(), **{f"{b}.sequence_pos_encoding.pe": codes for b in branches}}
    state = {**state, "motiondecoder.weight": torch.zeros(3), **changes}
    torch.save({"state_dict": {k: v for k, v in state.items() if v is not None}, "epoch": 3}, path)
    return path


def test_the_authors_numbers(golden) -> None:
    pytest.importorskip("transformers", reason="the released text branch needs transformers")
    evaluator = load_released_evaluator(golden("evaluator_small.pth"), text_heads=4)
    with np.load(golden("evaluator_small.npz")) as z:
        config = json.loads(str(z["config_json"]))
        a = {name: torch.from_numpy(z[name]) for name in z if name != "config_json"}
    assert evaluator.config.num_layers == config["num_layers"] and evaluator.config.ff_size == config["ff_size"]
    mu, logvar = evaluator.motionencoder(a["motion"], a["lengths"])
    torch.testing.assert_close(mu, a["motion_mu"], atol=1e-4, rtol=0)
    torch.testing.assert_close((logvar / 2).exp(), a["motion_std"], atol=1e-3, rtol=0)
    clips = [clip[:length] for clip, length in zip(a["motion"], a["lengths"], strict=True)]
    torch.testing.assert_close(evaluator.embed_motion(clips), a["motion_mu"], atol=1e-4, rtol=0)

    text_model = evaluator.textencoder.text_model
    assert text_model is not None
    masks = a["attention_mask"].bool()
    states = [text_model(input_ids=ids[mask][None])[0][0] for ids, mask in zip(a["input_ids"], masks, strict=True)]
    for got, want, mask in zip(states, a["text_hidden"], a["text_mask"], strict=True):
        torch.testing.assert_close(got, want[mask], atol=1e-4, rtol=0)
    mu, logvar = evaluator.textencoder(a["text_hidden"], a["text_mask"].sum(1))
    torch.testing.assert_close(mu, a["text_mu"], atol=1e-4, rtol=0)
    torch.testing.assert_close((logvar / 2).exp(), a["text_std"], atol=1e-3, rtol=0)
    torch.testing.assert_close(evaluator.embed_text(states), a["text_mu"], atol=1e-4, rtol=0)


def test_a_released_file_comes_back(tmp_path: Path) -> None:
    made = with_distilbert()
    back = load_released_evaluator(saved(tmp_path / "e.pth", made), text_heads=4)
    assert back.config == SMALL
    assert all(torch.equal(back.state_dict()[name], value) for name, value in made.state_dict().items())


def test_words_come_from_the_tokenizer_in_a_folder(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "man", "walks"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text_model = with_distilbert().textencoder.text_model
    assert text_model is not None
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (got,) = DistilBertStates(text_model, tmp_path).encode(["a man walks"])
    torch.testing.assert_close(got, text_model(input_ids=torch.tensor([[5, 6, 7]]))[0][0])
    with pytest.raises(UserError, match="DistilBERT's tokenizer files"):
        DistilBertStates(text_model, tmp_path / "nothing")


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    made = with_distilbert()
    mu, bias = "motionencoder.mu_token", "textencoder.projection.1.bias"
    for changes, words in (
        ({mu: None}, f"missing: {mu}"),
        ({mu: torch.zeros(7)}, f"{mu} .expected .16., got .7."),
        ({"textencoder.extra": torch.zeros(1)}, "unexpected: textencoder.extra"),
        ({bias: torch.zeros(16, dtype=torch.int64)}, "expected floating point"),
        ({"textencoder.projection.1.weight": None}, "textencoder.projection.1.weight"),
        ({"textencoder.text_model.embeddings.word_embeddings.weight": None}, "word_embeddings"),
    ):
        with pytest.raises(UserError, match=words):
            load_released_evaluator(saved(tmp_path / "bad.pth", made, **changes), text_heads=4)
    torch.save({"net": {}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="'state_dict', got net"):
        load_released_evaluator(tmp_path / "other.pth")
    with pytest.raises(UserError, match="give text_heads"):
        load_released_evaluator(saved(tmp_path / "e.pth", made))
    with pytest.raises(UserError, match="a multiple of num_heads 4"):
        EvaluatorConfig(latent_dim=18)


def test_one_layer_against_the_formulas() -> None:
    """A post-norm layer written out in float64: attention, then gelu, a norm after each sum."""
    config = EvaluatorConfig(latent_dim=8, num_layers=1, num_heads=2, ff_size=10, text_dim=4)
    torch.manual_seed(1)
    evaluator = Evaluator(config).eval().double()
    w = {k.removeprefix("motionencoder."): v.detach() for k, v in evaluator.state_dict().items()}
    layer = {
        k.removeprefix("seqTransEncoder.layers.0."): v for k, v in w.items() if "layers.0" in k and "text" not in k
    }
    frames = torch.randn(5, 272, dtype=torch.float64)
    x = torch.cat((w["mu_token"][None], w["logvar_token"][None], frames @ w["skel_embedding.weight"].T))
    x[2:] += w["skel_embedding.bias"]
    for position in range(len(x)):
        for channel in range(8):
            angle = position / 10000 ** ((channel // 2 * 2) / 8)
            # The codes are stored in single precision.
            x[position, channel] += float(np.float32(np.sin(angle) if channel % 2 == 0 else np.cos(angle)))

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * layer[f"{name}.weight"] + layer[f"{name}.bias"]

    q, k, v = (x @ layer["self_attn.in_proj_weight"].T + layer["self_attn.in_proj_bias"]).split(8, dim=-1)
    heads = [
        (q[:, h] @ k[:, h].T / 2).softmax(-1) @ v[:, h]
        for h in (slice(0, 4), slice(4, 8))  # the root of the head width, 4, is 2
    ]
    mixed = torch.cat(heads, -1) @ layer["self_attn.out_proj.weight"].T + layer["self_attn.out_proj.bias"]
    x = norm(x + mixed, "norm1")
    wide = x @ layer["linear1.weight"].T + layer["linear1.bias"]
    wide = wide * 0.5 * (1 + torch.erf(wide / 2**0.5))
    x = norm(x + wide @ layer["linear2.weight"].T + layer["linear2.bias"], "norm2")
    torch.testing.assert_close(evaluator.embed_motion([frames])[0], x[0], atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=15)
@given(lengths=st.lists(st.integers(1, 310), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_neighbours_and_frames_beyond_300_do_not_matter(lengths: list[int], seed: int) -> None:
    evaluator = small(seed)
    clips = [torch.randn(length, 272) for length in lengths]
    together = evaluator.embed_motion(clips)
    for clip, got in zip(clips, together, strict=True):
        torch.testing.assert_close(evaluator.embed_motion([clip[:300]])[0], got, atol=1e-5, rtol=0)


def test_sequences_that_cannot_be_read_are_named() -> None:
    evaluator = small()
    for call, got in (
        (lambda: evaluator.embed_motion([torch.zeros(5, 271)]), "[5, 271]"),
        (lambda: evaluator.embed_motion([torch.zeros(0, 272)]), "[0, 272]"),
        (lambda: evaluator.embed_text([torch.zeros(5, 13)]), "[5, 13]"),
        (lambda: evaluator.embed_text([torch.zeros(4999, 12)]), "at most 4998"),
    ):
        with pytest.raises(UserError, match=re.escape(got)):
            call()
