"""Rotary tables and rotation against the golden rows; the operators and Triton kernels against float64."""

import numpy as np
import pytest
import torch

from kinetok.errors import UserError
from kinetok.kernels.ops import DECOMPOSITIONS
from kinetok.kernels.rotary import apply_rotary, cpu, reference, rotary_kv_write, rotary_table

OPS = torch.ops.kinetok
FLOAT8 = torch.float8_e4m3fn


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


def exact(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The rotation as a product of complex numbers in float64."""
    turned = (
        torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.view_as_complex(table.double())[:, :, None]
    )
    return torch.view_as_real(turned).flatten(-2)


def close(mine: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(mine.double(), wanted, rtol=torch.finfo(mine.dtype).eps, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 5, 100), (1, 1, 4, 128), (1, 2, 3, 2), (2, 0, 1, 8)])
def test_kernel_against_float64(launcher, device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, device=device).to(dtype)
    table = rotary_table(300, shape[3]).to(device)
    for rows in (table[None, 200 : 200 + shape[1]], table[torch.randint(300, shape[:2])]):
        close(launcher("rotary").apply_rotary(x, rows), exact(x, rows))
        turned_back = launcher("rotary").apply_rotary_backward(x, rows)
        close(turned_back, exact(x, rows * torch.tensor([1.0, -1.0], device=device)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("head_dim", [32, 96, 128])
def test_cpu_route_has_the_definitions_bits(head_dim: int, dtype: torch.dtype) -> None:
    packed = torch.randn(2, 5, 3, 7, head_dim).to(dtype)
    odd = torch.randn(1 + 2 * 5 * 7 * head_dim).to(dtype)[1:].view(2, 5, 7, head_dim)  # starts at an odd number
    table = rotary_table(40, head_dim)
    for x in (packed[:, :, 1], packed.flatten(2, 3)[:, 1:2], odd, packed[:0, :, 0]):
        for rows in (
            table[None, 30 : 30 + x.shape[1]],
            table[torch.randint(40, x.shape[:2])],
            table[None, :1].expand(1, x.shape[1], -1, -1),
        ):
            assert torch.equal(cpu.apply_rotary(x, rows), reference.apply_rotary(x, rows))
    x = packed[:, :, 0].double().requires_grad_()
    pull = torch.randn_like(x)
    (grad,) = torch.autograd.grad((apply_rotary(x, table[None, :5]) * pull).sum(), x)
    torch.testing.assert_close(grad, reference.apply_rotary_backward(pull, table[None, :5]))


def test_kernel_and_definition_on_extreme_values(launcher, device) -> None:
    """Next to the largest numbers, subnormal, infinite and no number: each pair keeps its own."""
    x = torch.randn(1, 2, 2, 32, device=device)
    x[0, 0, 0, :8] = torch.tensor([1e38, -1e38, 1e-40, 1e-38, torch.inf, 1.0, torch.nan, 0.0], device=device)
    table = rotary_table(9, 32).to(device)[None, 7:]
    wanted = exact(x, table)
    wanted[0, 0, 0, 4:8] = torch.nan  # checked apart: infinity times a cosine less infinity times a sine may be either
    for route in (launcher("rotary").apply_rotary, reference.apply_rotary, apply_rotary):
        mine = route(x, table)
        assert not mine[0, 0, 0, 4:8].isfinite().any()
        mine[0, 0, 0, 4:8] = torch.nan
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-6, atol=2e-6, equal_nan=True)


def test_kernel_reads_strides(launcher, device) -> None:
    base = torch.randn(2, 4, 3, 6, 8, device=device)
    table = rotary_table(4, 8).to(device)[None]
    for x in (base[:, :, 1], base[:, :, 1].transpose(1, 2)[:, :4], base[:, ::2, 0, ::2], base[..., 0, 1:5]):
        rows = table[:, : x.shape[1], : x.shape[3] // 2]
        close(launcher("rotary").apply_rotary(x, rows), exact(x, rows))


def caches(rows: int, heads: int, capacity: int, head_dim: int, dtype: torch.dtype, device) -> list[torch.Tensor]:
    """Key and value caches full of -3, as views into a slab of two layers."""
    slab = torch.full((2, 2, rows, heads, capacity, head_dim), -3.0, device=device).to(dtype)
    return [slab[0, 1], slab[1, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("positions", "head_dim"), [(1, 100), (3, 8)])
@pytest.mark.parametrize("route", ["definition", "kernel"])
def test_kv_write_against_float64(
    launcher, device, route: str, positions: int, head_dim: int, dtype: torch.dtype
) -> None:
    write = launcher("rotary").rotary_kv_write if route == "kernel" else rotary_kv_write
    rows, heads, capacity = 2, 5, 9
    qkv = torch.randn(rows, positions, 3, heads, head_dim, device=device).to(dtype)
    starts = torch.tensor([4, 0], device=device)
    table = rotary_table(capacity, head_dim).to(device)[starts[:, None] + torch.arange(positions, device=device)]
    k_cache, v_cache = caches(rows, heads, capacity, head_dim, dtype, device)
    close(write(qkv, table, starts, k_cache, v_cache), exact(qkv[:, :, 0], table))
    turned = exact(qkv[:, :, 1], table)
    for row, start in enumerate(starts.tolist()):
        taken = slice(start, start + positions)
        close(k_cache[row, :, taken].transpose(0, 1), turned[row])
        assert torch.equal(v_cache[row, :, taken].transpose(0, 1), qkv[row, :, 2])
        for cache in (k_cache, v_cache):
            assert (cache[row, :, :start] == -3).all() and (cache[row, :, start + positions :] == -3).all()


@pytest.mark.parametrize("route", ["definition", "kernel"])
def test_float8_cache_holds_scaled_values(launcher, device, route: str) -> None:
    write = launcher("rotary").rotary_kv_write if route == "kernel" else rotary_kv_write
    qkv = torch.randn(2, 1, 3, 3, 100, device=device) * torch.logspace(-4, 3, 100, device=device)
    table = torch.tensor([1.0, 0.0], device=device).expand(1, 1, 50, 2)  # no rotation: k is exact
    kv_scale = torch.rand(2, 2, 3, device=device) + 0.1
    k_cache, v_cache = caches(2, 3, 4, 100, FLOAT8, device)
    write(qkv, table, torch.tensor([3, 1], device=device), k_cache, v_cache, kv_scale)
    for row, at in enumerate((3, 1)):
        for part, cache in enumerate((k_cache, v_cache)):
            scaled = (qkv[row, 0, part + 1] / kv_scale[part, row, :, None]).clamp(-448, 448)
            assert scaled.abs().max() == 448 and torch.equal(cache[row, :, at].float(), scaled.to(FLOAT8).float())


def test_float8_rounding_of_every_float16(launcher, device) -> None:
    every = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(torch.float16).reshape(1, 1, 512, 128)
    qkv = torch.stack((torch.zeros_like(every), torch.zeros_like(every), every), dim=2)
    k_cache, v_cache = caches(1, 512, 1, 128, FLOAT8, device)
    table, start = rotary_table(1, 128).to(device)[None], torch.zeros(1, dtype=torch.int64, device=device)
    launcher("rotary").rotary_kv_write(qkv, table, start, k_cache, v_cache, torch.ones(2, 1, 512, device=device))
    wanted = every.float().clamp(-448, 448).to(FLOAT8)
    codes, known = v_cache.view(torch.uint8).flatten(), wanted.view(torch.uint8).flatten()
    assert torch.equal(torch.where(known == 0xFF, 0x7F, known), torch.where(codes == 0xFF, 0x7F, codes))  # NaN has two


def test_kv_write_kernel_takes_strides_and_nothing_and_spreads_no_nan(launcher, device) -> None:
    write = launcher("rotary").rotary_kv_write
    qkv, table = torch.randn(2, 3, 3, 4, 8, device=device), rotary_table(3, 8).to(device)[None]
    starts = torch.tensor([1, 0], device=device)
    qkv[1, 2, :, 3] = torch.tensor([torch.nan, torch.inf, 1e30, 1e-30, 0, 0, 0, 0], device=device)
    wanted = caches(2, 4, 5, 8, torch.float32, device)
    q = write(qkv, table, starts, *wanted)
    assert q[1, 2, 3].isnan().any() and q[1, 2, 3, 4:].eq(0).all() and q[1, 2, :3].isfinite().all()
    close(q[1, 2, 3, 2:4], exact(qkv[1:, 2:, 0], table[:, 2:])[0, 0, 3, 2:4])
    assert sum(int((~cache.isfinite()).sum()) for cache in wanted) == 4  # a pair of k, two numbers of v
    for view in (qkv.repeat(1, 2, 1, 1, 1)[:, :3], qkv.transpose(1, 3).contiguous().transpose(1, 3)):
        mine = caches(2, 4, 5, 8, torch.float32, device)
        assert torch.equal(write(view, table, starts, *mine).nan_to_num(), q.nan_to_num())
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(mine, wanted, strict=True))
    assert write(qkv[:0], table, starts[:0], *(cache[:0] for cache in mine)).shape == (0, 3, 4, 8)
    assert write(qkv[:, :0], table[:, :0], starts, *mine).shape == (2, 0, 4, 8)


@pytest.mark.parametrize("start", [-1, 4, 2**31 - 1])
def test_kernel_leaves_out_what_has_no_place(launcher, device, start: int) -> None:
    qkv, table = torch.ones(1, 1, 3, 2, 8, device=device), rotary_table(1, 8).to(device)[None]
    k_cache, v_cache = caches(1, 2, 4, 8, torch.float32, device)
    launcher("rotary").rotary_kv_write(qkv, table, torch.tensor([start], device=device), k_cache, v_cache)
    assert (k_cache._base == -3).all()


@pytest.mark.parametrize("route", ["definition", "kernel"])
def test_a_row_has_the_same_bits_in_a_crowd(launcher, device, route: str) -> None:
    write = launcher("rotary").rotary_kv_write if route == "kernel" else reference.rotary_kv_write
    rows = 257
    qkv, starts = torch.randn(rows, 1, 3, 2, 32, device=device), torch.randint(8, (rows,), device=device)
    table = rotary_table(8, 32).to(device)[starts][:, None]
    crowd, alone = caches(rows, 2, 8, 32, qkv.dtype, device), caches(1, 2, 8, 32, qkv.dtype, device)
    q = write(qkv, table, starts, *crowd)
    assert torch.equal(q[5:6], write(qkv[5:6], table[5:6], starts[5:6], *alone))
    assert all(torch.equal(many[5:6], one) for many, one in zip(crowd, alone, strict=True))


def test_operators_are_sound() -> None:
    x, table = torch.randn(2, 3, 2, 6, requires_grad=True), rotary_table(3, 6)[None]
    torch.library.opcheck(OPS.apply_rotary.default, (x, table))
    torch.library.opcheck(OPS.apply_rotary_backward.default, (x.detach(), table))
    qkv, starts = torch.randn(2, 3, 3, 2, 6), torch.tensor([1, 0])
    torch.library.opcheck(
        OPS.rotary_kv_write.default, (qkv, table, starts, torch.zeros(2, 2, 4, 6), torch.zeros(2, 2, 4, 6))
    )
    eight = torch.zeros(2, 2, 4, 6).to(FLOAT8), torch.zeros(2, 2, 4, 6).to(FLOAT8)
    checks = "test_autograd_registration", "test_faketensor"  # torch compares no float8
    given = (qkv, table, starts, *eight, torch.ones(2, 2, 2))
    torch.library.opcheck(OPS.rotary_kv_write.default, given, test_utils=checks)


def test_gradients_are_those_of_finite_differences() -> None:
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(OPS.apply_rotary, (x, rotary_table(3, 6).double()[None]))


def test_compile_and_export_keep_the_operators() -> None:
    class Step(torch.nn.Module):
        def forward(self, qkv, table, starts, k_cache, v_cache):  # type: ignore[no-untyped-def]
            q = rotary_kv_write(qkv, table, starts, k_cache, v_cache)
            return apply_rotary(q, table) + k_cache.sum() + v_cache.sum()

    def args(rows: int) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(rows)
        return (
            torch.randn(rows, 1, 3, 2, 8),
            rotary_table(5, 8)[None, 3:4],
            torch.arange(rows) % 5,
            torch.zeros(rows, 2, 5, 8),
            torch.zeros(rows, 2, 5, 8),
        )

    compiled = torch.compile(Step(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args(3)), Step()(*args(3)))
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Step(), args(3), dynamic_shapes=({0: rows}, None, {0: rows}, {0: rows}, {0: rows}))
    assert {OPS.apply_rotary.default, OPS.rotary_kv_write.default} <= {node.target for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(*args(7)), Step()(*args(7)))
    lowered = program.run_decompositions(DECOMPOSITIONS)
    assert OPS.apply_rotary.default not in {node.target for node in lowered.graph.nodes}


def test_what_does_not_fit_is_refused() -> None:
    qkv, table, starts = torch.zeros(1, 1, 3, 2, 8), rotary_table(1, 8)[None], torch.zeros(1, dtype=torch.int64)
    k_cache, v_cache = caches(1, 2, 4, 8, torch.float32, "cpu")
    with pytest.raises(UserError, match="table"):
        apply_rotary(torch.zeros(1, 2, 2, 8), table)
    with pytest.raises(UserError, match="contiguous caches"):
        rotary_kv_write(qkv, table, starts, k_cache, v_cache.transpose(1, 2))
    with pytest.raises(UserError, match="kv_scale"):
        rotary_kv_write(qkv, table, starts, k_cache.to(FLOAT8), v_cache.to(FLOAT8))
    with pytest.raises(IndexError):
        rotary_kv_write(qkv, table, starts + 4, k_cache, v_cache)
