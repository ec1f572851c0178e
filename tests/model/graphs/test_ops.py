"""Every operator's ONNX form against its definition in ``kernels``, at both opsets."""

from functools import partial

import numpy as np
import pytest
import torch

from kinetok.kernels.attention import reference as attention_reference
from kinetok.kernels.fsq import reference as fsq_reference
from kinetok.kernels.norm import reference as norm_reference
from kinetok.kernels.rotary import reference as rotary_reference
from kinetok.kernels.wavelet import reference as wavelet_reference
from kinetok.model.graphs import ops
from kinetok.model.graphs.builder import Graph, WeightFile

OPSETS = pytest.mark.parametrize("opset", [18, 23])
F32 = np.dtype(np.float32)


def run(folder_of_graphs, opset, build, feeds, rank):
    """Build a one-operator graph whose inputs are ``feeds``; returns its output."""

    def graph(weights: WeightFile) -> Graph:
        g = Graph("op", weights, opset)
        names = [g.input(name, value.dtype, [f"{name}{i}" for i in range(value.ndim)]) for name, value in feeds.items()]
        g.output(build(g, *names), "out", np.float32, [f"out{i}" for i in range(rank)])
        return g

    return folder_of_graphs(graph)["op"].run(None, feeds)[0]


SIZES = torch.tensor([4, 1e-3, 0])[:, None, None]  # of what is normed: epsilon decides where it is small


@OPSETS
def test_rms_norm(folder_of_graphs, opset) -> None:
    x, scale = torch.randn(3, 5, 17) * SIZES, torch.randn(17)
    got = run(
        folder_of_graphs, opset, lambda g, a, b: ops.rms_norm(g, a, b, F32), {"x": x.numpy(), "s": scale.numpy()}, 3
    )
    np.testing.assert_allclose(got, norm_reference.rms_norm(x.double(), scale.double()), atol=3e-6)


@OPSETS
def test_add_rms_norm(folder_of_graphs, opset) -> None:
    x, more, scale = torch.randn(3, 5, 17) * SIZES, torch.randn(3, 5, 17) * SIZES, torch.randn(17)
    feeds = {"x": x.numpy(), "more": more.numpy(), "s": scale.numpy()}
    wanted = x.double() + more, norm_reference.rms_norm(x.double() + more, scale.double())
    for which in (0, 1):
        got = run(folder_of_graphs, opset, lambda g, *names, i=which: ops.add_rms_norm(g, *names)[i], feeds, 3)
        np.testing.assert_allclose(got, wanted[which], atol=3e-6)


@OPSETS
@pytest.mark.parametrize("half", [1, 32, 50, 64])
def test_rotate(folder_of_graphs, opset, half) -> None:
    table = rotary_reference.rotary_table(40, 2 * half)
    x, positions = torch.randn(2, 3, 5, 2 * half), torch.tensor([[0, 1, 2, 3, 4], [7, 39, 0, 5, 5]])

    def build(g: Graph, a: str, at: str) -> str:
        parts = tuple(g.weight(name, lambda i=i: table[..., i].numpy()) for i, name in enumerate(("cos", "sin")))
        return ops.rotate(g, a, parts, at, half)

    got = run(folder_of_graphs, opset, build, {"x": x.numpy(), "at": positions.numpy()}, 4)
    wanted = rotary_reference.apply_rotary(x.double().transpose(1, 2), table.double()[positions]).transpose(1, 2)
    np.testing.assert_allclose(got, wanted, atol=2e-6)


@OPSETS
@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_attention_sees_what_the_mask_says(folder_of_graphs, opset, target) -> None:
    q, k, v = torch.randn(2, 3, 4, 10), torch.randn(2, 3, 7, 10), torch.randn(2, 3, 7, 10)
    visible = torch.rand(2, 1, 4, 7) < 0.5
    visible[..., 0] = True
    got = run(
        folder_of_graphs,
        opset,
        lambda g, *names: ops.attention(g, *names, 10, F32, target=target),
        {"q": q.numpy(), "k": k.numpy(), "v": v.numpy(), "visible": visible.numpy()},
        4,
    )
    wanted = attention_reference.attention(q.double(), k.double(), v.double(), visible)
    np.testing.assert_allclose(got, wanted, atol=3e-6)


