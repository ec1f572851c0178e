"""RMSNorm, with and without the residual sum, against float64: definition, operator, Triton kernels."""

import pytest
import torch

from kinetok.errors import UserError
from kinetok.kernels import norm
from kinetok.kernels.ops import DECOMPOSITIONS

EPS = 1e-5
OPS = torch.ops.kinetok


def exact(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return scale.double() * x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()


def rounding(dtype: torch.dtype, roundings: int = 1) -> dict[str, float]:
    """Tolerance for results of a few fp32 operations rounded ``roundings`` times to ``dtype``."""
    return {"rtol": max(roundings * torch.finfo(dtype).eps, 2e-6), "atol": 1e-6}


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: object = "cpu") -> list[torch.Tensor]:
    torch.manual_seed(0)
    x, residual = (torch.randn(shape, device=device).to(dtype) * 3 for _ in range(2))
    return [x, residual, torch.randn(shape[-1], device=device).to(dtype)]


def test_the_definition_against_float64() -> None:
    x, residual, scale = inputs((3, 5, 37))
    torch.testing.assert_close(norm.rms_norm(x, scale).double(), exact(x, scale), **rounding(x.dtype, 4))
    y, total = norm.add_rms_norm(x, residual, scale)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y.double(), exact(total, scale), **rounding(x.dtype, 4))


def test_zeros_stay_zero_and_the_dtype_stays() -> None:
    y = norm.rms_norm(torch.zeros(2, 8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and not y.any()
    assert norm.rms_norm(y, torch.ones(8)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 37), (5, 192), (1, 3200), (0, 8)])
def test_kernels_against_float64(launcher, device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, scale = inputs(shape, dtype, device)
    kernels = launcher("norm")
    y = kernels.rms_norm(x, scale, EPS)
    torch.testing.assert_close(y.double(), exact(x, scale), **rounding(dtype))
    y, total = kernels.add_rms_norm(x, residual, scale, EPS)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y.double(), exact(total, scale), **rounding(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 35])
