"""The prefix mask and attention against loops in float64: definition, operators, Triton kernels."""

import pytest
import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels.attention import attention, prefix_attention, prefix_mask, reference


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


def by_loops(q: Tensor, k: Tensor, v: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
    """[B, T, H, hd] one row after the other, in float64; zero from a row's length on."""
    result = torch.zeros_like(q, dtype=torch.float64)
    for row, (most, count) in enumerate(zip(text.tolist(), lengths.tolist(), strict=True)):
        x = [z[row, :count].double().transpose(0, 1) for z in (q, k, v)]
        seen = prefix_mask(torch.tensor([min(most, count)]), count)[0]
        scores = (x[0] @ x[1].transpose(1, 2) / q.shape[3] ** 0.5).masked_fill(~seen, -torch.inf)
        result[row, :count] = (scores.softmax(-1) @ x[2]).transpose(0, 1)
    return result


def ragged(head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    text, lengths = (
        torch.tensor([5, 0, 21, 1]),
        torch.tensor([37, 1, 21, 20]),
    )  # motion, one position, text alone, short
    return [torch.randn(4, 37, 2, head_dim).to(dtype) for _ in range(3)], text, lengths


@pytest.mark.parametrize("head_dim", [16, 32, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_prefix_kernel_against_float64(launcher, device, head_dim: int, dtype: torch.dtype) -> None:
    (q, k, v), text, lengths = ragged(head_dim, dtype)
    mixed, _ = launcher("attention").prefix_attention(*(x.to(device) for x in (q, k, v, text, lengths)))
    wanted = by_loops(q, k, v, text, lengths)
    torch.testing.assert_close(mixed.cpu().double(), wanted, atol=2e-5 if dtype == torch.float32 else 3e-3, rtol=0)


def test_padding_does_not_count(launcher, device) -> None:
    (q, k, v), text, lengths = ragged(16)
    for x in (q, k, v):
        x[1, 1:] = torch.nan
    for route in (launcher("attention").prefix_attention, reference.prefix_attention):
        mixed, _ = route(*(x.to(device) for x in (q, k, v, text, lengths)))
        torch.testing.assert_close(mixed[1, 0].cpu(), v[1, 0], atol=1e-6, rtol=0)
        assert not mixed[1, 1:].any()


def test_backward_kernel_against_autograd_in_float64(launcher, device) -> None:
    x, text, lengths = ragged(16)
    grad = torch.randn_like(x[0])
    wide = [z.double().requires_grad_() for z in x]
    mixed, _ = reference.prefix_attention(*wide, text, lengths)
    wanted = torch.autograd.grad((mixed * grad).sum(), wide)
    kernels = launcher("attention")
    on = [z.to(device) for z in (*x, text, lengths)]
    o, lse = kernels.prefix_attention(*on)
    got = kernels.prefix_attention_backward(grad.to(device), *on, o, lse)
    for mine, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.cpu().double(), exact, atol=5e-5, rtol=0)


def test_gradients_of_the_definition() -> None:
    torch.manual_seed(0)
    x = [torch.randn(2, 5, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    text, lengths = torch.tensor([2, 0]), torch.tensor([5, 3])
    op = torch.ops.kinetok.prefix_attention.default
    assert torch.autograd.gradcheck(lambda *z: op(*z, text, lengths)[0], x)


@pytest.mark.parametrize("head_dim", [16, 100])
def test_decode_kernel_against_float64_and_alone(launcher, device, head_dim: int) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([1, 70, 130, 0, 64])
    q = torch.randn(5, 2, head_dim)
    k, v = torch.randn(2, 5, 2, 130, head_dim).unbind(0)
    wanted = reference.decode_attention(q.double(), k.double(), v.double(), lengths)
    for row, count in enumerate(lengths.tolist()):
        k[row, :, count:] = v[row, :, count:] = torch.nan  # a slab's rest may be anything
    decode = launcher("attention").decode_attention
    on = [x.to(device) for x in (q, k, v, lengths)]
    mixed = decode(*on, None)
    torch.testing.assert_close(mixed.cpu().double(), wanted, atol=1e-5, rtol=0)
    for row in range(5):  # the same bits without the others
        assert torch.equal(decode(*(x[row : row + 1].contiguous() for x in on), None), mixed[row : row + 1])


def test_operators_are_sound() -> None:
    (q, k, v), text, lengths = ragged(8)
    inputs = (*(x.requires_grad_() for x in (q, k, v)), text, lengths)
    torch.library.opcheck(torch.ops.kinetok.prefix_attention.default, inputs)
    q, slab, lengths = torch.randn(2, 1, 8), torch.randn(2, 1, 6, 8), torch.tensor([6, 2])
    torch.library.opcheck(torch.ops.kinetok.decode_attention.default, (q, slab, slab.clone(), lengths, None))


def test_backends_agree_or_say_why_not() -> None:
    (q, k, v), text, lengths = ragged(16)
    wanted = by_loops(q, k, v, text, lengths).float()
    for backend in ("reference", "sdpa", None):
        mixed = prefix_attention(q, k, v, text, lengths, backend=backend)
        torch.testing.assert_close(mixed, wanted, atol=1e-5, rtol=0)
    with pytest.raises(UserError):
        prefix_attention(q, k, v, text, lengths, backend="flash-9")
    with pytest.raises(UserError, match="lengths"):
        prefix_attention(q, k, v, text[:2], lengths)
