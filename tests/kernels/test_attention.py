"""The prefix mask and attention against loops."""

import torch

from kinetok.kernels.attention import attention, prefix_mask


def test_text_sees_text_and_motion_sees_what_came_before() -> None:
    visible = prefix_mask(torch.tensor([3, 0]), 6)
    for row, text in enumerate((3, 0)):
        for i in range(6):
            for j in range(6):
                assert visible[row, 0, i, j] == (j <= i or (i < text and j < text))


def test_against_float64() -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 20).unbind(0)
    visible = prefix_mask(torch.tensor([2, 4]), 5)
    scores = (q.double() @ k.double().transpose(-1, -2)) / 20**0.5
    exact = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v.double()
    torch.testing.assert_close(attention(q, k, v, visible).double(), exact, atol=1e-5, rtol=0)
