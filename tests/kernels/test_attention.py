"""The prefix mask and attention against loops in float64: definition, operators, Triton kernels."""

import pytest
import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels.attention import (
    attention,
    backends,
    decode_attention,
    prefix_attention,
    prefix_mask,
    reference,
)
from kinetok.kernels.ops import DECOMPOSITIONS

OPS = torch.ops.kinetok
FLOAT8 = torch.float8_e4m3fn


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
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 2e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_prefix_kernel_against_float64(launcher, device, head_dim: int, dtype: torch.dtype, near: float) -> None:
    (q, k, v), text, lengths = ragged(head_dim, dtype)
    mixed, _ = launcher("attention").prefix_attention(*(x.to(device) for x in (q, k, v, text, lengths)))
    torch.testing.assert_close(mixed.cpu().double(), by_loops(q, k, v, text, lengths), atol=near, rtol=0)


def test_prefix_kernels_take_strides_and_nothing_and_rows_alone(launcher, device) -> None:
    kernels = launcher("attention")
    x, text, lengths = ragged(16)
    packed = torch.stack((*x, torch.randn_like(x[0])), dim=2).to(
        device
    )  # [B, T, 4, H, hd], as a projection writes them
    text, lengths = text.to(device), lengths.to(device)
    apart = [z.contiguous() for z in packed.unbind(2)]
    loose = [z.transpose(1, 2).contiguous().transpose(1, 2) for z in packed.unbind(2)]  # heads are not adjacent

    def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, rows: slice) -> list[Tensor]:
        given = [z[rows] for z in (q, k, v, text, lengths)]
        o, lse = kernels.prefix_attention(*given)
        return [o, lse, *kernels.prefix_attention_backward(grad[rows], *given, o, lse)]

    wanted = run(*apart, slice(None))
    for views in (packed.unbind(2), loose):
        for mine, same in zip(run(*views, slice(None)), wanted, strict=True):
            assert torch.equal(mine, same)
    for row in range(4):
        for alone, crowd in zip(run(*apart, slice(row, row + 1)), wanted, strict=True):
            assert torch.equal(alone, crowd[row : row + 1])
    assert [len(z) for z in run(*apart, slice(0, 0))] == [0] * 5
    assert all(z.numel() == 0 for z in run(*(z[:, :0] for z in apart), slice(None)))


def test_prefix_kernel_on_extreme_values(launcher, device) -> None:
    (q, k, v), text, lengths = ragged(16)
    q, k, v = q * 1e3, k * 1e3, v * 1e30
    wanted = by_loops(q, k, v, text, lengths)
    q[0, 30, 1] = torch.nan
    mixed, _ = launcher("attention").prefix_attention(*(x.to(device) for x in (q, k, v, text, lengths)))
    mixed = mixed.cpu()
    assert mixed[0, 30, 1].isnan().all()
    mixed[0, 30, 1] = wanted[0, 30, 1].float()  # neither hidden nor spread
    torch.testing.assert_close(mixed.double(), wanted, rtol=1e-4, atol=0)


def test_padding_does_not_count(launcher, device) -> None:
    (q, k, v), text, lengths = ragged(16)
    for x in (q, k, v):
        x[1, 1:] = torch.nan
    for route in (launcher("attention").prefix_attention, reference.prefix_attention):
        mixed, _ = route(*(x.to(device) for x in (q, k, v, text, lengths)))
        torch.testing.assert_close(mixed[1, 0].cpu(), v[1, 0], atol=1e-6, rtol=0)
        assert not mixed[1, 1:].any()


