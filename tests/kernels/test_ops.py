"""What holds for every operator: inputs that do not fit are a ``UserError``, and its decomposition leaves aten alone."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.kernels import (
    attention,
    cross_entropy,
    detokenizer,
    fsq,
    gating,
    kinematics,
    linear,
    norm,
    rotary,
    sampling,
    wavelet,
)
from kinetok.kernels.ops import DECOMPOSITIONS

OPS = torch.ops.kinetok
LEVELS = (8, 6, 5)
FLOAT8 = torch.float8_e4m3fn
HEAD, PAIRED = linear.pack(torch.ones(10, 6), "fp32"), linear.pack(torch.ones(10, 6), "int8", paired=True)


def ids(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int64)


def numbers(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, max(1, torch.Size(shape).numel())).reshape(shape)


def state() -> sampling.SamplingState:
    return sampling.SamplingState.start([sampling.Draw(most=5)] * 2)


def table(positions: int) -> Tensor:
    return rotary.rotary_table(positions, 8)[None]


def caches(kind: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return numbers(2, 2, 4, 8).to(kind), numbers(2, 2, 4, 8).to(kind)


Case = tuple[Callable[..., object], tuple[Tensor, ...]]
PUBLIC: dict[str, Case] = {
    "fsq_encode": (lambda *x: fsq.fsq_encode(*x, LEVELS), (numbers(2, 4), numbers(3, 4), numbers(3))),
    "fsq_encode alone": (lambda x: fsq.fsq_encode(x, None, None, LEVELS), (numbers(2, 3),)),
    "fsq_decode": (lambda *x: fsq.fsq_decode(*x, LEVELS), (ids(2), numbers(4, 3), numbers(4))),
    "fsq_quantize": (lambda x: fsq.fsq_quantize(x, LEVELS), (numbers(2, 3),)),
    "fsq_dequantize": (lambda x: fsq.fsq_dequantize(x, LEVELS), (ids(2),)),
    "dwt": (lambda x: wavelet.dwt(x, 2), (numbers(2, 3, 8),)),
    "idwt": (lambda x: wavelet.idwt(x, 2), (numbers(2, 8, 3),)),
    "rms_norm": (norm.rms_norm, (numbers(2, 6), numbers(6))),
    "add_rms_norm": (norm.add_rms_norm, (numbers(2, 6), numbers(2, 6), numbers(6))),
    "swiglu": (gating.swiglu, (numbers(2, 6),)),
    "apply_rotary": (rotary.apply_rotary, (numbers(2, 3, 2, 8), table(3))),
    "rotary_kv_write": (rotary.rotary_kv_write, (numbers(2, 1, 3, 2, 8), table(1), ids(2), *caches())),
    "rotary_kv_write float8": (
        rotary.rotary_kv_write,
        (numbers(2, 1, 3, 2, 8), table(1), ids(2), *caches(FLOAT8), torch.ones(2, 2, 2)),
    ),
    "prefix_attention": (attention.prefix_attention, (*(numbers(2, 5, 2, 8) for _ in range(3)), ids(2), ids(2) * 4)),
    "decode_attention": (attention.decode_attention, (numbers(2, 2, 8), *caches(), ids(2))),
    "decode_attention float8": (
        attention.decode_attention,
        (numbers(2, 2, 8), *caches(FLOAT8), ids(2), torch.ones(2, 2, 2)),
    ),
    "linear_cross_entropy": (cross_entropy.linear_cross_entropy, (numbers(5, 6), numbers(11, 6), ids(5))),
    "fsq_conv": (lambda *x: detokenizer.fsq_conv(*x, LEVELS, (1, 1)), (ids(2, 4), numbers(3, 4, 7), numbers(7))),
    "conv_idwt": (
        lambda x, w, b, s, t: detokenizer.conv_idwt(x, w, b, levels=1, padding=(1, 1), scale=s, shift=t),
        (numbers(2, 4, 5), numbers(6, 3, 5), numbers(6), numbers(3), numbers(3)),
    ),
    "pose_from_features": (
        lambda *x: kinematics.pose_from_features(*x, [-1, 0, 1]),
        (numbers(2, 4, 44), numbers(3, 3)),
    ),
    "linear": (lambda x, r: linear.linear(x, HEAD, eps=1e-5, residual=r), (numbers(2, 6), numbers(2, 10))),
    "linear swiglu": (lambda x, r: linear.linear(x, PAIRED, residual=r, swiglu=True), (numbers(2, 6), numbers(2, 5))),
    "pack": (lambda w, s: linear.pack(w, "int4", group=64, norm_scale=s), (numbers(8, 130), numbers(130))),
    "sample_step": (lambda x, e: sampling.sample_step(x, state(), end_id=3, empty=e), (numbers(2, 9), numbers(2, 9))),
    "greedy_step": (lambda x: sampling.greedy_step(x, HEAD, state(), end_id=3), (numbers(2, 6),)),
}


def spoilt(x: Tensor) -> Iterator[Tensor]:
    """``x`` in other shapes, dtypes and places."""
    wide = x.float()
    yield from (
        z.to(x.dtype) for z in (wide[None], wide[0], wide.new_zeros(()), wide[:0], wide.repeat(2, *[1] * (x.ndim - 1)))
    )
    yield torch.cat((wide, wide[..., :1]), -1).to(x.dtype)
    yield from (wide.to(dtype) for dtype in (torch.int64, torch.float16, torch.float64, torch.bool, torch.complex64))
    yield x.to("meta")


@pytest.mark.parametrize("name", PUBLIC)
def test_inputs_that_do_not_fit_are_one_line(name: str) -> None:
    call, args = PUBLIC[name]
    call(*args)
    for at, given in enumerate(args):
        for other in spoilt(given):
            try:
                call(*args[:at], other, *args[at + 1 :])
            except UserError as error:
                assert "\n" not in str(error) and "got" in str(error)


@pytest.mark.parametrize("name", [name for name, (_, args) in PUBLIC.items() if len(args) > 1])
def test_two_devices_are_refused(name: str) -> None:
    call, args = PUBLIC[name]
    for at, given in enumerate(args):
        with pytest.raises(UserError, match="one device"):
            call(*args[:at], given.to("meta"), *args[at + 1 :])


@pytest.mark.parametrize("name", PUBLIC)
def test_other_numbers_are_refused(name: str) -> None:
    call, args = PUBLIC[name]
    for at, given in enumerate(args):
        for dtype in (torch.complex64, torch.bool):
            with pytest.raises(UserError, match="expected"):
                call(*args[:at], given.float().to(dtype), *args[at + 1 :])


def test_two_caches_of_two_sizes_are_refused() -> None:
    """The kernels take the capacity from the keys: a shorter slab of values would be written beyond its end."""
    keys, values = caches()
    short = values[:, :, :2].contiguous()
    with pytest.raises(UserError, match="one size and dtype"):
        rotary.rotary_kv_write(numbers(2, 1, 3, 2, 8), table(1), ids(2), keys, short)
    with pytest.raises(UserError, match="one size and dtype"):
        attention.decode_attention(numbers(2, 2, 8), keys, short, ids(2))


def rows_of(count: int) -> Tensor:
    return numbers(2, count, 2, 8)


GRADIENTS: dict[str, Case] = {
    "fsq_quantize_backward": (lambda g, z: OPS.fsq_quantize_backward(g, z, LEVELS), (numbers(2, 3), numbers(2, 3))),
    "rms_norm_backward": (
        lambda g, x, s: OPS.rms_norm_backward(g, g, x, s, 1e-5),
        (numbers(2, 6), numbers(2, 6), numbers(6)),
    ),
    "swiglu_backward": (OPS.swiglu_backward, (numbers(2, 3), numbers(2, 6))),
    "apply_rotary_backward": (OPS.apply_rotary_backward, (rows_of(3), table(3))),
    "prefix_attention_backward": (
        OPS.prefix_attention_backward,
        (*(rows_of(5) for _ in range(4)), ids(2), ids(2) * 4, rows_of(5), numbers(2, 2, 5)),
    ),
}


class Call(torch.nn.Module):
    def __init__(self, call: Callable[..., object]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *args: Tensor) -> object:
        return self.call(*args)


def test_every_operator_decomposes_to_aten() -> None:
    """All but those that write into their arguments, which torch functionalises before it looks at the table."""
    writers = {op for op in DECOMPOSITIONS if op._schema.is_mutable}
    seen = set(writers)
    for name, (call, args) in {**PUBLIC, **GRADIENTS}.items():
        if "float8" in name or name in ("pack", *(op._schema.name.removeprefix("kinetok::") for op in writers)):
            continue
        program = torch.export.export(Call(call), args)
        mine = {node.target for node in program.graph.nodes} & set(DECOMPOSITIONS)
        assert mine, name
        seen |= mine
        plain = program.run_decompositions(DECOMPOSITIONS)
        left = {str(node.target) for node in plain.graph.nodes if node.op == "call_function"}
        assert all(target.startswith(("aten.", "<built-in function getitem>")) for target in left), (name, left)
        torch.testing.assert_close(plain.module()(*args), call(*args), atol=1e-5, rtol=1e-5)
    assert seen == set(DECOMPOSITIONS)