@OPSETS
def test_cached_attention_of_rows_at_their_own_positions(folder_of_graphs, opset) -> None:
    """What lies behind a row's position is not read, be it NaN; what the cache holds before it stays."""
    heads, size, capacity, at = 3, 16, 9, torch.tensor([0, 8, 3])
    table = rotary_reference.rotary_table(capacity, size)
    qkv, cache = torch.randn(3, 1, 3 * heads * size), torch.randn(2, 3, heads, capacity, size)
    behind = torch.arange(capacity)[None] >= at[:, None]
    cache.transpose(2, 3)[:, behind] = torch.nan
    feeds = {"qkv": qkv, "keys": cache[0], "values": cache[1], "last": at.int()}

    def graph(weights: WeightFile) -> Graph:
        g = Graph("op", weights, opset)
        names = [
            g.input(name, value.numpy().dtype, [f"{name}{i}" for i in range(value.ndim)])
            for name, value in feeds.items()
        ]
        parts = tuple(g.weight(name, lambda i=i: table[..., i].numpy()) for i, name in enumerate(("cos", "sin")))
        filled = g.const(int(at.max()) + 1, np.int32)
        made = ops.cached_attention(g, names[0], (names[1], names[2]), names[3], filled, parts, heads, size)
        for name, value, rank in zip(("mixed", "keys_out", "values_out"), made, (3, 4, 4), strict=True):
            g.output(value, name, np.float32, [f"{name}{i}" for i in range(rank)])
        return g

    got = folder_of_graphs(graph)["op"].run(None, {name: value.numpy() for name, value in feeds.items()})
    q, k, v = qkv.double().view(3, 3, heads, size).unbind(1)
    q, k = (rotary_reference.apply_rotary(x[:, None], table.double()[at[:, None]])[:, 0] for x in (q, k))
    for row, last in enumerate(at.tolist()):
        keys, values = (
            torch.cat((old[row, :, :last].double(), new[row, :, None]), 1)
            for old, new in zip(cache, (k, v), strict=True)
        )
        wanted = attention_reference.attention(q[row, None, :, None], keys[None], values[None])
        np.testing.assert_allclose(got[0][row, 0], wanted.flatten(), atol=3e-6)
        for part, whole in ((got[1], keys), (got[2], values)):
            np.testing.assert_allclose(part[row, :, : last + 1], whole, atol=3e-6)


@OPSETS
@pytest.mark.parametrize("levels", [(8, 6, 5), (7, 5, 5, 5, 5), (8, 8, 8, 5, 5, 5)])
def test_fsq_dequantize_is_exact(folder_of_graphs, opset, levels) -> None:
    total = int(np.prod(levels))
    tokens = torch.randint(0, total, (2, 50))
    tokens[0, 0], tokens[0, 1] = 0, total - 1
    got = run(folder_of_graphs, opset, lambda g, t: ops.fsq_dequantize(g, t, levels), {"tokens": tokens.numpy()}, 3)
    np.testing.assert_array_equal(got, fsq_reference.fsq_dequantize(tokens, levels).numpy())


@OPSETS
@pytest.mark.parametrize("wavelet", ["haar", "db2", "db3", "db4"])
@pytest.mark.parametrize("levels", [1, 2])
def test_idwt(folder_of_graphs, opset, wavelet, levels) -> None:
    y = torch.randn(2, 5, 3 * 2**levels)
    got = run(folder_of_graphs, opset, lambda g, a: ops.idwt(g, a, levels, wavelet, 2.0), {"y": y.numpy()}, 3)
    wanted = wavelet_reference.idwt(y.double(), levels, wavelet, 2.0, "packet", True)
    np.testing.assert_allclose(got, wanted, atol=2e-5)


@OPSETS
def test_gelu_and_silu(folder_of_graphs, opset) -> None:
    x, gelu = torch.linspace(-8, 8, 101)[None], torch.nn.functional.gelu
    approximate = partial(gelu, approximate="tanh")
    for ours, theirs in ((ops.gelu, gelu), (ops.gelu_tanh, approximate), (ops.silu, torch.nn.functional.silu)):
        got = run(folder_of_graphs, opset, ours, {"x": x.numpy()}, 2)
        np.testing.assert_allclose(got, theirs(x.double()), atol=2e-6)