def test_backward_kernel_against_autograd_in_float64(launcher, device, rows: int, dtype: torch.dtype) -> None:
    x, grad_sum, scale = inputs((rows, 37), dtype, device)
    grad = torch.randn_like(x)
    wide_x, wide_scale = x.double().requires_grad_(), scale.double().requires_grad_()
    y = wide_scale * wide_x * torch.rsqrt(wide_x.square().mean(-1, keepdim=True) + EPS)
    wanted = torch.autograd.grad((y * grad.double()).sum(), (wide_x, wide_scale))
    kernels = launcher("norm")
    for other in (None, grad_sum):
        grad_x, grad_scale = kernels.rms_norm_backward(grad, other, x, scale, EPS)
        total = wanted[0] if other is None else wanted[0] + other.double()
        torch.testing.assert_close(grad_x.double(), total, rtol=torch.finfo(dtype).eps, atol=1e-5)
        torch.testing.assert_close(grad_scale.double(), wanted[1], rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_kernels_read_strided_rows(launcher, device) -> None:
    wide, residual, scale = inputs((4, 6, 40), device=device)
    kernels = launcher("norm")
    for x, other in (
        (wide[:, 2:4, 3:37], residual[:, ::3, :34]),  # rows with gaps
        (wide.transpose(1, 2)[:, :, :4], residual.transpose(1, 2)[:, :, 2:]),  # no two numbers of a row are adjacent
    ):
        gain = scale[: 2 * x.shape[-1] : 2] if x.shape[-1] <= 20 else scale[: x.shape[-1]]
        y, total = kernels.add_rms_norm(x, other, gain, EPS)
        assert torch.equal(total, x + other) and total.is_contiguous()
        torch.testing.assert_close(y.double(), exact(total, gain), **rounding(x.dtype))
        for mine, wanted in zip(
            kernels.rms_norm_backward(x, other, other, gain, EPS),
            kernels.rms_norm_backward(x.clone(), other.clone(), other.clone(), gain.clone(), EPS),
            strict=True,
        ):
            assert torch.equal(mine, wanted)


def test_extreme_values(launcher, device) -> None:
    kernels = launcher("norm")
    for factor in (1e-18, 1e17):
        x, residual, scale = inputs((2, 64), device=device)
        x, residual = x * factor, residual * factor
        torch.testing.assert_close(kernels.rms_norm(x, scale, EPS).double(), exact(x, scale), **rounding(x.dtype))
        y, total = kernels.add_rms_norm(x, residual, scale, EPS)
        torch.testing.assert_close(y.double(), exact(total, scale), **rounding(x.dtype))
        wide, gain = x.double().requires_grad_(), scale.double().requires_grad_()
        pull = torch.autograd.grad((exact(wide, gain) * residual.double()).sum(), (wide, gain))
        for mine, wanted in zip(kernels.rms_norm_backward(residual, None, x, scale, EPS), pull, strict=True):
            torch.testing.assert_close(mine.double(), wanted, rtol=1e-5, atol=float(wanted.abs().max()) * 1e-5)
    residual[1, 3] = torch.nan
    y, total = kernels.add_rms_norm(x, residual, scale, EPS)
    assert y.isnan().any(1).tolist() == [False, True] and y[1].isnan().all() and total.isnan().sum() == 1


@pytest.mark.parametrize("route", ["definition", "kernel"])
def test_a_row_has_the_same_bits_in_a_crowd(launcher, device, route: str) -> None:
    x, residual, scale = inputs((257, 192), device=device)
    family = norm.reference if route == "definition" else launcher("norm")
    crowd, plain = family.add_rms_norm(x, residual, scale, EPS), family.rms_norm(x, scale, EPS)
    for row in (0, 3, 256):
        alone = family.add_rms_norm(x[row : row + 1], residual[row : row + 1], scale, EPS)
        for many, one in zip(crowd, alone, strict=True):
            assert torch.equal(many[row : row + 1], one)
        assert torch.equal(plain[row : row + 1], family.rms_norm(x[row : row + 1], scale, EPS))


@pytest.mark.parametrize("shape", [(2, 3, 5), (0, 5)])
def test_operators_are_sound(shape: tuple[int, ...]) -> None:
    x, residual, scale = (value.requires_grad_() for value in inputs(shape))
    torch.library.opcheck(OPS.rms_norm.default, (x, scale, EPS))
    torch.library.opcheck(OPS.add_rms_norm.default, (x, residual, scale, EPS))
    for other in (None, residual.detach()):
        torch.library.opcheck(OPS.rms_norm_backward.default, (x.detach(), other, x.detach(), scale.detach(), EPS))


def test_gradients_are_those_of_finite_differences() -> None:
    x, residual, scale = (value.double().requires_grad_() for value in inputs((2, 3, 5)))
    assert torch.autograd.gradcheck(OPS.rms_norm, (x, scale, EPS))
    assert torch.autograd.gradcheck(OPS.add_rms_norm, (x, residual, scale, EPS))


def test_compile_and_export_keep_the_operators() -> None:
    class Norms(torch.nn.Module):
        def forward(self, x: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            y, total = norm.add_rms_norm(x, residual, scale)
            return norm.rms_norm(total, scale) + y

    module, args = Norms(), tuple(inputs((3, 6)))
    wanted = module(*args)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(*args), wanted)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(module, args, dynamic_shapes=({0: rows}, {0: rows}, None))
    targets = {node.target for node in program.graph.nodes}
    assert {OPS.rms_norm.default, OPS.add_rms_norm.default} <= targets
    more = tuple(inputs((7, 6)))
    torch.testing.assert_close(program.module()(*more), module(*more))
    lowered = program.run_decompositions(DECOMPOSITIONS)
    assert not any("kinetok" in str(node.target) for node in lowered.graph.nodes)
    torch.testing.assert_close(lowered.module()(*more), module(*more))


def test_wrong_shapes_are_refused() -> None:
    x, residual, scale = inputs((2, 6))
    with pytest.raises(UserError, match=r"scale \[d\]"):
        norm.rms_norm(x, scale[:5])
    with pytest.raises(UserError, match="one shape and dtype"):
        norm.add_rms_norm(x, residual.half(), scale)
