"""Integers and scales for weights, and what fits into fp16."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.model.graphs.precision import BLOCK, Precision, dequantize, quantize, to_numpy


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1 << 30), st.integers(1, 5), st.integers(1, 100), st.sampled_from([4, 8]), st.sampled_from([32, 64]),
    st.booleans(),
)  # fmt: skip
def test_each_weight_is_within_half_a_step(seed, rows, columns, bits, block, positive) -> None:
    """The largest number of a block is met exactly; beyond the shorter end of the range an error is one step."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    codes, scale = quantize(weight, bits, block, positive=positive)
    blocks = -(-columns // block)
    assert codes.dtype == np.int8 and codes.shape == (rows, blocks, block) and scale.shape == (rows, blocks)
    assert codes.min() >= -(1 << (bits - 1)) and codes.max() < 1 << (bits - 1)
    assert not positive or (scale >= 0).all()
    back = dequantize(codes, scale, columns)
    step = torch.from_numpy(np.abs(scale)).repeat_interleave(block, 1)[:, :columns]
    assert ((back - weight).abs() <= step * (1.0 + 1e-5)).all()
    inside = (weight / step.where(step > 0, 1.0)).abs() < (1 << (bits - 1)) - 1
    assert ((back - weight).abs()[inside] <= step[inside] * (0.5 + 1e-4)).all()
    for row in range(rows):
        for at in range(0, columns, block):
            part = weight[row, at : at + block]
            largest = part.abs().argmax()
            torch.testing.assert_close(back[row, at : at + block][largest], part[largest], rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("positive", [False, True])
def test_quantised_weights_are_within_half_a_step(bits, positive) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(7, 70)
    weight[3, :BLOCK] = 0
    codes, scale = quantize(weight, bits, positive=positive)
    assert codes.shape == (7, 3, BLOCK) and codes.min() >= -(1 << (bits - 1)) and codes.max() < 1 << (bits - 1)
    assert not positive or (scale >= 0).all()
    error = (dequantize(codes, scale, 70) - weight).abs().numpy()
    # With one step fewer above than below, a number next to the largest of the other sign may be cut by one step.
    steps = np.repeat(np.abs(scale), BLOCK, axis=1)[:, :70]
    assert (error <= (0.5 if positive else 1.0) * steps + 1e-6).all()
    assert not error[3, :BLOCK].any()


def test_blocks_of_the_targets() -> None:
    assert Precision(name="int8").block(8) == 64 and Precision(name="int4").block(4) == 32
    assert Precision(name="int8", target="tensorrt").block(8) == 32


@pytest.mark.parametrize("value", [1e5, float("nan"), -float("inf")])
def test_what_does_not_fit_is_named(value) -> None:
    weight = torch.ones(2, 3)
    weight[1, 2] = value
    with pytest.raises(UserError, match=r"blocks\.0\.down\.weight: the model's weights do not fit into float16"):
        to_numpy(weight, np.dtype(np.float16), "blocks.0.down.weight")


def test_names_of_precisions() -> None:
    with pytest.raises(UserError, match="expected one of fp32, fp16, int8, int4, got 'bf16'"):
        Precision(name="bf16")
    assert Precision(name="bf16", target="tensorrt").activations.itemsize == 2
