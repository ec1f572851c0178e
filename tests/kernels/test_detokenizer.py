"""The decoder's ends against float64, the golden tokenizers and the layers they stand for; the kernels against both."""

import json
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kinetok.errors import UserError
from kinetok.kernels.detokenizer import conv, conv_idwt, fold_projection, fsq_conv, reference
from kinetok.kernels.fsq import fsq_decode
from kinetok.kernels.ops import DECOMPOSITIONS
from kinetok.kernels.wavelet import idwt
from kinetok.model.checkpoint import load_released_tokenizer

OPS = torch.ops.kinetok
LEVELS = (8, 6, 5)
CENTRED, CAUSAL, BLOCK = (1, 1), (2, 0), (0, 0)
Launcher = Callable[[str], ModuleType]
EPS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def draws(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def first_layers(outputs: int, taps: int = 3, inputs: int = 20) -> list[Tensor]:
    """Weight and bias of the convolution, weight and bias of project_out."""
    return draws((outputs, taps, inputs), (outputs,), (inputs, 3), (inputs,))


def exact_first(indices: Tensor, layers: list[Tensor], padding: tuple[int, int], dilation: int) -> Tensor:
    """The layers one after another in fp64, the convolution by torch's own."""
    weight, bias, project, shift = (t.double().to(indices.device) for t in layers)
    embedded = fsq_decode(indices, project, shift, LEVELS)
    x = F.pad(embedded, (0, 0, *padding)).transpose(1, 2)
    return F.relu(F.conv1d(x, weight.transpose(1, 2), bias, dilation=dilation)).transpose(1, 2)


def exact_last(x, weight, bias, scale, shift, levels: int, padding: tuple[int, int], dilation: int) -> Tensor:
    x, weight, bias = x.double(), weight.double(), bias.double()
    columns = F.pad(F.relu(x), (0, 0, *padding)).transpose(1, 2)
    y = F.conv1d(columns, weight.transpose(1, 2), bias, dilation=dilation)
    y = idwt(y, levels).transpose(1, 2)
    return y if scale is None else y * scale.double() + shift.double()


def tokens(*shape: int) -> Tensor:
    return torch.randint(240, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("padding", [CENTRED, CAUSAL, BLOCK], ids=str)
def test_the_definitions_are_the_layers(padding: tuple[int, int]) -> None:
    layers = [t.double() for t in first_layers(7)]
    table = fold_projection(layers[0], *layers[2:])
    indices = tokens(2, 9)
    exact = exact_first(indices, layers, padding, 1)
    torch.testing.assert_close(fsq_conv(indices, table, layers[1], LEVELS, padding), exact, atol=1e-12, rtol=0)
    weight, bias = layers[:2]
    plain = fold_projection(weight[..., :3], None, None)  # a code is as wide as there are levels: no projection
    unit, none = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    exact = exact_first(indices, [weight[..., :3], bias, unit, none], padding, 1)
    torch.testing.assert_close(fsq_conv(indices, plain, bias, LEVELS, padding), exact, atol=1e-12, rtol=0)
    x, weight, bias, scale, shift = (t.double() for t in draws((2, 9, 5), (12, 3, 5), (12,), (3,), (3,)))
    exact = exact_last(x, weight, bias, scale, shift, 2, padding, 1)
    got = conv_idwt(x, weight, bias, levels=2, padding=padding, scale=scale, shift=shift)
    torch.testing.assert_close(got, exact, atol=1e-12, rtol=0)


def test_blocks_of_a_stream_are_the_clip() -> None:
    """A block that brings the two tokens before it gives the clip's own numbers, to the bit for ``fsq_conv``."""
    layers = first_layers(7)
    table, indices = fold_projection(layers[0], *layers[2:]), tokens(1, 11)
    whole = fsq_conv(indices, table, layers[1], LEVELS, CAUSAL)
    x, weight, bias = draws((1, 11, 5), (12, 3, 5), (12,))
    frames = conv_idwt(x, weight, bias, levels=1, padding=CAUSAL)
    for start, end in ((0, 4), (4, 5), (5, 11)):
        before = min(start, 2)
        padding = (2 - before, 0)
        block = fsq_conv(indices[:, start - before : end], table, layers[1], LEVELS, padding)
        assert torch.equal(block, whole[:, start:end])
        block = conv_idwt(x[:, start - before : end], weight, bias, levels=1, padding=padding)
        torch.testing.assert_close(block, frames[:, 2 * start : 2 * end], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["tokenizer_p1", "tokenizer_p2", "tokenizer_p4", "tokenizer_causal_p2"])
def test_golden(launcher: Launcher, device: torch.device, golden, name: str) -> None:
    """The whole decoder with both kernels at its ends gives the golden frames."""
    kernels = launcher("detokenizer")
    z = np.load(golden(f"{name}.npz"))
    config = json.loads(str(z["config_json"]))
    model = load_released_tokenizer(golden(f"{name}.pth"), **config).to(device)
    at = f"T{min(config['lengths'])}_"
    indices = torch.from_numpy(z[at + "indices"]).to(device)
    first, last, project = model.decoder.first, model.decoder.last, model.project_out
    table = fold_projection(first.weight.detach(), project.weight.detach(), project.bias.detach())
    with torch.no_grad():
        x = kernels.fsq_conv(indices, table, first.bias, list(model.config.levels), list(first.padding), first.dilation)
        for stage in model.decoder.stages:
            x = stage(x)
        x = model.decoder.middle(x)
        frames = kernels.conv_idwt(
            x, last.weight, last.bias, None, None, model.wavelet_levels, list(last.padding), last.dilation
        )
    torch.testing.assert_close(frames.cpu(), torch.from_numpy(z[at + "decoded"]), atol=1e-4, rtol=0)


FIRST = [  # clips, tokens, outputs, taps, padding, dilation
    (2, 35, 40, 3, CENTRED, 1),
    (3, 11, 130, 3, CAUSAL, 1),
    (1, 9, 7, 5, (4, 0), 2),
    (2, 6, 16, 3, BLOCK, 1),
    (1, 1, 1, 1, BLOCK, 1),
]


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_kernel_of_the_first_layers(launcher: Launcher, device: torch.device, case: tuple, dtype: torch.dtype) -> None:
    clips, length, outputs, taps, padding, dilation = case
    layers = [t.to(device) for t in first_layers(outputs, taps)]
    table, bias = fold_projection(layers[0].double(), *(t.double() for t in layers[2:])).to(dtype), layers[1].to(dtype)
    indices = tokens(clips, length).to(device, torch.int32 if clips == 2 else torch.int64)
    out = launcher("detokenizer").fsq_conv(indices, table, bias, LEVELS, padding, dilation)
    exact = reference.fsq_conv(indices, table.double(), bias.double(), LEVELS, padding, dilation)
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), exact, atol=EPS[dtype], rtol=EPS[dtype])
    if dtype == torch.float32:
        torch.testing.assert_close(exact, exact_first(indices, layers, padding, dilation), atol=1e-4, rtol=1e-5)


