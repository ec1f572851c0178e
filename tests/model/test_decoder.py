"""The decoder's two layouts against each other; the golden numbers are in test_checkpoint_golden.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.model.config import DecoderConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.presets import DECODERS, decoder_preset

PARAMETERS = {
    "44M": 93_858_304,
    "111M": 184_833_792,
    "343M": 441_504_768,
    "775M": 897_941_760,
    "1B": 1_558_863_360,
    "3B": 3_404_764_800,
    "5B": 5_389_897_728,
    "6B": 6_199_431_168,
    "7B": 7_818_498_048,
    "13B": 13_354_050_560,
    "30B": 32_968_585_728,
    "65B": 65_826_758_656,
}


def small(**changes) -> MotionDecoder:
    torch.manual_seed(0)
    values = {"n_layer": 2, "n_head": 2, "n_embd": 20, "codebook": 30, "text_dim": 6, "block_size": 24, **changes}
    return MotionDecoder(DecoderConfig(**values)).eval()


@pytest.mark.parametrize("name", DECODERS)
def test_parameter_counts_of_the_size_table(name: str) -> None:
    with torch.device("meta"):
        decoder = MotionDecoder(decoder_preset(name))
    assert sum(p.numel() for p in decoder.parameters()) == PARAMETERS[name]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(1, 9), st.booleans())
def test_cached_steps_equal_the_training_layout(lengths: list[int], steps: int, tied: bool) -> None:
    decoder = small(tie_weights=tied)
    features = [torch.randn(length, 6) for length in lengths]
    motion = torch.randint(30, (len(lengths), steps))
    with torch.inference_mode():
        cache = decoder.new_cache(len(lengths), max(lengths) + steps)
        logits = [decoder.prefill(features, cache)]
        logits += [decoder.decode_step(motion[:, t], cache) for t in range(steps)]
        for row, length in enumerate(lengths):
            tokens = torch.cat((torch.full((length,), decoder.config.pad_id), motion[row]))[None]
            whole = decoder(tokens, features[row][None], torch.ones(1, length))
            mine = torch.stack([step[row] for step in logits])
            torch.testing.assert_close(mine, whole[0, length - 1 :], atol=2e-5, rtol=0)


def test_padding_of_the_text_does_not_matter() -> None:
    decoder = small()
    features, tokens = torch.randn(1, 3, 6), torch.randint(30, (1, 10))
    mask = torch.ones(1, 3)
    padded = torch.cat((features, torch.full((1, 4, 6), 1e3)), 1)
    wide = torch.cat((mask, torch.zeros(1, 4)), 1)
    with torch.inference_mode():
        torch.testing.assert_close(decoder(tokens, padded, wide), decoder(tokens, features, mask))


@pytest.mark.parametrize("tied", [False, True])
def test_the_layout_for_single_rows_changes_no_value(tied: bool) -> None:
    decoder = small(tie_weights=tied)
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    tokens, features, mask = torch.randint(30, (1, 10)), torch.randn(1, 3, 6), torch.ones(1, 3)
    wanted = decoder(tokens, features, mask)
    decoder.lay_out_for_single_rows()
    decoder.lay_out_for_single_rows()
    assert decoder.blocks[0].qkv.weight.stride() == (1, 60) and decoder.blocks[0].down.weight.stride() == (256, 1)
    assert (decoder.head.weight is decoder.embed.weight) is tied
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
    torch.testing.assert_close(decoder(tokens, features, mask), wanted)


def test_too_many_positions_are_refused() -> None:
    decoder = small()
    with pytest.raises(UserError, match="at most 24"):
        decoder(torch.zeros(1, 25, dtype=torch.int64), torch.zeros(1, 2, 6), torch.ones(1, 2))
    with pytest.raises(UserError, match="25 positions"):
        decoder.new_cache(1, 25)
    cache = decoder.new_cache(1, 2)
    decoder.prefill([torch.zeros(2, 6)], cache)
    with pytest.raises(UserError, match="full"):
        decoder.decode_step(torch.zeros(1, dtype=torch.int64), cache)
    with pytest.raises(UserError, match="unknown decoder size"):
        decoder_preset("2B")
