"""FSQ against the golden files, its own definition and float64; the kernels against the definition."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.kernels.fsq import (
    codes_to_indices,
    fsq_bound,
    fsq_decode,
    fsq_dequantize,
    fsq_encode,
    fsq_perplexity,
    fsq_quantize,
    reference,
)
from kinetok.kernels.ops import DECOMPOSITIONS
from kinetok.model.config import FSQ_LEVELS

OPS = torch.ops.kinetok
LEVELS = (8, 6, 5)
Launcher = Callable[[str], ModuleType]
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


def problem(rows: int, channels: int, levels: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x, weight, bias of which no row comes within 8e-4 of a rounding boundary, where two tanh could part."""
    draw = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(s, generator=draw) for s in ((2 * rows, channels), (len(levels), channels), len(levels))
    )
    weight /= channels**0.5
    bound = fsq_bound(torch.nn.functional.linear(x.double(), weight.double(), bias.double()), levels)
    safe = ((bound - bound.floor() - 0.5).abs() > 8e-4).all(-1)
    assert int(safe.sum()) >= rows
    return x[safe][:rows], weight, bias


@pytest.mark.parametrize("levels", [(8, 8, 8, 5, 5, 5), (7, 5, 5, 5, 5), (8, 6, 5), (3, 2)], ids=str)
def test_kernels_quantise_as_the_definition(launcher: Launcher, device: torch.device, levels: tuple[int, ...]) -> None:
    kernels = launcher("fsq")
    z = problem(300, len(levels), levels)[0]
    z[:6] = torch.tensor([0.0, 8.0, -8.0, 1e30, float("inf"), -float("inf")])[:, None]
    bound = fsq_bound(z, levels)
    z = z[((bound - bound.floor() - 0.5).abs() > 8e-4).all(-1)].to(device)
    codes, indices = kernels.fsq_quantize(z, levels)
    expected_codes, expected = reference.fsq_quantize(z, levels)
    assert torch.equal(indices, expected) and torch.equal(codes, expected_codes)
    assert torch.equal(kernels.fsq_dequantize(indices, levels), codes)
    assert torch.equal(kernels.fsq_encode(z, None, None, levels), indices)
    grad = torch.randn(z.shape).to(device)
    slope = reference.fsq_quantize_backward(grad.double(), z.double(), levels)
    torch.testing.assert_close(kernels.fsq_quantize_backward(grad, z, levels).double(), slope, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 30, 512, 700])
def test_kernels_encode_and_decode(launcher: Launcher, device: torch.device, channels: int, dtype: torch.dtype) -> None:
    kernels = launcher("fsq")
    x, weight, bias = (t.to(device, dtype) for t in problem(35, channels, LEVELS))
    if dtype != torch.float32:  # rounding to 16 bits may have moved a row to a boundary
        bound = fsq_bound(torch.nn.functional.linear(x.double(), weight.double(), bias.double()), LEVELS)
        x = x[((bound - bound.floor() - 0.5).abs() > 8e-4).all(-1)]
    indices = kernels.fsq_encode(x, weight, bias, LEVELS)
    assert torch.equal(indices, reference.fsq_encode(x.double(), weight.double(), bias.double(), LEVELS))
    out_weight, out_bias = torch.randn(channels, 3).to(device, dtype), torch.randn(channels).to(device, dtype)
    out = kernels.fsq_decode(indices.long(), out_weight, out_bias, LEVELS)
    exact = reference.fsq_decode(indices, out_weight.double(), out_bias.double(), LEVELS)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, atol=torch.finfo(dtype).eps * 4, rtol=torch.finfo(dtype).eps)


def test_a_rows_bits_do_not_depend_on_the_others(launcher: Launcher, device: torch.device) -> None:
    kernels = launcher("fsq")
    x, weight, bias = (t.to(device) for t in problem(257, 64, LEVELS))
    project, shift = torch.randn(40, 3, device=device), torch.randn(40, device=device)
    for family in (kernels, reference):
        indices = family.fsq_encode(x, weight, bias, LEVELS)
        frames = family.fsq_decode(indices, project, shift, LEVELS)
        for row in (0, 100, 256):
            assert torch.equal(family.fsq_encode(x[row : row + 1], weight, bias, LEVELS), indices[row : row + 1])
            assert torch.equal(family.fsq_decode(indices[row], project, shift, LEVELS), frames[row])


def test_kernels_take_strides_and_nothing(launcher: Launcher, device: torch.device) -> None:
    kernels = launcher("fsq")
    x, weight, bias = (t.to(device) for t in problem(24, 20, LEVELS))
    frames = x.view(2, 12, 20).transpose(0, 1)
    indices = kernels.fsq_encode(frames, weight.T.contiguous().T, bias, LEVELS)
    assert torch.equal(indices, reference.fsq_encode(frames, weight, bias, LEVELS))
    out = kernels.fsq_decode(indices.T, weight.T, torch.zeros(20, device=device), LEVELS)
    torch.testing.assert_close(out, reference.fsq_decode(indices.T, weight.T, torch.zeros(20, device=device), LEVELS))
    assert kernels.fsq_encode(frames[:0], weight, bias, LEVELS).shape == (0, 2)
    assert kernels.fsq_decode(indices[:0], weight.T, torch.zeros(20, device=device), LEVELS).shape == (0, 2, 20)
    codes, none = kernels.fsq_quantize(x[:0, :3], LEVELS)
    assert codes.shape == (0, 3) and none.shape == (0,)
    assert (
        kernels.fsq_dequantize(none, LEVELS).shape
        == kernels.fsq_quantize_backward(codes, codes, LEVELS).shape
        == (0, 3)
    )


