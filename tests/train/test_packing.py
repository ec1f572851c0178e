"""Packed sequences give the loss and the gradients of padded ones."""

import pytest
import torch
from torch.nn import functional as F

from kinetok.errors import UserError
from kinetok.model.config import DecoderConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.train.packing import IGNORED, PackedDecoder, pack

CONFIG = DecoderConfig(n_layer=2, n_head=2, n_embd=16, codebook=30, text_dim=6, block_size=40)
SIZES = ((3, 20), (1, 1), (7, 5), (2, 36))  # text and motion; the last fills less than the block


def items(sizes=SIZES, dtype=torch.float64):
    torch.manual_seed(3)
    return [(torch.randn(text, 6, dtype=dtype), torch.randint(30, (motion,))) for text, motion in sizes]


def padded_loss(decoder: MotionDecoder, sequences, positions: int) -> torch.Tensor:
    """The reference's layout: every row padded to ``positions``, logits everywhere."""
    tokens = torch.full((len(sequences), positions), CONFIG.pad_id)
    targets = torch.full_like(tokens, IGNORED)
    features = torch.zeros(len(sequences), max(len(text) for text, _ in sequences), 6, dtype=sequences[0][0].dtype)
    mask = torch.zeros(features.shape[:2])
    for row, (text, motion) in enumerate(sequences):
        n, end = len(text), len(text) + len(motion)
        tokens[row, n:end], tokens[row, end] = motion, CONFIG.end_id
        targets[row, n - 1 : end] = tokens[row, n : end + 1]
        features[row, :n], mask[row, :n] = text, 1
    logits = decoder(tokens, features, mask)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_is_padded(dtype, tolerance, checkpointing) -> None:
    torch.manual_seed(0)
    decoder = MotionDecoder(CONFIG).to(dtype)
    sequences = items(dtype=dtype)
    packed = PackedDecoder(decoder, checkpointing=checkpointing)
    batch = pack(sequences, CONFIG)
    assert len(batch.tokens) == sum(text + motion + 1 for text, motion in SIZES)
    losses = packed(batch), padded_loss(decoder, sequences, CONFIG.block_size)
    torch.testing.assert_close(losses[0].to(dtype), losses[1], rtol=0, atol=tolerance * 10)
    parameters = list(decoder.parameters())
    for one, other in zip(*(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * 10)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_part_of_a_step_on_a_gpu_is_an_operator_of_ours(request, checkpointing: bool) -> None:
    torch.manual_seed(0)
    decoder = MotionDecoder(CONFIG).double()
    packed, batch = PackedDecoder(decoder, checkpointing=checkpointing), pack(items(), CONFIG)
    packed.train()
    plain = packed(batch)
    wanted = torch.autograd.grad(plain, list(decoder.parameters()))
    with request.getfixturevalue("through_operators")() as operators:
        loss = packed(batch)
        gradients = torch.autograd.grad(loss, list(decoder.parameters()))
    torch.testing.assert_close(loss, plain)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    layers, again = CONFIG.n_layer, 1 + checkpointing
    assert operators.calls == {
        "rms_norm": 2 * layers * again + 1,
        "rms_norm_backward": 2 * layers + 1,
        "apply_rotary": 2 * layers * again,
        "apply_rotary_backward": 2 * layers,
        "prefix_attention": layers * again,
        "prefix_attention_backward": layers,
        "swiglu": layers * again,
        "swiglu_backward": layers,
        "linear_cross_entropy_sum": 1,
    }


def test_a_sequence_does_not_see_its_neighbours() -> None:
    torch.manual_seed(0)
    decoder = MotionDecoder(CONFIG).double()
    packed = PackedDecoder(decoder)
    sequences = items()
    with torch.no_grad():
        together = packed.states(pack(sequences, CONFIG)).split([text + motion + 1 for text, motion in SIZES])
        for one, alone in zip(sequences, together, strict=True):
            torch.testing.assert_close(packed.states(pack([one], CONFIG)), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("sizes", "says"), [((), "at least one"), (((3, 37),), "got 3 and 41"), (((0, 3),), "got 0 and")]
)
def test_what_does_not_fit_is_refused(sizes, says) -> None:
    with pytest.raises(UserError, match=says):
        pack(items(sizes), CONFIG)
