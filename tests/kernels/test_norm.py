"""RMSNorm against float64."""

import torch

from kinetok.kernels.norm import rms_norm


def test_against_float64() -> None:
    x, scale = torch.randn(3, 5, 37) * 10, torch.randn(37)
    exact = scale.double() * x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(rms_norm(x, scale).double(), exact, atol=1e-5, rtol=1e-5)


def test_zeros_stay_zero_and_the_dtype_stays() -> None:
    y = rms_norm(torch.zeros(2, 8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and not y.any()