@pytest.mark.parametrize(("steep", "far", "near"), [(1.0, 1.0, 5e-5), (30.0, 1e20, 1e-3)])  # then: one takes nearly all
def test_backward_kernel_against_autograd_in_float64(launcher, device, steep: float, far: float, near: float) -> None:
    x, text, lengths = ragged(16)
    x = [x[0] * steep, x[1] * steep, x[2] * far]
    grad = torch.randn_like(x[0])
    wide = [z.double().requires_grad_() for z in x]
    mixed = by_loops(*wide, text, lengths)
    wanted = torch.autograd.grad((mixed * grad).sum(), wide)
    kernels = launcher("attention")
    on = [z.to(device) for z in (*x, text, lengths)]
    o, lse = kernels.prefix_attention(*on)
    got = kernels.prefix_attention_backward(grad.to(device), *on, o, lse)
    size = steep * far  # of the terms whose difference the gradients of q and k are
    for mine, exact, terms in zip(got, wanted, (size, size, 1), strict=True):
        torch.testing.assert_close(mine.cpu().double() / terms, exact / terms, atol=near, rtol=0)


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


@pytest.mark.parametrize("route", ["definition", "sdpa", "kernel"])
@pytest.mark.parametrize("kind", [torch.float32, FLOAT8])
def test_the_first_positions_of_a_slab_give_the_bits_of_all(launcher, device, route: str, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    routes = {"definition": reference.decode_attention, "sdpa": backends.sdpa_decode}
    decode = launcher("attention").decode_attention if route == "kernel" else routes[route]
    lengths = torch.tensor([5, 64, 1]).to(device)
    q = torch.randn(3, 2, 16).to(device)
    k, v = (torch.randn(3, 2, 150, 16).to(kind).to(device) for _ in range(2))
    kv_scale = (torch.rand(2, 3, 2) + 0.5).to(device) if kind == FLOAT8 else None
    whole = decode(q, k, v, lengths, kv_scale)
    for reach in (64, 100):
        assert torch.equal(decode(q, k[:, :, :reach], v[:, :, :reach], lengths, kv_scale), whole)
    small = [x[:, :, :64].contiguous() for x in (k, v)]
    assert torch.equal(decode(q, *small, lengths, kv_scale), whole)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, FLOAT8])
