"""Fused linear cross-entropy against autograd in float64, on few of the logits at a time."""

import pytest
import torch
from torch.nn import functional as F

from kinetok.errors import UserError
from kinetok.kernels.cross_entropy import chunks, linear_cross_entropy, reference
from kinetok.kernels.ops import DECOMPOSITIONS

IGNORED = -100
OP = torch.ops.kinetok.linear_cross_entropy_sum.default


def inputs(rows, classes, width=8, dtype=torch.float32, device="cpu", scale=1.0, ignored=3):
    """hidden, weight and targets; every ``ignored``-th target does not count (0: all count)."""
    torch.manual_seed(0)
    hidden = (torch.randn(rows, width) * scale).to(device, dtype)
    weight = torch.randn(classes, width).to(device, dtype)
    targets = torch.randint(classes, (rows,))
    if ignored:
        targets[::ignored] = IGNORED
    return hidden, weight, targets.to(device)


def exact(hidden, weight, targets):
    """Sum of the losses and its gradients by autograd in float64."""
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    total = F.cross_entropy(h @ w.T, targets, ignore_index=IGNORED, reduction="sum")
    return total.detach(), *torch.autograd.grad(total, (h, w))


def close(got, wanted, tolerance):
    assert got.shape == wanted.shape and got.isfinite().all()
    error = (got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-12)
    assert error <= tolerance, error


@pytest.mark.parametrize("rows", [1, 9, 25, 300])
@pytest.mark.parametrize("classes", [1, 33, 1001])
def test_value_and_gradients_against_float64(rows, classes):
    hidden, weight, targets = inputs(rows, classes)
    targets[-1] = classes - 1  # at least one counts
    total, grad_hidden, grad_weight = exact(hidden, weight, targets)
    count = int((targets != IGNORED).sum())
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(h, w, targets)
    assert loss.dtype == torch.float32 and loss.shape == ()
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), total / count, rtol=1e-5, atol=1e-6)
    for got, wanted in ((h.grad, grad_hidden), (w.grad, grad_weight)):
        torch.testing.assert_close(got.double(), wanted / count, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(h, w, targets), loss.detach())
    torch.testing.assert_close(reference.linear_cross_entropy(h, w, targets), loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "classes"), [(1, 5), (13, 4097), (5, 9001), (0, 7)])
def test_kernel_against_float64(launcher, device, rows, classes, dtype):
    hidden, weight, targets = inputs(rows, classes, 16, dtype, device, ignored=4 if rows > 1 else 0)
    kernels = launcher("cross_entropy")
    total, count, grad_hidden, grad_weight = kernels.linear_cross_entropy_sum(hidden, weight, targets, IGNORED, True)
    wanted = exact(hidden, weight, targets)
    # The logits themselves are rounded to dtype, and a logit of 10 to 0.04 in bf16.
    tolerance = max(8 * torch.finfo(dtype).eps, 1e-5)
    assert count == (targets != IGNORED).sum()
    for got, want in zip((total, grad_hidden, grad_weight), wanted, strict=True):
        close(got, want, tolerance)
    alone, *_, nothing, none = kernels.linear_cross_entropy_sum(hidden, weight, targets, IGNORED, False)
    assert torch.equal(alone, total) and nothing.numel() == none.numel() == 0


def test_kernel_reads_strides(launcher, device):
    hidden, weight, targets = inputs(26, 33, 16, device=device)
    wide = torch.stack((hidden, hidden), dim=2)[..., 0], weight.T.contiguous().T, targets.repeat_interleave(2)[::2]
    kernels = launcher("cross_entropy")
    got = kernels.linear_cross_entropy_sum(*wide, IGNORED, True)
    for mine, wanted in zip(got, kernels.linear_cross_entropy_sum(hidden, weight, targets, IGNORED, True), strict=True):
        close(mine, wanted, 1e-6)


def test_kernel_on_extreme_logits(launcher, device):
    targets = torch.tensor([0, 5, 5, 4999], device=device)
    logits = torch.zeros(4, 5000, device=device)
    logits[0, 0], logits[1, 4], logits[2, 4], logits[3] = 3e4, 3e4, -torch.inf, -3e4
    wanted = F.cross_entropy(logits.double(), targets, reduction="none")
    change = logits.double().softmax(1) - F.one_hot(targets, 5000)
    losses = launcher("cross_entropy").softmax(logits, targets, True)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits.double(), change, rtol=1e-4, atol=1e-6)
    logits = torch.zeros(2, 64, device=device)
    logits[0, 3] = torch.nan
    losses = launcher("cross_entropy").softmax(logits, torch.zeros(2, dtype=torch.int64, device=device), False)
    assert losses.isnan().tolist() == [True, False]  # never hidden, never spread


@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_small_and_large_activations(scale):
    hidden, weight, targets = inputs(40, 50, scale=scale)
    total, count, *gradients = chunks.linear_cross_entropy_sum(hidden, weight, targets, IGNORED, True)
    wanted = exact(hidden, weight, targets)
    for got, want in zip((total, *gradients), wanted, strict=True):
        close(got, want, 1e-5)
    assert count == (targets != IGNORED).sum()


