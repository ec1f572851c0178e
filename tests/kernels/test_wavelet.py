"""Haar transforms against the golden files, PyWavelets and themselves."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.kernels import dwt, idwt


def test_golden(golden) -> None:
    with np.load(golden("haar.npz")) as z:
        names = [name[:-2] for name in z if name.startswith("p") and name.endswith("_x")]
        for name in names:
            levels = int(name[1 : name.index("_")]).bit_length() - 1
            y = dwt(torch.from_numpy(z[f"{name}_x"]), levels)
            np.testing.assert_allclose(y, z[f"{name}_y"], atol=1e-5, rtol=0)
            np.testing.assert_allclose(idwt(y, levels), z[f"{name}_back"], atol=1e-5, rtol=0)
        for levels, p in enumerate((1, 2, 4, 8)):
            coefficients = torch.from_numpy(z[f"p{p}_randcoef_z"])
            np.testing.assert_allclose(idwt(coefficients, levels), z[f"p{p}_randcoef_back"], atol=1e-5, rtol=0)
    assert len(names) == 28


def test_orthonormal_scale_is_that_of_pywavelets() -> None:
    pywt = pytest.importorskip("pywt", reason="PyWavelets is the oracle")
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    low, high = pywt.dwt(x.numpy(), "haar", axis=-1)
    y = dwt(x, 1, scale="orthonormal")
    np.testing.assert_allclose(y, np.concatenate((low, high), axis=1), atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 33), st.integers(0, 4), st.booleans())
def test_perfect_reconstruction(batch: int, channels: int, time: int, levels: int, last: bool) -> None:
    x = torch.randn(batch, time, channels, dtype=torch.float64) if last else torch.randn(batch, channels, time).double()
    y = dwt(x, levels, channels_last=last)
    back = idwt(y, levels, channels_last=last)
    kept = back[:, :time] if last else back[..., :time]
    torch.testing.assert_close(kept, x, atol=1e-12, rtol=0)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(UserError, match="multiple of 4"):
        idwt(torch.zeros(1, 6, 3), 2)
    with pytest.raises(UserError, match="scale"):
        dwt(torch.zeros(1, 6, 4), 1, scale="other")  # type: ignore[arg-type]
