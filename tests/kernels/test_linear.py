"""Products with packed weights against float64: packing, definition, operator, Triton kernels."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.kernels import linear as family
from kinetok.kernels.linear import PackedWeight, linear, pack, split_k, unpack
from kinetok.kernels.linear.packing import LARGEST
from kinetok.kernels.ops import DECOMPOSITIONS

EPS = 1e-5
KINDS = [
    ("fp32", 0),
    ("fp16", 0),
    ("bf16", 0),
    ("int8", 0),
    ("int8", 64),
    ("int8", 128),
    ("int4", 64),
    ("int4", 128),
    ("fp8", 0),
]


def weight_of(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * columns**-0.5


def rows_of(batch: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch)).to(dtype) * 2


def exact(
    x: torch.Tensor,
    weight: PackedWeight,
    eps: float | None = None,
    residual: torch.Tensor | None = None,
    swiglu: bool = False,
) -> torch.Tensor:
    values = x.double()
    if eps is not None:
        values = values / (values.square().mean(1, keepdim=True) + eps).sqrt()
    y = values @ unpack(weight).double().T
    if swiglu:
        gate, up = y.chunk(2, dim=1)
        y = gate * gate.sigmoid() * up
    return y if residual is None else y + residual.double()


def dtype_of(kind: str) -> torch.dtype:
    return {"fp32": torch.float32, "fp16": torch.float16}.get(kind, torch.bfloat16)


def close(y: torch.Tensor, wanted: torch.Tensor) -> None:
    """To one rounding of y's dtype and fp32 sums."""
    bound = {
        "rtol": max(torch.finfo(y.dtype).eps, 3e-6),
        "atol": 3e-6 * float(wanted.abs().amax() if len(wanted) else 0),
    }
    torch.testing.assert_close(y.double(), wanted, **bound)


def call(kernels, x, packed, eps=None, residual=None, swiglu=False, wide=False):  # type: ignore[no-untyped-def]
    return kernels.packed_linear(
        x,
        packed.data,
        packed.scale,
        packed.counters,
        packed.kind,
        packed.group,
        packed.rows,
        eps,
        residual,
        swiglu,
        wide,
    )


@pytest.mark.parametrize(("kind", "group"), KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (130, 192), (64, 257)])
def test_packing_bounds_the_error_and_keeps_the_places(kind: str, group: int, shape: tuple[int, int]) -> None:
    weight = weight_of(*shape)
    weight[:, 0] *= 30
    packed = pack(weight, kind, group=group)
    error = (unpack(packed) - weight).abs()
    if kind in LARGEST:
        spans = torch.nn.functional.pad(weight, (0, -shape[1] % (group or 1))).unflatten(1, (-1, group or shape[1]))
        scale = (spans.abs().amax(2, keepdim=True) / LARGEST[kind]).expand_as(spans).flatten(1)[:, : shape[1]]
        # Halves of a step; a group's scale is rounded to bf16 (2^-9) and the largest step of e4m3 is 32.
        bound = scale * (16.01 if kind == "fp8" else 0.5 + LARGEST[kind] * 2**-9 if group else 0.5001)
    else:
        bound = weight.abs() * torch.finfo(dtype_of(kind)).eps + 2**-25  # half of the smallest fp16
    assert (error <= bound).all()
    assert packed.data.shape[0] % 2 == 0 and not packed.counters.any()


def test_scale_and_pairs_are_packed_in() -> None:
    weight, scale = weight_of(6, 5), torch.rand(5)
    assert torch.equal(unpack(pack(weight, "fp32", norm_scale=scale, paired=True)), weight * scale)
    rows = pack(weight, "fp32", paired=True).data[0, 0, :6, :5]
    assert torch.equal(rows, weight[[0, 3, 1, 4, 2, 5]])
    zeros = pack(torch.zeros(3, 4), "int4", group=64)
    assert not unpack(zeros).any() and zeros.nbytes == zeros.data.nbytes + zeros.scale.nbytes


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 140), st.integers(1, 300), st.sampled_from(KINDS), st.integers(1, 3))
def test_definition_against_float64(rows: int, columns: int, kind: tuple[str, int], batch: int) -> None:
    packed = pack(weight_of(rows, columns), kind[0], group=kind[1])
    x, residual = (rows_of(batch, width, dtype_of(kind[0])) for width in (columns, rows))
    close(linear(x, packed), exact(x, packed))
    close(linear(x, packed, eps=EPS, residual=residual), exact(x, packed, EPS, residual))
    assert linear(x, packed, wide=True).dtype == torch.float32


