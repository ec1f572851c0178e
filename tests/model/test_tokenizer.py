"""The tokenizer's shapes, batching and causality; the golden numbers are in test_checkpoint_golden.py."""

import pytest
import torch

from kinetok.errors import UserError
from kinetok.kernels.fsq import fsq_dequantize
from kinetok.model.config import FSQ_LEVELS, TokenizerConfig
from kinetok.model.tokenizer import MotionTokenizer


def small(**changes) -> MotionTokenizer:
    torch.manual_seed(0)
    values = {"nb_code": 256, "code_dim": 16, "width": 32, "depth": 2, "input_dim": 12, **changes}
    return MotionTokenizer(TokenizerConfig(**values)).eval()


@pytest.mark.parametrize("patcher", ["haar", "db2", "db4", "rearrange"])
@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("down_t", [0, 1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(patcher: str, patch_size: int, down_t: int, causal: bool) -> None:
    model = small(patcher=patcher, patch_size=patch_size, down_t=down_t, causal=causal)
    unit = model.config.frames_per_token
    tokens = model.encode(torch.randn(2, 3 * unit, 12))
    assert tokens.shape == (2, 3) and tokens.dtype == torch.int32
    assert model.decode(tokens).shape == (2, 3 * unit, 12)


def test_a_stage_without_a_stride_leaves_shortening_to_the_wavelet() -> None:
    model = small(patcher="haar", patch_size=2, stride_t=1, causal=True)
    assert model.config.frames_per_token == 2
    assert model.decode(model.encode(torch.randn(1, 6, 12))).shape == (1, 6, 12)
    with pytest.raises(UserError, match="causal"):
        small(stride_t=1)


@pytest.mark.parametrize("norm", ["LN", "GN", "BN", "none"])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_a_batch_decodes_as_a_batch(norm: str, activation: str) -> None:
    model = small(norm=norm, activation=activation)
    tokens = torch.randint(240, (3, 5))
    rows = torch.cat([model.decode(row[None]) for row in tokens])
    torch.testing.assert_close(model.decode(tokens), rows, atol=1e-5, rtol=0)


def test_a_causal_decoder_does_not_look_ahead() -> None:
    model = small(causal=True, patcher="none")
    tokens = torch.randint(240, (1, 8))
    later = tokens.clone()
    later[0, 5:] = (later[0, 5:] + 1) % 240
    before = 5 * model.config.frames_per_token
    assert torch.equal(model.decode(tokens)[:, :before], model.decode(later)[:, :before])


@pytest.mark.parametrize("patcher", ["none", "haar", "db2", "db3", "db4", "rearrange"])
def test_patches_come_back_and_carry_gradients(patcher: str) -> None:
    model = small(patcher=patcher, patch_size=1 if patcher == "none" else 2, down_t=0)
    frames = torch.randn(2, 10, 12, requires_grad=True)
    patches = model.patch(frames)
    torch.testing.assert_close(model.unpatch(patches), frames, atol=1e-6, rtol=0)
    model.frames(model.project_out(model.project_in(model.latents(frames)))).square().sum().backward()
    assert frames.grad.abs().sum(dim=(0, 2)).min() > 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("patcher", ["none", "haar", "db2", "rearrange"])
def test_decode_is_its_stages_times_scale_plus_shift(patcher: str, causal: bool) -> None:
    for changes in ({"kernel_size": 5}, {"kernel_size": 1}, {"code_dim": 3}):
        model = small(patcher=patcher, patch_size=1 if patcher == "none" else 4, causal=causal, **changes)
        tokens, (scale, shift) = torch.randint(240, (2, 5)), torch.randn(2, 12)
        frames = model.frames(model.project_out(fsq_dequantize(tokens, model.config.levels)))
        torch.testing.assert_close(model.decode(tokens), frames, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.decode(tokens, scale, shift), frames * scale + shift, atol=1e-5, rtol=0)


@pytest.mark.parametrize("nb_code", FSQ_LEVELS)
def test_every_codebook(nb_code: int) -> None:
    model = small(nb_code=nb_code)
    tokens = torch.tensor([[0, model.config.codebook - 1]])
    assert model.decode(tokens).isfinite().all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m.encode(torch.zeros(1, 1, 12)), "at least 2 frames"),
        (lambda m: m.encode(torch.zeros(1, 4, 11)), "B, T, 12"),
        (lambda m: m.decode(torch.tensor([[240]])), "0 to 239"),
        (lambda m: m.decode(torch.tensor([[-1]])), "0 to 239"),
        (lambda m: m.decode(torch.zeros(1, 0, dtype=torch.int64)), "n > 0"),
        (lambda m: m.decode(torch.zeros(1, 2)), "integer"),
    ],
)
def test_bad_input(call, says: str) -> None:
    with pytest.raises(UserError, match=says):
        call(small())


@pytest.mark.parametrize(
    "change",
    [
        {"nb_code": 1000},
        {"width": 0},
        {"patch_size": 3},
        {"kernel_size": 2},
        {"stride_t": 3},
        {"patcher": "none", "patch_size": 2},
        {"patcher": "db9"},
        {"norm": "XX"},
    ],
)
def test_bad_configurations(change: dict) -> None:
    with pytest.raises(UserError):
        TokenizerConfig(**change)
    with pytest.raises(UserError, match="unknown keys"):
        TokenizerConfig.from_dict({"widht": 3})