def test_decode_kernel_on_small_types_and_strides(launcher, device, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([70, 3])
    dtype = torch.bfloat16 if kind == FLOAT8 else kind
    q = torch.randn(2, 3, 3, 100).to(dtype)[:, 1]  # of q, k and v side by side
    k, v = (torch.randn(2, 3, 75, 100).to(kind) for _ in range(2))
    kv_scale = torch.rand(2, 2, 3) + 0.5 if kind == FLOAT8 else None
    wanted = reference.decode_attention(q.double(), k.double(), v.double(), lengths, kv_scale)
    decode = launcher("attention").decode_attention
    on = [x.to(device) for x in (k, v, lengths)], None if kv_scale is None else kv_scale.to(device)
    mixed = decode(q.to(device), *on[0], on[1])
    torch.testing.assert_close(mixed.cpu().double(), wanted, atol=1e-5, rtol=torch.finfo(dtype).eps)
    loose = q.transpose(1, 2).contiguous().transpose(1, 2).to(device)  # no two numbers of a head are adjacent
    assert torch.equal(decode(loose, *on[0], on[1]), mixed)


def test_decode_kernel_on_nothing_and_extreme_values(launcher, device) -> None:
    torch.manual_seed(0)
    decode = launcher("attention").decode_attention
    q, k, v = torch.randn(3, 2, 16) * 1e3, torch.randn(3, 2, 70, 16) * 1e3, torch.randn(3, 2, 70, 16) * 1e30
    lengths = torch.tensor([70, 65, 1])
    wanted = reference.decode_attention(q.double(), k.double(), v.double(), lengths)
    q[1, 1] = torch.nan
    q, k, v, lengths = (x.to(device) for x in (q, k, v, lengths))
    mixed = decode(q, k, v, lengths, None).cpu()
    assert mixed[1, 1].isnan().all()
    mixed[1, 1] = wanted[1, 1].float()
    torch.testing.assert_close(mixed.double(), wanted, rtol=1e-4, atol=0)
    assert decode(q[:0], k[:0], v[:0], lengths[:0], None).shape == (0, 2, 16)
    for route in (decode, reference.decode_attention):
        assert not route(q.nan_to_num(), k[:, :, :0], v[:, :, :0], lengths * 0, None).any()


@pytest.mark.parametrize("route", ["definition", "kernel"])
def test_a_row_decodes_to_the_same_bits_among_256(launcher, device, route: str) -> None:
    torch.manual_seed(0)
    decode = reference.decode_attention if route == "definition" else launcher("attention").decode_attention
    lengths = torch.randint(1, 71, (257,))
    on = [x.to(device) for x in (torch.randn(257, 1, 16), *torch.randn(2, 257, 1, 70, 16), lengths)]
    crowd = decode(*on, None)
    for row in (0, 100, 256):
        assert torch.equal(decode(*(x[row : row + 1] for x in on), None), crowd[row : row + 1])


def test_operators_are_sound() -> None:
    (q, k, v), text, lengths = ragged(8)
    inputs = (*(x.requires_grad_() for x in (q, k, v)), text, lengths)
    torch.library.opcheck(OPS.prefix_attention.default, inputs)
    plain = [x.detach() for x in inputs]
    o, lse = OPS.prefix_attention(*plain)
    torch.library.opcheck(OPS.prefix_attention_backward.default, (torch.ones_like(o), *plain, o, lse))
    q, slab, lengths = torch.randn(2, 1, 8), torch.randn(2, 1, 6, 8), torch.tensor([6, 2])
    torch.library.opcheck(OPS.decode_attention.default, (q, slab, slab.clone(), lengths, None))
    eight = slab.to(FLOAT8), slab.to(FLOAT8)
    checks = "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"  # torch compares no float8
    torch.library.opcheck(OPS.decode_attention.default, (q, *eight, lengths, torch.ones(2, 2, 1)), test_utils=checks)


def test_compile_and_export_keep_the_operators() -> None:
    class Step(torch.nn.Module):
        def forward(self, x: Tensor, text: Tensor, slab: Tensor, lengths: Tensor) -> Tensor:
            mixed = prefix_attention(*x.unbind(0), text)
            return mixed.sum((1, 2))[:, None] + decode_attention(x[0, :, 0, :1], slab, slab, lengths)

    def args(rows: int) -> tuple[Tensor, ...]:
        torch.manual_seed(rows)
        text = torch.arange(rows) % 4
        return torch.randn(3, rows, 5, 2, 8), text, torch.randn(rows, 1, 6, 8), text + 1

    module = Step()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(*args(3)), module(*args(3)))
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(module, args(3), dynamic_shapes=({1: rows}, {0: rows}, {0: rows}, {0: rows}))
    assert {OPS.prefix_attention.default, OPS.decode_attention.default} <= {n.target for n in program.graph.nodes}
    torch.testing.assert_close(program.module()(*args(7)), module(*args(7)))
    lowered = program.run_decompositions(DECOMPOSITIONS)
    assert not any("kinetok" in str(node.target) for node in lowered.graph.nodes)
    torch.testing.assert_close(lowered.module()(*args(7)), module(*args(7)))


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


def test_slabs_that_a_kernel_would_read_wrongly_are_refused() -> None:
    q, slab, lengths = torch.randn(2, 2, 8), torch.randn(2, 2, 12, 8), torch.tensor([3, 6])
    decode_attention(q, slab[:, :, :6], slab[:, :, :6], lengths)
    for k, v in (
        (slab[:, :, 6:], slab[:, :, :4]),  # of two sizes
        (slab[:, :, ::2], slab[:, :, ::2]),
        (slab[:, :, :6], slab[:, :, :6].contiguous()),  # of two slabs
        (slab.transpose(1, 2).contiguous().transpose(1, 2), slab),
        (slab[:, :, :6].half(), slab[:, :, :6]),
    ):
        with pytest.raises(UserError, match="contiguous caches"):
            decode_attention(q, k, v, lengths)