@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_kernels_against_float64(launcher, device, kind: str, group: int) -> None:
    kernels = launcher("linear")
    dtype = dtype_of(kind)
    packed = pack(weight_of(70, 200), kind, group=group).to(device)
    x, residual = rows_of(3, 200, dtype).to(device), rows_of(3, 70, dtype).to(device)
    close(call(kernels, x, packed), exact(x, packed))
    close(call(kernels, x, packed, EPS, residual), exact(x, packed, EPS, residual))
    close(call(kernels, x, packed, EPS, wide=True), exact(x, packed, EPS))
    paired = pack(weight_of(68, 130), kind, group=group, paired=True).to(device)
    x = x[:, :130]  # a stride that is not its width
    close(call(kernels, x, paired, EPS, swiglu=True), exact(x, paired, EPS, swiglu=True))


@pytest.mark.parametrize(("kind", "group"), [("fp32", 0), ("bf16", 0), ("int8", 64), ("int4", 64)])
def test_a_split_k_against_float64(launcher, device, kind: str, group: int) -> None:
    kernels = launcher("linear")
    columns = 8 * 256 + 70  # an odd number of tiles: the parts are of unequal length
    assert split_k(60, columns, kind) in (2, 4, 8)
    packed = pack(weight_of(60, columns), kind, group=group, paired=True).to(device)
    x, residual = rows_of(2, columns, dtype_of(kind)).to(device), rows_of(2, 60, dtype_of(kind)).to(device)
    for _ in range(2):  # the counters are zero again
        close(call(kernels, x, packed, EPS, residual), exact(x, packed, EPS)[:, _interleaved(60)] + residual.double())
        assert not packed.counters.any()
    close(call(kernels, x, packed, EPS, swiglu=True), exact(x, packed, EPS, swiglu=True))


def _interleaved(rows: int) -> torch.Tensor:
    return torch.arange(rows).view(2, -1).T.flatten()


def test_a_batch_of_none_and_transposed_rows(launcher, device) -> None:
    kernels = launcher("linear")
    packed = pack(weight_of(10, 20), "fp32").to(device)
    assert call(kernels, torch.empty(0, 20, device=device), packed).shape == (0, 10)
    assert linear(torch.empty(0, 20), packed.to(torch.device("cpu"))).shape == (0, 10)
    x, residual = rows_of(20, 3).T.to(device), rows_of(10, 3).T.to(device)
    close(call(kernels, x, packed, residual=residual), exact(x, packed, residual=residual))


def test_extreme_values(launcher, device) -> None:
    kernels = launcher("linear")
    packed = pack(weight_of(5, 100), "fp32").to(device)
    for factor in (1e-18, 1e16):
        x = rows_of(2, 100).to(device) * factor
        close(call(kernels, x, packed, EPS), exact(x, packed, EPS))
    paired = pack(weight_of(4, 3) * 1e3, "fp32", paired=True).to(device)
    x = rows_of(4, 3).to(device)
    close(call(kernels, x, paired, swiglu=True), exact(x, paired, swiglu=True))
    one = rows_of(1, 100).to(device)
    one[0, 7] = torch.nan
    assert call(kernels, one, packed).isnan().all()


