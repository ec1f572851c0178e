"""Released files through ``load_released_*`` against the numbers of the authors' code, at the published tolerances."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kinetok.kernels.fsq import fsq_quantize
from kinetok.model.checkpoint import load_released_decoder, load_released_tokenizer, open_decoder, open_tokenizer
from kinetok.model.pretrained import own_tensors
from kinetok.model.released import to_ours, to_released
from kinetok.model.restricted import read_tensors

TOKENIZERS = ["p1", "p1_down2", "p2", "p4", "causal_p1", "causal_p2", "nopatcher_alt"]


def arrays(path):
    content = dict(np.load(path))
    config = json.loads(str(content.pop("config_json")))
    return config, {
        name: torch.from_numpy(np.asarray(value)) for name, value in content.items() if value.dtype.kind != "U"
    }


def close(got, wanted, tolerance: float) -> None:
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= tolerance


def stripped(path, top: str):
    return {k.replace("module.", "").removeprefix("vqvae."): v for k, v in read_tensors(path)[top].items()}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer(golden, name: str) -> None:
    config, z = arrays(golden(f"tokenizer_{name}.npz"))
    model = load_released_tokenizer(golden(f"tokenizer_{name}.pth"), **config)
    with torch.inference_mode():
        for length in config["lengths"]:
            at = f"T{length}_"
            latents = model.latents(z[at + "input"])
            close(latents.transpose(1, 2), z[at + "encoder_out"], 5e-5)
            projected = model.project_in(latents)
            close(projected, z[at + "project_in"], 5e-5)
            codes, indices = fsq_quantize(projected, model.config.levels)
            close(codes, z[at + "codes"], 1e-5)
            assert indices.dtype == torch.int32 and torch.equal(indices, z[at + "indices"])
            assert torch.equal(model.encode(z[at + "input"]), indices)
            decoded = model.decode(indices)
            close(decoded, z[at + "decoded"], 1e-4)
            if at + "forward_decoder_row0" in z:
                close(model.decode(indices[:1]), z[at + "forward_decoder_row0"], 1e-4)
            if at + "forward_decoder_flattened" in z:
                close(model.decode(indices.reshape(1, -1)), z[at + "forward_decoder_flattened"], 1e-4)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_sizes_are_told_from_shapes(golden, name: str) -> None:
    path = golden(f"tokenizer_{name}.pth")
    config, _ = arrays(golden(f"tokenizer_{name}.npz"))
    # Shapes show neither the activation nor the growth of the dilation, and codebooks only by the decoder's vocabulary.
    hidden = {key: config[key] for key in ("vq_act", "dilation_growth_rate")}
    codebook = int(np.prod(config["levels"]))
    assert open_tokenizer(path, hidden, codebook).config == open_tokenizer(path, config).config


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_table_is_exact_both_ways(golden, name: str) -> None:
    config, _ = arrays(golden(f"tokenizer_{name}.npz"))
    path = golden(f"tokenizer_{name}.pth")
    model = load_released_tokenizer(path, **config)
    found = open_tokenizer(path, config)
    back = to_released(found.rows, own_tensors(model))
    wanted = {k: v for k, v in stripped(path, "net").items() if not k.endswith(("wavelets", "_arange"))}
    assert back.keys() == wanted.keys() and all(torch.equal(back[key], wanted[key]) for key in wanted)
    ours = {piece.name: piece for piece in to_ours(found.rows, back)}
    assert ours.keys() == own_tensors(model).keys()


@pytest.fixture(scope="module")
def small(golden):
    config, z = arrays(golden("transformer_small.npz"))
    return load_released_decoder(golden("transformer_small.pth"), **config), config, z


def real_text(z, row: int):
    return z["prompt_features"][row][z["prompt_mask"][row].bool()]


def run(model, features, ids):
    """Logits of one unpadded prompt followed by ids, ``[n + len(ids), rows]``."""
    tokens = torch.cat([torch.full((len(features),), model.config.pad_id), ids.long()])
    mask = torch.ones(1, len(features), dtype=torch.int64)
    with torch.inference_mode():
        return model(tokens[None], features[None], mask)[0]


def test_decoder_greedy_tokens(small) -> None:
    model, config, z = small
    for row in range(8):
        text, ids = real_text(z, row), z["greedy_tokens"][row]
        ids = ids[: int(z["greedy_len"][row])]
        logits = run(model, text, ids)[len(text) - 1 :]
        close(logits[0], z["greedy_first_logits"][row], 2e-4)
        chosen = logits.argmax(-1)
        if z["greedy_ended_at_step0"][row]:
            assert ids.tolist() == [1] and chosen[0] == config["end_token"]
            continue
        assert torch.equal(chosen[:-1], ids.long())
        assert len(ids) == 50 or chosen[-1] == config["end_token"]


def test_decoder_prefixes(small) -> None:
    model, _, z = small
    row = int(z["prefix_prompt_row"])
    text, ids = real_text(z, row), z["greedy_tokens"][row]
    for t in range(13):
        close(run(model, text, ids[:t])[-1], z["prefix_last_logits"][t], 2e-4)
    close(run(model, text, ids[:12]), z["prefix_full_logits_t12"], 2e-4)


def test_decoder_batch(small) -> None:
    model, config, z = small
    rows, mask = z["batch2_rows"].long(), z["batch2_mask"]
    n = int(mask[0].sum())
    pad = torch.full((2, n), config["pad_token"])
    tokens = torch.cat([pad, z["greedy_tokens"][rows, :9].long()], dim=1)
    features = z["prompt_features"][rows]
    with torch.inference_mode():
        close(model(tokens, features[:, :n], mask[:, :n]), z["batch2_logits"], 2e-4)
        close(model(tokens, features, mask), z["batch2_logits"], 2e-4)


def test_decoder_training_layout_loss_and_gradients(small, golden) -> None:
    model, config, z = small
    tokens = z["train_tokens"].long()
    model.zero_grad()
    logits = model(tokens, z["train_features"], z["train_mask"])
    close(logits.detach(), z["train_logits"], 2e-4)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=config["pad_token"])
    assert abs(float(loss.detach()) - float(z["train_loss"])) <= 1e-4
    loss.backward()
    found = open_decoder(golden("transformer_small.pth"), config)
    gradients = to_released(found.rows, {name: value.grad for name, value in own_tensors(model).items()})
    names = np.load(golden("transformer_small.npz"))["train_grad_names"]
    assert len(names) == len(gradients)
    for name, norm in zip(names, z["train_grad_norms"], strict=True):
        got = float(gradients[str(name).replace("module.", "")].norm())
        assert abs(got - float(norm)) <= 1e-3 * float(norm)
    for key, name in (("llama_proj_bias", "llama_proj.bias"), ("h0_c_attn", "transformer.h.0.attn.c_attn.weight")):
        wanted = z["train_grad_" + key]
        assert float((gradients[name] - wanted).abs().max()) <= 1e-3 * float(wanted.abs().max())
    model.zero_grad()


def test_decoder_full_block(small) -> None:
    model, _, z = small
    features = z["full301_features"]
    with torch.inference_mode():
        logits = model(z["full301_tokens"].long(), features, torch.ones(features.shape[:2], dtype=torch.int64))[0]
    close(logits[z["full301_positions"].long()], z["full301_logits"], 3e-4)


def test_decoder_with_tied_head(golden) -> None:
    config, z = arrays(golden("transformer_tied.npz"))
    model = load_released_decoder(golden("transformer_tied.pth"), **config)
    with torch.inference_mode():
        close(model(z["tokens"].long(), z["features"], z["mask"]), z["logits"], 1e-4)


@pytest.mark.parametrize("name", ["transformer_small", "transformer_tied"])
def test_decoder_table_is_exact_both_ways(golden, name: str) -> None:
    config, _ = arrays(golden(f"{name}.npz"))
    path = golden(f"{name}.pth")
    model = load_released_decoder(path, **config)
    found = open_decoder(path, {"n_head": config["n_head"]})
    assert found.config == model.config
    back, wanted = to_released(found.rows, own_tensors(model)), stripped(path, "trans")
    assert all(torch.equal(back[key], wanted[key]) for key in back)
    assert wanted.keys() - back.keys() <= {"lm_head.weight", "transformer.wte.weight"}