def test_kernels_without_projection_take_strides(launcher: Launcher, device: torch.device) -> None:
    kernels = launcher("fsq")
    z = problem(24, 3, LEVELS)[0].to(device).view(2, 12, 3)
    for apart in (z.transpose(0, 1), z[:, ::3], z.transpose(1, 2).contiguous().transpose(1, 2)):
        (codes, indices), (plain, same) = kernels.fsq_quantize(apart, LEVELS), reference.fsq_quantize(apart, LEVELS)
        assert torch.equal(indices, same) and torch.equal(codes, plain)
        assert torch.equal(kernels.fsq_dequantize(indices.T, LEVELS), reference.fsq_dequantize(indices.T, LEVELS))
        pull = codes.transpose(0, 1).contiguous().transpose(0, 1)
        slope = kernels.fsq_quantize_backward(pull, apart, LEVELS)
        torch.testing.assert_close(slope, reference.fsq_quantize_backward(pull, apart, LEVELS), atol=1e-6, rtol=1e-5)


def test_projections_at_extreme_values(launcher: Launcher, device: torch.device) -> None:
    """Latents beyond every level end at the first or last one; large weights come out as large as they are."""
    kernels = launcher("fsq")
    weight, bias = torch.eye(3, 5, device=device), torch.zeros(3, device=device)
    x = torch.tensor([[1e30, -1e30, 0, 1, 1], [-1e38, 1e38, 1e38, 0, 0], [1e-40, 0.0, 0, 0, 0]], device=device)
    indices = kernels.fsq_encode(x, weight, bias, LEVELS)
    assert torch.equal(indices, reference.fsq_encode(x, weight, bias, LEVELS))
    assert int(indices.min()) >= 0 and int(indices.max()) < 240
    big = torch.full((4, 3), 1e37, device=device)
    frames = kernels.fsq_decode(indices, big, big[:, 0], LEVELS)
    torch.testing.assert_close(frames, reference.fsq_decode(indices, big, big[:, 0], LEVELS), rtol=1e-6, atol=1e30)


def test_op_gradients() -> None:
    """Straight through the rounding: the op's gradient is autograd's of the bounded value over its half width, in fp64."""
    z = torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(40, 3, dtype=torch.float64)
    (fsq_bound(z, LEVELS) / torch.tensor([4.0, 3.0, 2.0]) * pull).sum().backward()
    expected, z.grad = z.grad, None
    (OPS.fsq_quantize(z, LEVELS)[0] * pull).sum().backward()
    torch.testing.assert_close(z.grad, expected, atol=1e-12, rtol=1e-12)
    weight, bias = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    indices = torch.randint(240, (2, 4))
    decode = lambda w, b: OPS.fsq_decode(indices, w, b, LEVELS)  # noqa: E731
    assert torch.autograd.gradcheck(decode, (weight.requires_grad_(), bias.requires_grad_()))


def test_ops_pass_opcheck() -> None:
    x, weight, bias = (t.requires_grad_() for t in problem(14, 6, LEVELS))
    out_weight, out_bias = torch.randn(6, 3, requires_grad=True), torch.randn(6, requires_grad=True)
    indices = OPS.fsq_encode(x, weight, bias, LEVELS)
    for op, args in (
        (OPS.fsq_encode, (x.detach().view(2, 7, 6), weight.detach(), bias.detach(), LEVELS)),
        (OPS.fsq_decode, (indices.view(2, 7), out_weight, out_bias, LEVELS)),
        (OPS.fsq_quantize, (torch.randn(2, 5, 3, requires_grad=True), LEVELS)),
        (OPS.fsq_dequantize, (indices, LEVELS)),
        (OPS.fsq_quantize_backward, (torch.randn(4, 3), torch.randn(4, 3), LEVELS)),
    ):
        torch.library.opcheck(op.default, args)


class RoundTrip(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = torch.nn.Linear(6, 3), torch.nn.Linear(3, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        indices = fsq_encode(x, self.down.weight, self.down.bias, LEVELS)
        codes, _ = fsq_quantize(self.down(x), LEVELS)
        return fsq_decode(indices, self.up.weight, self.up.bias, LEVELS) + self.up(
            codes + fsq_dequantize(indices, LEVELS)
        )


def test_compile_and_export_keep_the_ops() -> None:
    model, x = RoundTrip(), torch.randn(2, 7, 6)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}
    program = torch.export.export(model, (x,), dynamic_shapes=(sizes,))
    names = [str(node.target) for node in program.graph.nodes]
    for op in ("fsq_encode", "fsq_decode", "fsq_quantize", "fsq_dequantize"):
        assert f"kinetok.{op}.default" in names
    plain = program.run_decompositions(DECOMPOSITIONS)
    assert not any("kinetok" in str(node.target) for node in plain.graph.nodes)
    other = torch.randn(3, 4, 6)
    torch.testing.assert_close(plain.module()(other), model(other))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: fsq_encode(x, torch.zeros(3, 5), torch.zeros(3), LEVELS), r"shape \[3, 4\]"),
        (lambda x: fsq_encode(x, torch.zeros(3, 4), None, LEVELS), "both"),
        (lambda x: fsq_encode(x, None, None, LEVELS), "3 numbers a row"),
        (lambda x: fsq_quantize(x, LEVELS), "3 numbers a row"),
        (lambda x: fsq_quantize(x, ()), "levels"),
        (lambda x: fsq_quantize(x, (2**16, 2**16, 2, 2)), "int32"),
        (lambda x: fsq_dequantize(x, LEVELS), "indices: expected int32 or int64"),
        (lambda x: fsq_decode(x.int(), torch.zeros(9, 2), torch.zeros(9), LEVELS), r"shape \[9, 3\]"),
    ],
)
def test_bad_arguments_are_named(call, says: str) -> None:
    with pytest.raises(UserError, match=says):
        call(torch.zeros(2, 4))
