"""SwiGLU against float64: definition, operator, Triton kernels."""

import pytest
import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels import gating
from kinetok.kernels.ops import DECOMPOSITIONS

OPS = torch.ops.kinetok


def exact(x: Tensor) -> Tensor:
    gate, up = x.double().chunk(2, -1)
    return gate / (1 + (-gate).exp()) * up


def exact_gradient(grad: Tensor, x: Tensor) -> Tensor:
    wide = x.double().requires_grad_()
    return torch.autograd.grad(exact(wide), wide, grad.double())[0]


def rounding(dtype: torch.dtype, roundings: int = 1) -> dict[str, float]:
    """Tolerance for results of a few fp32 operations rounded ``roundings`` times to ``dtype``."""
    return {"rtol": max(roundings * torch.finfo(dtype).eps, 2e-6), "atol": 1e-6}


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: object = "cpu") -> tuple[Tensor, Tensor]:
    """x ``[..., 2 F]`` and a gradient ``[..., F]``."""
    torch.manual_seed(0)
    x = (torch.randn(shape, device=device) * 3).to(dtype)
    return x, torch.randn((*shape[:-1], shape[-1] // 2), device=device).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_definition_against_float64(dtype: torch.dtype) -> None:
    x, grad = inputs((3, 5, 38), dtype)
    torch.testing.assert_close(gating.swiglu(x).double(), exact(x), **rounding(dtype, 3))
    back = gating.reference.swiglu_backward(grad, x)
    torch.testing.assert_close(back.double(), exact_gradient(grad, x), **rounding(dtype))
    assert back.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 2), (2, 3, 74), (3, 384), (1, 2050), (0, 8), (2, 0)])
def test_kernels_against_float64(launcher, device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad = inputs(shape, dtype, device)
    kernels = launcher("gating")
    torch.testing.assert_close(kernels.swiglu(x).double(), exact(x), **rounding(dtype))
    torch.testing.assert_close(kernels.swiglu_backward(grad, x).double(), exact_gradient(grad, x), **rounding(dtype, 2))


def test_kernels_read_strided_rows(launcher, device) -> None:
    wide, grads = inputs((4, 6, 40), device=device)
    kernels = launcher("gating")
    for x, grad in (
        (wide[:, 2:4, 3:37], grads[:, ::3, :17]),  # rows with gaps
        (wide.transpose(1, 2)[:, :, :4], wide.transpose(1, 2)[:, :, 4:]),  # no two numbers of a row are adjacent
        (wide[:, :2], grads[:1, :1, :1].expand(4, 2, 20)),  # one number for all, as a sum's gradient is
    ):
        y, back = kernels.swiglu(x), kernels.swiglu_backward(grad, x)
        assert y.is_contiguous() and back.is_contiguous()
        assert torch.equal(y, kernels.swiglu(x.clone()))
        assert torch.equal(back, kernels.swiglu_backward(grad.clone(), x.clone()))
        torch.testing.assert_close(y.double(), exact(x), **rounding(x.dtype))


def test_extreme_values(launcher, device) -> None:
    kernels = launcher("gating")
    gate = torch.tensor([-1e30, -200.0, -90.0, -0.0, 90.0, 200.0, 1e30], device=device)
    x = torch.cat((gate, torch.ones_like(gate)))[None]
    grad = torch.ones(1, 7, device=device)
    wanted = torch.tensor([0.0, 0.0, 0.0, 0.0, 90.0, 200.0, 1e30], device=device)
    slope = torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0], device=device)
    torch.testing.assert_close(kernels.swiglu(x)[0], wanted, rtol=1e-6, atol=1e-30)
    back = kernels.swiglu_backward(grad, x)[0]
    torch.testing.assert_close(back, torch.cat((slope, wanted)), rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(back, gating.reference.swiglu_backward(grad, x)[0], rtol=1e-6, atol=1e-30)
    x[0, 3] = torch.nan
    assert kernels.swiglu(x)[0].isnan().nonzero().tolist() == [[3]]
    assert kernels.swiglu_backward(grad, x)[0].isnan().nonzero().tolist() == [[3], [10]]


@pytest.mark.parametrize("route", ["definition", "kernel"])
def test_a_row_has_the_same_bits_in_a_crowd(launcher, device, route: str) -> None:
    x, grad = inputs((129, 192), device=device)
    family = gating.reference if route == "definition" else launcher("gating")
    crowd, back = family.swiglu(x), family.swiglu_backward(grad, x)
    for row in (0, 3, 128):
        assert torch.equal(crowd[row : row + 1], family.swiglu(x[row : row + 1]))
        assert torch.equal(back[row : row + 1], family.swiglu_backward(grad[row : row + 1], x[row : row + 1]))


@pytest.mark.parametrize("shape", [(2, 3, 6), (0, 6)])
def test_operators_are_sound(shape: tuple[int, ...]) -> None:
    x, grad = inputs(shape)
    torch.library.opcheck(OPS.swiglu.default, (x.requires_grad_(),))
    torch.library.opcheck(OPS.swiglu_backward.default, (grad, x.detach()))


def test_gradients_are_those_of_finite_differences() -> None:
    x, _ = inputs((2, 3, 6))
    assert torch.autograd.gradcheck(OPS.swiglu, (x.double().requires_grad_(),))


def test_only_the_input_is_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []
    x = inputs((4, 6))[0].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        OPS.swiglu(x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


def test_compile_and_export_keep_the_operator() -> None:
    class Gate(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return gating.swiglu(x) + 1

    module, x = Gate(), inputs((3, 6))[0]
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    assert OPS.swiglu.default in {node.target for node in program.graph.nodes}
    more = inputs((7, 6))[0]
    lowered = program.run_decompositions(DECOMPOSITIONS)
    assert not any("kinetok" in str(node.target) for node in lowered.graph.nodes)
    torch.testing.assert_close(lowered.module()(more), module(more))


def test_what_does_not_fit_is_refused() -> None:
    for shape in ((2, 5), ()):
        with pytest.raises(UserError, match=r"x \[\.\.\., 2 F\]"):
            gating.swiglu(torch.zeros(shape))
    with pytest.raises(UserError, match="fp16, bf16"):
        gating.swiglu(torch.zeros(2, 4, dtype=torch.int64))