LAST = [  # clips, frames, inputs, width, levels, taps, padding, dilation, with scale and shift
    (2, 41, 40, 70, 0, 3, CENTRED, 1, True),
    (1, 9, 33, 5, 1, 3, CAUSAL, 1, True),
    (2, 5, 8, 18, 2, 3, CENTRED, 1, True),
    (1, 3, 8, 3, 6, 3, CENTRED, 1, False),
    (1, 12, 5, 3, 1, 5, (4, 0), 2, False),
    (3, 4, 5, 3, 0, 3, BLOCK, 1, False),
]


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("case", LAST, ids=str)
def test_kernel_of_the_last_layers(launcher: Launcher, device: torch.device, case: tuple, dtype: torch.dtype) -> None:
    clips, frames, inputs, width, levels, taps, padding, dilation, affine = case
    outputs = width << levels
    shapes = (clips, frames, inputs), (outputs, taps, inputs), (outputs,), (width,), (width,)
    x, weight, bias, scale, shift = (t.to(device, dtype) for t in draws(*shapes))
    weight *= (taps * inputs) ** -0.5
    rest = (scale, shift) if affine else (None, None)
    out = launcher("detokenizer").conv_idwt(x, weight, bias, *rest, levels, padding, dilation)
    exact = exact_last(x, weight, bias, *rest, levels, padding, dilation)
    assert out.dtype == dtype and out.is_contiguous()
    size = 2 ** (levels / 2)
    torch.testing.assert_close(out.double(), exact, atol=EPS[dtype] * size, rtol=EPS[dtype])


