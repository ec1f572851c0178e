"""FSQ against the golden files and its own definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.kernels import fsq_dequantize, fsq_quantize
from kinetok.kernels.fsq import codes_to_indices, fsq_bound, fsq_perplexity
from kinetok.model.config import FSQ_LEVELS

GOLDEN_LEVELS = ["8_8_8_5_5_5", "7_5_5_5_5", "8_6_5", "8_8_8"]


@pytest.mark.parametrize("name", GOLDEN_LEVELS)
def test_golden(golden, name: str) -> None:
    z = {
        key[len(name) + 2 :]: torch.from_numpy(np.asarray(v))
        for key, v in np.load(golden("fsq.npz")).items()
        if key.startswith(f"L{name}_")
    }
    levels = z["levels"].tolist()
    x = z["z"].clone().requires_grad_()
    codes, indices = fsq_quantize(x, levels)
    assert torch.equal(indices, z["indices"]) and indices.dtype == torch.int32
    torch.testing.assert_close(codes, z["codes"], atol=1e-5, rtol=0)
    torch.testing.assert_close(fsq_bound(z["z"], levels), z["bounded"], atol=1e-5, rtol=0)
    (codes * z["grad_weight"]).sum().backward()
    torch.testing.assert_close(x.grad, z["grad_z"], atol=1e-5, rtol=0)
    torch.testing.assert_close(fsq_dequantize(z["some_indices"], levels), z["some_codes"], atol=1e-6, rtol=0)
    perplexity, used = fsq_perplexity(indices, int(np.prod(levels)))
    torch.testing.assert_close(perplexity, z["perplexity"].to(perplexity), atol=1e-3, rtol=0)
    torch.testing.assert_close(used, z["activate"].to(used), atol=1e-6, rtol=0)


@pytest.mark.parametrize("nb_code", FSQ_LEVELS)
def test_every_index_comes_back(nb_code: int) -> None:
    levels = FSQ_LEVELS[nb_code]
    indices = torch.arange(int(np.prod(levels)), dtype=torch.int32)
    codes = fsq_dequantize(indices, levels)
    assert codes.abs().max() <= 1
    assert torch.equal(codes_to_indices(codes, levels), indices)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(FSQ_LEVELS)), st.integers(0, 2**31 - 1), st.floats(1e-3, 1e6))
def test_indices_stay_in_the_codebook(nb_code: int, seed: int, scale: float) -> None:
    levels = FSQ_LEVELS[nb_code]
    z = torch.randn(3, 5, len(levels), generator=torch.Generator().manual_seed(seed)) * scale
    codes, indices = fsq_quantize(z, levels)
    assert int(indices.min()) >= 0 and int(indices.max()) < np.prod(levels)
    torch.testing.assert_close(fsq_dequantize(indices, levels), codes)


def test_empty_input() -> None:
    codes, indices = fsq_quantize(torch.empty(0, 3), (8, 6, 5))
    assert codes.shape == (0, 3) and indices.shape == (0,)