@pytest.fixture
def column_by_column(launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter, form the columns of a matrix product one by one.

    numpy sums in an order that depends on how many columns there are, which matrix instructions do not do.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    launcher("linear")
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, total, *precision):
        def column(value, at):
            return TensorHandle(np.ascontiguousarray(value.data[:, at : at + 1]), value.dtype.scalar)

        columns = [dot(self, a, column(b, at), column(total, at), *precision).data for at in range(b.data.shape[1])]
        return TensorHandle(np.concatenate(columns, axis=1), total.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize("route", ["definition", "kernel"])
@pytest.mark.parametrize(("kind", "group"), [("fp32", 0), ("bf16", 0), ("int4", 64)])
def test_a_row_has_the_same_bits_in_a_crowd(
    launcher, device, column_by_column, route: str, kind: str, group: int
) -> None:
    columns = 1100 if kind == "bf16" else 300  # 1100 is split
    packed = pack(weight_of(60, columns), kind, group=group)
    crowd = rows_of(257, columns, dtype_of(kind))
    kernels = family.reference if route == "definition" else launcher("linear")
    if route == "kernel":
        packed, crowd = packed.to(device), crowd.to(device)
    alone = call(kernels, crowd[16:17], packed, EPS, wide=True)
    for batch in (17, 33, 257):  # a tile of 32, of 64 (int4: two of 32), four of 64 and one more in another launch
        assert torch.equal(call(kernels, crowd[:batch], packed, EPS, wide=True)[16:17], alone)


def test_the_split_depends_on_the_shape() -> None:
    assert [split_k(*shape, "bf16") for shape in ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))] == [
        2,
        4,
        1,
        4,
    ]
    assert split_k(64_001, 4096, "int8") == split_k(576, 192, "fp32") == 1


@pytest.mark.parametrize("batch", [0, 3])
def test_operator_is_sound(batch: int) -> None:
    packed = pack(weight_of(6, 70), "int8", paired=True)
    x, residual = rows_of(batch, 70, torch.bfloat16), rows_of(batch, 6, torch.bfloat16)
    fixed = packed.data, packed.scale, packed.counters, "int8", 0, 6
    operator = torch.ops.kinetok.packed_linear.default
    torch.library.opcheck(operator, (x, *fixed, EPS, residual, False, False))
    torch.library.opcheck(operator, (x, *fixed, None, None, True, True))


def test_compile_and_export_keep_the_operator() -> None:
    packed = pack(weight_of(6, 70), "int4", group=64, paired=True)

    class Mlp(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return linear(x, packed, eps=EPS, swiglu=True)

    module, x = Mlp(), rows_of(3, 70)
    wanted = module(x)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), wanted)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    assert torch.ops.kinetok.packed_linear.default in {node.target for node in program.graph.nodes}
    more = rows_of(5, 70)
    torch.testing.assert_close(program.module()(more), module(more))
    lowered = program.run_decompositions(DECOMPOSITIONS)
    assert not any("kinetok" in str(node.target) for node in lowered.graph.nodes)
    torch.testing.assert_close(lowered.module()(more), module(more))


def test_what_does_not_fit_is_refused() -> None:
    weight = weight_of(6, 8)
    for options, message in (
        ({"kind": "int3"}, "kind"),
        ({"kind": "int4"}, "group"),
        ({"kind": "bf16", "group": 64}, "group"),
        ({"kind": "int8", "norm_scale": torch.ones(3)}, "norm_scale"),
    ):
        with pytest.raises(UserError, match=message):
            pack(weight, **options)
    with pytest.raises(UserError, match="even N"):
        pack(weight[:5], "int8", paired=True)
    with pytest.raises(UserError, match="finite"):
        pack(weight / 0, "int8")
    packed = pack(weight, "bf16")
    x = rows_of(2, 8, torch.bfloat16)
    with pytest.raises(UserError, match=r"x \[B, 8\]"):
        linear(x[:, :5], packed)
    with pytest.raises(UserError, match="bfloat16"):
        linear(x.float(), packed)
    with pytest.raises(UserError, match="paired"):
        linear(x, packed, swiglu=True)
    with pytest.raises(UserError, match="residual"):
        linear(x, packed, residual=x)