def test_a_rows_bits_do_not_depend_on_the_others(launcher: Launcher, device: torch.device) -> None:
    kernels = launcher("detokenizer")
    layers = [t.to(device) for t in first_layers(20)]
    table, indices = fold_projection(layers[0], *layers[2:]), tokens(9, 15).to(device)
    for family in (kernels, reference):
        out = family.fsq_conv(indices, table, layers[1], LEVELS, CAUSAL, 1)
        for row in (0, 4, 8):
            assert torch.equal(family.fsq_conv(indices[row][None], table, layers[1], LEVELS, CAUSAL, 1)[0], out[row])
    x, weight, bias = (t.to(device) for t in draws((9, 15, 20), (24, 3, 20), (24,)))
    out = kernels.conv_idwt(x, weight, bias, None, None, 1, CENTRED, 1)
    for row in (0, 4, 8):
        assert torch.equal(kernels.conv_idwt(x[row][None], weight, bias, None, None, 1, CENTRED, 1)[0], out[row])


def test_kernels_take_strides_nothing_and_nan(launcher: Launcher, device: torch.device) -> None:
    kernels = launcher("detokenizer")
    layers = [t.to(device) for t in first_layers(20)]
    table, bias, indices = fold_projection(layers[0], *layers[2:]), layers[1], tokens(6, 8).to(device).T[:, 1::2]
    turned = table.transpose(1, 2).contiguous().transpose(1, 2)
    exact = reference.fsq_conv(indices, table, bias, LEVELS, CENTRED, 1)
    torch.testing.assert_close(kernels.fsq_conv(indices, turned, bias, LEVELS, CENTRED, 1), exact, atol=1e-5, rtol=0)
    bad = bias.clone()
    bad[3] = torch.nan
    out = kernels.fsq_conv(indices, table, bad, LEVELS, CENTRED, 1)
    assert out[..., 3].isnan().all() and out.isnan().sum() == out[..., 3].numel()
    assert kernels.fsq_conv(indices[:0], table, bias, LEVELS, CENTRED, 1).shape == (0, 3, 20)
    assert kernels.fsq_conv(indices[:, :2], table, bias, LEVELS, BLOCK, 1).shape == (8, 0, 20)
    x, weight, bias = (t.to(device) for t in draws((20, 7, 2), (6, 3, 20), (6,)))
    for frames in (x.permute(2, 1, 0), x.permute(2, 1, 0).contiguous()[:, ::2]):
        exact = exact_last(frames, weight, bias, None, None, 1, CENTRED, 1).float()
        out = kernels.conv_idwt(frames, weight, bias, None, None, 1, CENTRED, 1)
        torch.testing.assert_close(out, exact, atol=1e-4, rtol=0)
    frames = x.permute(2, 1, 0).clone()
    frames[1, 3, 5] = torch.nan
    out = kernels.conv_idwt(frames, weight, bias, None, None, 1, CENTRED, 1)
    assert out[1, 4:10].isnan().all() and out.isnan().sum() == out[1, 4:10].numel()
    assert kernels.conv_idwt(frames[:0], weight, bias, None, None, 1, CENTRED, 1).shape == (0, 14, 3)
    assert kernels.conv_idwt(frames[:, :2], weight, bias, None, None, 1, BLOCK, 1).shape == (2, 0, 3)


