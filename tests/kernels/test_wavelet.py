"""Wavelets against the golden files, PyWavelets, float64 and themselves; the kernels against the definition."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.kernels import dwt, idwt
from kinetok.kernels.ops import DECOMPOSITIONS
from kinetok.kernels.wavelet import cpu, reference

OPS = torch.ops.kinetok
WAVELETS = sorted(reference.SCALING)
Launcher = Callable[[str], ModuleType]


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.filterwarnings("ignore:Level value")
def test_the_orthonormal_scale_is_that_of_pywavelets(wavelet: str, dtype: torch.dtype) -> None:
    pywt = pytest.importorskip("pywt", reason="PyWavelets is the oracle")
    near = {"atol": 1e-6 if dtype == torch.float32 else 1e-12, "rtol": 0}
    for time in (1, 2, 4, 7, 16, 41):  # shorter than the filter, odd, longer
        x = torch.randn(2, 3, time, dtype=dtype)
        low, high = pywt.dwt(x.numpy(), wavelet, mode="periodization", axis=-1)
        y = dwt(x, 1, wavelet, "periodic", "orthonormal")
        np.testing.assert_allclose(y, np.concatenate((low, high), axis=1), **near)
        if wavelet == "haar" and time > 1:
            low, high = pywt.dwt(x.numpy(), wavelet, mode="reflect", axis=-1)
            y = dwt(x, 1, wavelet, "reflect", "orthonormal")
            np.testing.assert_allclose(y, np.concatenate((low, high), axis=1), **near)
    x = torch.randn(2, 3, 24, dtype=dtype)
    bands = pywt.wavedec(x.numpy(), wavelet, mode="periodization", level=3, axis=-1)
    np.testing.assert_allclose(
        dwt(x, 3, wavelet, "periodic", "orthonormal", "pyramid"), np.concatenate(bands, axis=-1), **near
    )
    packet = pywt.WaveletPacket(x.numpy(), wavelet, mode="periodization", maxlevel=2, axis=-1)
    ours = dwt(x, 2, wavelet, "periodic", "orthonormal")
    theirs = [packet[path].data for path in ("aa", "da", "ad", "dd")]  # first level's letter first
    np.testing.assert_allclose(ours, np.concatenate(theirs, axis=1), **near)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([("haar", "reflect"), *((wavelet, "periodic") for wavelet in WAVELETS)]),
    st.sampled_from(["patcher", "orthonormal"]),
    st.sampled_from(["packet", "pyramid"]),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 33),
    st.integers(0, 4),
    st.booleans(),
)
def test_perfect_reconstruction(border, scale, tree, batch, channels, time, levels, last) -> None:
    x = torch.randn((batch, time, channels) if last else (batch, channels, time), dtype=torch.float64)
    y = dwt(x, levels, *border, scale, tree, last)
    back = idwt(y, levels, border[0], scale, tree, last)
    axis = 1 if last else 2
    assert back.shape[axis] == -(-time // 2**levels) * 2**levels
    torch.testing.assert_close(back.narrow(axis, 0, time), x, atol=1e-12, rtol=0)
    if scale == "orthonormal":  # a rotation of the extended signal
        torch.testing.assert_close(y.square().sum(), back.square().sum())
    if not last:
        torch.testing.assert_close(dwt(x.transpose(1, 2), levels, *border, scale, tree, True).transpose(1, 2), y)


@pytest.mark.parametrize("tree", ["packet", "pyramid"])
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_the_backward_pass_is_the_adjoint(wavelet: str, tree: str) -> None:
    mode = "reflect" if wavelet == "haar" else "periodic"
    for last in (True, False):
        x = torch.randn(2, 7, 3, dtype=torch.float64)
        x = (x if last else x.transpose(1, 2).contiguous()).requires_grad_()
        y = OPS.dwt(x, 2, wavelet, mode, 0.5, tree, last)
        pull = torch.randn_like(y)
        (adjoint,) = torch.autograd.grad(y, x, pull)
        torch.testing.assert_close((y * pull).sum(), (x * adjoint).sum())
        (eager,) = torch.autograd.grad(reference.dwt(x, 2, wavelet, mode, 0.5, tree, last), x, pull)
        torch.testing.assert_close(adjoint, eager, atol=1e-12, rtol=0)
        if tree == "packet" and last:  # not the inverse: the scale differs, and so do the frames of the extension
            assert (adjoint - OPS.idwt(pull, 2, wavelet, 2.0, tree, last)[:, :7]).abs().max() > 0.1
        c = pull.detach().requires_grad_()
        back = OPS.idwt(c, 2, wavelet, 2.0, tree, last)
        push = torch.randn_like(back)
        (ours,) = torch.autograd.grad(back, c, push)
        (eager,) = torch.autograd.grad(reference.idwt(c, 2, wavelet, 2.0, tree, last), c, push)
        torch.testing.assert_close(ours, eager, atol=1e-12, rtol=0)


def test_gradcheck() -> None:
    x = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: OPS.dwt(x, 2, "haar", "reflect", 0.5, "packet", True), x)
    assert torch.autograd.gradgradcheck(lambda x: OPS.dwt(x, 2, "db2", "periodic", 0.5, "pyramid", False), x)
    y = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: OPS.idwt(y, 2, "db3", 2.0, "packet", True), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [True, False])
def test_the_cpu_route_is_the_definition(last: bool, dtype: torch.dtype) -> None:
    near = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for levels, time, mode in ((1, 9, "reflect"), (2, 16, "reflect"), (3, 21, "periodic"), (6, 3, "reflect")):
        x = torch.randn((5, time, 7) if last else (5, 7, time)).to(dtype)
        y = cpu.dwt(x, levels, "haar", mode, 0.5, "packet", last)
        exact = reference.dwt(x.double(), levels, "haar", mode, 0.5, "packet", last)
        assert y.dtype == dtype and y.is_contiguous()
        torch.testing.assert_close(y.double(), exact, atol=near, rtol=0)
        back = cpu.idwt(y, levels, "haar", 2.0, "packet", last)
        exact = reference.idwt(y.double(), levels, "haar", 2.0, "packet", last)
        assert back.dtype == dtype and back.is_contiguous()
        torch.testing.assert_close(back.double(), exact, atol=near * 2**levels, rtol=near)
        assert torch.equal(cpu.dwt(x[3:4], levels, "haar", mode, 0.5, "packet", last), y[3:4])


def test_the_cpu_route_carries_gradients_after_inference() -> None:
    with torch.inference_mode():
        dwt(torch.randn(1, 2, 10), 1, scale="orthonormal")
    x = torch.randn(1, 2, 9, requires_grad=True)
    dwt(x, 1, scale="orthonormal").square().sum().backward()
    torch.testing.assert_close(x.grad[..., :7], 2 * x.detach()[..., :7])
    torch.testing.assert_close(x.grad[..., 7], 4 * x.detach()[..., 7])  # the frame that the extension repeats


KERNEL_CASES = [  # wavelet, mode, levels, frames, channels, tree, channels_last
    ("haar", "reflect", 1, 13, 5, "packet", True),
    ("haar", "reflect", 3, 13, 5, "packet", True),
    ("haar", "reflect", 3, 21, 3, "packet", False),
    ("haar", "reflect", 2, 1, 3, "packet", True),
    ("haar", "periodic", 2, 7, 300, "packet", True),
    ("haar", "reflect", 6, 100, 2, "packet", True),
    ("haar", "reflect", 3, 29, 4, "pyramid", False),
    ("db2", "periodic", 1, 16, 17, "packet", True),
    ("db2", "periodic", 2, 9, 5, "pyramid", True),
    ("db3", "periodic", 2, 30, 3, "packet", False),
    ("db4", "periodic", 1, 2, 3, "packet", True),
    ("db4", "periodic", 3, 50, 3, "pyramid", False),
]


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_kernels_transform_as_the_definition(launcher: Launcher, device: torch.device, case: tuple) -> None:
    kernels = launcher("wavelet")
    wavelet, mode, levels, time, channels, tree, last = case
    x = torch.randn((2, time, channels) if last else (2, channels, time), device=device)
    y = kernels.dwt(x, levels, wavelet, mode, 0.5, tree, last)
    exact = reference.dwt(x.double(), levels, wavelet, mode, 0.5, tree, last)
    torch.testing.assert_close(y.double(), exact, atol=1e-6, rtol=0)
    back = kernels.idwt(y, levels, wavelet, 2.0, tree, last)
    torch.testing.assert_close(back.narrow(1 if last else 2, 0, time), x, atol=5e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_kernels_take_strides_other_types_and_nothing(
    launcher: Launcher, device: torch.device, dtype: torch.dtype
) -> None:
    kernels = launcher("wavelet")
    x = torch.randn(12, 2, 14, device=device).to(dtype).transpose(0, 1)[:, ::2, 1:12]
    for last in (True, False):
        y = kernels.dwt(x, 2, "haar", "reflect", 0.5, "packet", last)
        exact = reference.dwt(x.double(), 2, "haar", "reflect", 0.5, "packet", last)
        assert y.dtype == dtype and y.is_contiguous()
        torch.testing.assert_close(y.double(), exact, atol=4 * torch.finfo(dtype).eps, rtol=0)
        back = kernels.idwt(y[..., ::1].transpose(1, 2), 2, "haar", 2.0, "packet", not last)
        torch.testing.assert_close(
            back.double(), reference.idwt(y.double().transpose(1, 2), 2, "haar", 2.0, "packet", not last),
            atol=16 * torch.finfo(dtype).eps, rtol=0,
        )  # fmt: skip
    for empty in (x[:0], x[:, :0], x[..., :0]):
        assert (
            kernels.dwt(empty, 1, "haar", "reflect", 0.5, "packet", True).shape
            == dwt(empty, 1, channels_last=True).shape
        )
        assert kernels.idwt(empty[..., :0], 1, "haar", 2.0, "packet", True).numel() == 0


def test_extreme_values(launcher: Launcher, device: torch.device) -> None:
    x = torch.tensor([1e38, 1e38, float("inf"), 1.0, float("nan"), 0.0, 1e-45, 0.0], device=device).view(1, 8, 1)
    expected = reference.dwt(x, 1, "haar", "reflect", 0.5, "packet", True)
    ours = launcher("wavelet").dwt(x, 1, "haar", "reflect", 0.5, "packet", True)
    torch.testing.assert_close(ours, expected, equal_nan=True)


def test_ops_pass_opcheck() -> None:
    x = torch.randn(2, 7, 4, requires_grad=True)
    torch.library.opcheck(OPS.dwt.default, (x, 2, "haar", "reflect", 0.5, "packet", True))
    torch.library.opcheck(OPS.dwt.default, (x, 1, "db2", "periodic", 0.5, "pyramid", False))
    torch.library.opcheck(OPS.idwt.default, (x, 2, "db2", 2.0, "packet", True))
    torch.library.opcheck(OPS.idwt.default, (x, 2, "haar", 2.0, "pyramid", False))


class RoundTrip(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return idwt(dwt(x, 2, "db2", "periodic", channels_last=True).tanh(), 2, "db2", channels_last=True)


def test_compile_and_export_keep_the_ops() -> None:
    model, x = RoundTrip(), torch.randn(2, 8, 3)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    sizes = {0: torch.export.Dim("batch"), 1: 4 * torch.export.Dim("patches", min=2)}
    program = torch.export.export(model, (x,), dynamic_shapes=(sizes,))
    names = [str(node.target) for node in program.graph.nodes]
    assert "kinetok.dwt.default" in names and "kinetok.idwt.default" in names
    plain = program.run_decompositions(DECOMPOSITIONS)
    assert not any("kinetok" in str(node.target) for node in plain.graph.nodes)
    torch.testing.assert_close(plain.module()(x), model(x))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: idwt(torch.zeros(1, 6, 3), 2), "multiple of 4 channels"),
        (lambda: idwt(torch.zeros(1, 6, 3), 1, tree="pyramid"), "multiple of 2 coefficients"),
        (lambda: dwt(torch.zeros(1, 6, 4), 1, scale="other"), "scale"),  # type: ignore[arg-type]
        (lambda: dwt(torch.zeros(1, 6, 4), 1, "sym4"), "wavelet"),  # type: ignore[arg-type]
        (lambda: dwt(torch.zeros(1, 6, 4), 1, "db2"), "mode: expected 'periodic'"),
        (lambda: dwt(torch.zeros(1, 6, 4), 1, tree="bush"), "tree"),  # type: ignore[arg-type]
        (lambda: dwt(torch.zeros(1, 6, 4), 7), "levels"),
        (lambda: dwt(torch.zeros(6, 4), 1), r"\[B, C, T\]"),
        (lambda: dwt(torch.zeros(1, 6, 4, dtype=torch.int32), 1, channels_last=True), r"\[B, T, C\]"),
    ],
)
def test_bad_arguments_are_named(call, says: str) -> None:
    with pytest.raises(UserError, match=says):
        call()