def test_rows_that_do_not_count_are_not_read():
    hidden, weight, targets = inputs(30, 20)
    spoilt = torch.where((targets == IGNORED)[:, None], torch.nan, hidden).requires_grad_()
    loss = linear_cross_entropy(spoilt, weight, targets)
    loss.backward()
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, targets))
    assert spoilt.grad.isfinite().all() and not spoilt.grad[targets == IGNORED].any()


def test_nothing_counts():
    hidden, weight, _ = inputs(4, 6)
    for rows in (4, 0):
        nothing = torch.full((rows,), IGNORED)
        assert linear_cross_entropy(hidden[:rows], weight, nothing).isnan()
        assert F.cross_entropy(hidden[:rows] @ weight.T, nothing).isnan()  # as torch has it


@pytest.mark.parametrize("rows", [*range(1, 40), 1279, 1280, 5000, 10**6])
def test_a_chunk_is_at_most_a_tenth(rows):
    chunk = chunks.chunk_rows(rows)
    assert 1 <= chunk <= max(rows / 10, 1) and chunk <= chunks.MOST
    if rows >= 1280:
        assert chunk % 128 == 0


def peak_bytes(call) -> int:
    """The most bytes that torch had allocated at once during ``call`` beyond those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del result
    return peak


def test_a_tenth_of_the_logits_is_alive_at_once():
    hidden, weight, targets = inputs(1500, 4000, ignored=0)
    logits = 4 * 1500 * 4000
    results = hidden.nbytes + weight.nbytes
    fused = peak_bytes(
        lambda: linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets).backward()
    )
    # Twice: the saved gradients and those handed on. A copy of hidden holds the rows that count.
    assert fused <= 0.1 * logits + 2 * results + hidden.nbytes + 1e6
    plain = peak_bytes(lambda: reference.linear_cross_entropy(hidden, weight, targets).backward())
    assert plain >= 2 * logits  # the measure sees what the fused route does without


def test_operator_is_sound():
    hidden, weight, targets = inputs(12, 7)
    for with_gradients in (False, True):
        torch.library.opcheck(OP, (hidden, weight, targets, IGNORED, with_gradients))
    torch.library.opcheck(OP, (hidden.requires_grad_(), weight.requires_grad_(), targets, IGNORED, True))


def test_gradients_are_those_of_finite_differences():
    hidden, weight, targets = inputs(12, 7, 3, torch.float64)
    arguments = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets), arguments)
    assert torch.autograd.gradcheck(lambda h: linear_cross_entropy(h, weight.detach(), targets), arguments[:1])
    loss = linear_cross_entropy(*arguments, targets)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), weight)


def test_compile_and_export_keep_the_operator():
    class Loss(torch.nn.Module):
        def forward(self, h, w, t):
            return linear_cross_entropy(h, w, t)

    hidden, weight, targets = inputs(12, 7)
    wanted = linear_cross_entropy(hidden, weight, targets)
    compiled = torch.compile(Loss(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, weight, targets), wanted)
    h = hidden.clone().requires_grad_()
    compiled(h, weight, targets).backward()
    h2 = hidden.clone().requires_grad_()
    linear_cross_entropy(h2, weight, targets).backward()
    torch.testing.assert_close(h.grad, h2.grad)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Loss(), (hidden, weight, targets), dynamic_shapes=({0: rows}, None, {0: rows}))
    assert OP in {node.target for node in program.graph.nodes}
    lowered = program.run_decompositions(DECOMPOSITIONS)
    assert not any("kinetok" in str(node.target) for node in lowered.graph.nodes)
    more = inputs(21, 7)
    torch.testing.assert_close(lowered.module()(*more), linear_cross_entropy(*more))


def test_the_decomposition_is_the_operator():
    arguments = inputs(26, 9)
    for with_gradients in (False, True):
        for got, wanted in zip(
            DECOMPOSITIONS[OP](*arguments, IGNORED, with_gradients),
            OP(*arguments, IGNORED, with_gradients),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted)


def test_leading_axes_and_autocast():
    hidden, weight, targets = inputs(12, 7)
    flat = linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(linear_cross_entropy(hidden.unflatten(0, (3, 4)), weight, targets.unflatten(0, (3, 4))), flat)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(rounded, linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets))


def test_bad_input_is_refused():
    hidden, weight, targets = inputs(4, 6)
    for bad in (
        (hidden, weight[:, :3], targets),
        (hidden, weight, targets[:3]),
        (hidden, weight[0], targets),
        (hidden, weight.half(), targets),
        (hidden, weight, targets.int()),
        (hidden, weight, targets + 6),
        (hidden, weight, targets.clamp(max=-2)),
    ):
        with pytest.raises(UserError, match="expected"):
            linear_cross_entropy(*bad)