def test_ops_pass_opcheck() -> None:
    layers = first_layers(5)
    table = fold_projection(layers[0], *layers[2:])
    torch.library.opcheck(OPS.fsq_conv.default, (tokens(2, 7), table, layers[1], LEVELS, CAUSAL, 1))
    x, weight, bias, scale, shift = draws((2, 7, 4), (6, 3, 4), (6,), (3,), (3,))
    torch.library.opcheck(OPS.conv_idwt.default, (x, weight, bias, scale, shift, 1, CENTRED, 1))
    torch.library.opcheck(OPS.conv_idwt.default, (x, weight, bias, None, None, 0, BLOCK, 1))


class Ends(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for at, value in enumerate([*first_layers(20), *draws((6, 3, 20), (6,), (3,), (3,))]):
            self.register_buffer(f"part{at}", value)

    def forward(self, indices: Tensor) -> Tensor:
        weight, bias, project, project_bias, *last = self.buffers()
        x = fsq_conv(indices, fold_projection(weight, project, project_bias), bias, LEVELS, CAUSAL)
        weight, bias, scale, shift = last
        return conv_idwt(x, weight, bias, levels=1, padding=CAUSAL, scale=scale, shift=shift)


def test_compile_and_export_keep_the_ops() -> None:
    model, indices = Ends(), tokens(2, 7)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(indices), model(indices))
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}
    program = torch.export.export(model, (indices,), dynamic_shapes=(sizes,))
    names = [str(node.target) for node in program.graph.nodes]
    assert {"kinetok.fsq_conv.default", "kinetok.conv_idwt.default"} <= set(names)
    plain = program.run_decompositions(DECOMPOSITIONS)
    assert not any("kinetok" in str(node.target) for node in plain.graph.nodes)
    other = tokens(3, 4)
    torch.testing.assert_close(plain.module()(other), model(other))


def test_a_pointwise_convolution_is_one_product() -> None:
    x, weight, bias = draws((2, 5, 4), (3, 1, 4), (3,))
    torch.testing.assert_close(conv(x, weight, bias, BLOCK, 1), F.linear(x, weight[:, 0], bias))
    torch.testing.assert_close(conv(x, weight, bias, BLOCK, 1, stride=2), F.linear(x[:, ::2], weight[:, 0], bias))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda x: fsq_conv(x[0], torch.zeros(3, 4, 2), torch.zeros(2), LEVELS, CENTRED),
            "indices: expected int32 or int64",
        ),
        (
            lambda x: fsq_conv(x[..., 0].int(), torch.zeros(3, 3, 2), torch.zeros(2), LEVELS, CENTRED),
            r"\[taps, 4, out\]",
        ),
        (lambda x: fsq_conv(x[..., 0].int(), torch.zeros(3, 4, 2), torch.zeros(3), LEVELS, CENTRED), "bias"),
        (lambda x: fsq_conv(x[..., 0].int(), torch.zeros(3, 4, 2), torch.zeros(2), LEVELS, (1, -1)), "two paddings"),
        (lambda x: fsq_conv(x[..., 0].int(), torch.zeros(9, 4, 2), torch.zeros(2), LEVELS, BLOCK), "at least 8 frames"),
        (lambda x: conv_idwt(x, torch.zeros(4, 3, 5), torch.zeros(4), levels=0, padding=BLOCK), "weight"),
        (lambda x: conv_idwt(x, torch.zeros(6, 3, 4), torch.zeros(6), levels=2, padding=CENTRED), "levels"),
        (
            lambda x: conv_idwt(
                x, torch.zeros(6, 3, 4), torch.zeros(6), levels=1, padding=CENTRED, scale=torch.ones(3)
            ),
            "both scale",
        ),
    ],
)
def test_bad_arguments_are_named(call: Callable[[Tensor], Tensor], says: str) -> None:
    with pytest.raises(UserError, match=says):
        call(torch.zeros(2, 5, 4))
