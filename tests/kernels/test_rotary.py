"""Rotary tables and rotation against the golden rows."""

import numpy as np
import pytest
import torch

from kinetok.kernels.rotary import apply_rotary, rotary_table


@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize(("kind", "name"), [("fp32", "f32"), ("bf16", "bf16")])
def test_golden_tables(golden, head_dim: int, kind, name: str) -> None:
    with np.load(golden("transformer_small.npz")) as z:
        rows = rotary_table(301, head_dim, kind)[z["rope_positions"]]
        np.testing.assert_allclose(rows, z[f"rope_{name}_hd{head_dim}"], atol=1e-6)


def test_golden_rotation(golden) -> None:
    with np.load(golden("transformer_small.npz")) as z:
        x = torch.from_numpy(z["rope_in"]).transpose(1, 2)
        rotated = apply_rotary(x, rotary_table(9, 16)[None]).transpose(1, 2)
        np.testing.assert_allclose(rotated, z["rope_out"], atol=1e-6)


def test_rotation_keeps_lengths_and_sees_only_distances() -> None:
    q, k = torch.randn(2, 1, 1, 1, 100).double().unbind(0)
    table = rotary_table(200, 100)
    scores = [
        (apply_rotary(q.float(), table[None, p : p + 1]) * apply_rotary(k.float(), table[None, p + 7 : p + 8])).sum()
        for p in (0, 50, 150)
    ]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(scores[0], scores[2], atol=1e-4, rtol=0)
    torch.testing.assert_close(apply_rotary(q.float(), table[None, 99:100]).norm(), q.float().norm())
