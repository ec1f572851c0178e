"""Sampling against an independent scalar implementation, published vectors and the documented ones."""

import math
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.kernels import sampling
from kinetok.kernels.linear import linear, pack
from kinetok.kernels.sampling import (
    Draw,
    SamplingState,
    exp2_weight,
    greedy_step,
    guide,
    gumbel,
    log_fp32,
    philox,
    sample,
    sample_step,
)
from kinetok.kernels.sampling.arithmetic import EXP2, LN2_HIGH, LN2_LOW, LOG, LOG2_E

DOC = Path(__file__).parents[2] / "docs" / "numerics.md"
F = np.float32


def one(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def scalar_log(x: np.float32) -> np.float32:
    bits = int(np.array(x, dtype=F).view(np.int32))
    e = (bits - 0x3F3504F3) >> 23
    f = F(np.array(bits - (e << 23), dtype=np.int32).view(F)) - F(1)
    r = F(LOG[-1])
    for c in LOG[-2::-1]:
        r = F(F(r * f) + F(c))
    t = F(F(F(f * f) * r) + F(F(e) * F(LN2_LOW)))
    return F(F(f + t) + F(F(e) * F(LN2_HIGH)))


def scalar_gumbel(token: int, seed: int, position: int, request: int) -> np.float32:
    word = scalar_philox([position, request, token // 4, 0], [seed & 0xFFFFFFFF, seed >> 32])[token % 4]
    return -scalar_log(-scalar_log(F(F(F(word >> 9) + F(0.5)) * F(2.0**-23))))


def scalar_weight(x: np.float32) -> int:
    x = max(x, F(-40))
    whole = math.floor(x)
    f = F(x - F(whole))
    r = F(EXP2[-1])
    for c in EXP2[-2::-1]:
        r = F(F(r * f) + F(c))
    return math.floor(F(r * F(2.0 ** (whole + 24))))


def scalar_sample(logits, seed, position, request, temperature, top_k, top_p) -> int:
    s = [F(F(x) * F(1.0 / temperature)) for x in logits]
    keep = [x > -np.inf for x in s]
    if 0 < top_k < len(s):
        least = sorted(s, reverse=True)[top_k - 1]
        keep = [k and x >= least for k, x in zip(keep, s, strict=True)]
    if top_p < 1:
        best = max(x for x, k in zip(s, keep, strict=True) if k)
        w = [scalar_weight(F(F(x - best) * F(LOG2_E))) if k else 0 for x, k in zip(s, keep, strict=True)]
        needed = (sum(w) * max(1, round(top_p * 65536)) + 65535) >> 16
        total = 0
        for weight in sorted(w, reverse=True):
            total += weight
            if total >= needed:
                keep = [k and x >= weight for k, x in zip(keep, w, strict=True)]
                break
    scores = [
        F(x + scalar_gumbel(i, seed, position, request)) if k else -np.inf
        for i, (x, k) in enumerate(zip(s, keep, strict=True))
    ]
    return int(np.argmax(scores))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_vectors_of_random123(counter, key, words) -> None:
    assert philox(one(*counter), one(*key))[0].tolist() == words == scalar_philox(counter, key)


def test_log_is_accurate_and_bit_equal_to_the_scalar_one() -> None:
    near_one = 1 - 2.0 ** -torch.arange(1, 24)
    x = torch.cat((torch.rand(20_000, generator=torch.Generator().manual_seed(0)).clamp(min=2**-24), near_one.float()))
    exact = x.double().log()
    assert float(((log_fp32(x) - exact) / exact.abs().clamp(min=1e-30)).abs().max()) < 1.2e-7
    some = x[::97]
    assert [float(v) for v in log_fp32(some)] == [float(scalar_log(F(v))) for v in some.numpy()]


def test_weights_are_accurate_and_bit_equal_to_the_scalar_ones() -> None:
    x = -torch.rand(500, generator=torch.Generator().manual_seed(1)) * 45
    w = exp2_weight(x)
    assert w.tolist() == [scalar_weight(F(v)) for v in x.numpy()]
    exact = 2.0 ** x.clamp(min=-40).double() * 2**24
    assert float((w - exact).abs().max()) <= 3
    assert exp2_weight(torch.tensor([0.0, -torch.inf])).tolist() == [2**24, 0]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 511),
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([1.0, 0.9, 0.3]),
)
def test_sample_is_bit_equal_to_the_scalar_one(seed, position, request, count, temperature, top_k, top_p) -> None:
    logits = torch.randn(1, count, generator=torch.Generator().manual_seed(seed % 2**31)) * 3
    logits[0, :: max(2, count // 3)] = logits[0, 0]  # ties
    signed = seed - (seed >> 63 << 64)
    token = sample(
        logits,
        seed=torch.tensor([signed]),
        position=torch.tensor([position]),
        request=torch.tensor([request]),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    expected = scalar_sample(logits[0].numpy(), seed, position, request, temperature, top_k, top_p)
    assert int(token) == expected


def test_frequencies() -> None:
    p = torch.tensor([0.5, 0.25, 0.15, 0.1])
    n = 20_000
    rows, zero = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    counts = sample(p.log().expand(n, 4), seed=zero, position=rows, request=zero).bincount(minlength=4)
    chi_square = float(((counts - n * p) ** 2 / (n * p)).sum())
    assert chi_square < 16.3  # 99.9 % for three degrees of freedom
    kept = sample(p.log().expand(n, 4), seed=zero, position=rows, request=zero, top_p=0.7).bincount(minlength=4)
    assert kept[2:].sum() == 0 and kept[1] > 0


def test_a_draw_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(9, 101, generator=torch.Generator().manual_seed(2))
    names = dict(seed=torch.arange(9), position=torch.arange(9) * 3, request=torch.arange(9) % 2)
    together = sample(logits, **names, top_p=0.9, top_k=20)
    alone = [
        sample(logits[i : i + 1], **{k: v[i : i + 1] for k, v in names.items()}, top_p=0.9, top_k=20) for i in range(9)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_noise_of_several_positions_is_that_of_each() -> None:
    seed, request = one(2**63 - 5, 3)
    together = gumbel(1001, seed, torch.arange(7), request)
    assert torch.equal(together, torch.cat([gumbel(1001, seed, *one(at), request) for at in range(7)]))


def test_greedy_bans_and_bad_rows() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -torch.inf]])
    seed = position = request = torch.tensor([0])
    names = dict(seed=seed, position=position, request=request)
    assert int(sample(logits, **names, temperature=0)) == 1
    assert all(int(sample(logits, seed=torch.tensor([s]), position=position, request=request)) != 3 for s in range(50))
    for bad in (torch.nan, -torch.inf):
        with pytest.raises(ValueError, match="finite"):
            sample(torch.full((1, 4), bad), **names)


def test_guidance_rounds_each_operation() -> None:
    c, u = torch.randn(1, 50), torch.randn(1, 50)
    expected = [F(b + F(F(a - b) * F(2.5))) for a, b in zip(c[0].numpy(), u[0].numpy(), strict=True)]
    assert guide(c, u, 2.5)[0].tolist() == [float(v) for v in expected]


def test_vectors_in_the_document() -> None:
    rows = re.findall(r"\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| 0x([0-9a-f]{8}) \|", DOC.read_text(encoding="utf-8"))
    assert len(rows) >= 6
    for seed, position, request, token, bits in rows:
        seed_ = int(seed) - (int(seed) >> 63 << 64)
        noise = gumbel(int(token) + 1, *one(seed_, int(position), int(request)))[0, -1]
        assert f"{int(noise.view(torch.int32)) & 0xFFFFFFFF:08x}" == bits
        assert float(scalar_gumbel(int(token), int(seed), int(position), int(request))) == float(noise)


HELD, RUNNING = 4, 0
STATE = [field.name for field in fields(SamplingState)]


def names_of(state: SamplingState) -> dict[str, torch.Tensor]:
    return {name: getattr(state, name).clone() for name in STATE}


def sampled(kernels, logits, state: SamplingState, end: int, pad: int = -1, empty=None) -> torch.Tensor:
    return kernels.sample_step(logits, empty, **{name: getattr(state, name) for name in STATE}, end_id=end, pad_id=pad)


DRAWS = [
    Draw(most=9, seed=1),
    Draw(most=9, seed=2**64 - 1, request=2**32 - 1, temperature=0.7),
    Draw(most=9, seed=3, top_k=3),
    Draw(most=9, seed=4, top_p=0.5, temperature=1.3),
    Draw(most=9, seed=5, top_k=20, top_p=0.9),
    Draw(most=9, temperature=0),
    Draw(most=9, seed=6, top_p=1e-4),
    Draw(most=9, seed=7, top_k=10**6),
]


def logits_of(classes: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(len(DRAWS), classes, generator=generator) * 4
    if kind == "ties":
        return logits.round() * torch.tensor([1.0, 0.0, -0.0])[torch.randint(3, logits.shape, generator=generator)]
    if kind == "one":
        alone = torch.full_like(logits, -torch.inf)
        alone[:, classes // 2] = logits[:, 0]
        return alone
    return logits


@pytest.mark.parametrize(
    ("classes", "kind"),
    [(5, "random"), (5, "ties"), (5, "one"), (1001, "random"), (1001, "ties"), (4097, "random"), (4097, "one")],
)
def test_steps_are_the_tokens_of_single_draws(launcher, device, classes: int, kind: str) -> None:
    kernels = launcher("sampling")
    logits = logits_of(classes, kind)
    wanted = [
        sample(
            logits[row : row + 1],
            seed=torch.tensor([draw.seed - (draw.seed >> 63 << 64)]),
            position=torch.tensor([0]),
            request=torch.tensor([draw.request]),
            temperature=draw.temperature,
            top_k=draw.top_k,
            top_p=draw.top_p,
        )
        for row, draw in enumerate(DRAWS)
    ]
    state = SamplingState.start(DRAWS)
    assert torch.equal(sample_step(logits, state, end_id=-1), torch.cat(wanted))
    state = SamplingState.start(DRAWS, device)
    assert torch.equal(sampled(kernels, logits.to(device), state, -1).cpu(), torch.cat(wanted))


def test_steps_with_guidance_bans_and_ends(launcher, device) -> None:
    kernels = launcher("sampling")
    draws = [replace(draw, least=1, most=2, guidance=(1.0, 2.5)[row % 2]) for row, draw in enumerate(DRAWS[1:6])]
    mine, theirs = SamplingState.start(draws, device), SamplingState.start(draws)
    ended = full = 0
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        logits, empty = (torch.randn(len(draws), 7, generator=generator).bfloat16() * 2 for _ in range(2))
        logits[:, 5] += 1.5  # the end, likely
        logits[:, 6] = 90  # a pad row, which nobody may draw
        wanted = sample_step(logits, theirs, end_id=5, pad_id=6, empty=empty)
        wide = logits.to(device).repeat(1, 2)[:, :7]  # a stride that is not its width
        assert torch.equal(sampled(kernels, wide, mine, 5, 6, empty.to(device)).cpu(), wanted)
        for name in STATE:
            assert torch.equal(getattr(mine, name).cpu(), getattr(theirs, name)), name
        assert (wanted < 6).all() and (step >= 1 or (wanted != 5).all())
        ended, full = int((theirs.status == 1).sum()), int((theirs.status == 2).sum())
    assert ended and full and ended + full == len(draws) and (wanted == 5).all()
    assert torch.equal(theirs.position + theirs.remaining, torch.full((len(draws),), 2))


def test_rows_without_numbers_fail_alone(launcher, device) -> None:
    kernels = launcher("sampling")
    draws = [Draw(most=3, top_p=0.9)] * 4 + [Draw(most=3, temperature=0)] * 2
    logits = torch.randn(6, 9)
    logits[0, 3], logits[1], logits[2, 8], logits[4, 1] = torch.nan, -torch.inf, torch.inf, torch.nan
    mine, theirs = SamplingState.start(draws, device), SamplingState.start(draws)
    wanted = sample_step(logits, theirs, end_id=4)
    assert torch.equal(sampled(kernels, logits.to(device), mine, 4).cpu(), wanted)
    assert theirs.status[[0, 1, 2, 4]].tolist() == [3] * 4 and wanted[[0, 1, 2, 4]].tolist() == [4] * 4
    assert torch.equal(mine.status.cpu(), theirs.status) and torch.equal(mine.position.cpu(), theirs.position)


@pytest.mark.parametrize("route", ["definition", "kernel"])
def test_rows_are_put_anew_and_held(launcher, device, route: str) -> None:
    kernels = launcher("sampling") if route == "kernel" else sampling.reference
    device = device if route == "kernel" else torch.device("cpu")
    logits = logits_of(11, "random")[:3].to(device)
    state, fresh = (SamplingState.start(DRAWS[:3], device) for _ in range(2))
    tokens = [sampled(kernels, logits, state, -1) for _ in range(2)]
    state.put(1, DRAWS[1], 0)
    state.put(2, replace(DRAWS[2], least=2), 1)
    state.status[0].fill_(HELD)
    before = names_of(state)
    again = sampled(kernels, logits, state, -1)
    assert again.tolist() == [-1, int(tokens[0][1]), int(tokens[1][2])]
    assert state.position.tolist() == [2, 1, 2] and state.remaining.tolist() == [7, 8, 7]
    assert all(torch.equal(getattr(state, name)[0], before[name][0]) for name in STATE)
    state.status[0].fill_(RUNNING)
    third = sampled(kernels, logits, state, -1)[0]
    for _ in range(3):
        wanted = sampled(kernels, logits, fresh, -1)[0]
    assert third == wanted
    part = state.rows(slice(1, 2))
    sampled(kernels, logits[1:2], part, -1)
    assert state.position.tolist() == [3, 3, 3]  # rows are views
    with pytest.raises(UserError, match="at least one token"):
        state.put(0, DRAWS[0], 9)


@pytest.mark.parametrize("route", ["definition", "kernel"])
def test_a_row_is_drawn_alike_among_256(launcher, device, route: str) -> None:
    kernels = launcher("sampling") if route == "kernel" else sampling.reference
    device = device if route == "kernel" else torch.device("cpu")
    draws = [Draw(most=9, seed=row, temperature=row % 2) for row in range(257)]  # quick ones under the interpreter
    for row, draw in zip((0, 100, 255, 256), (DRAWS[1], DRAWS[3], DRAWS[4], DRAWS[5]), strict=True):
        draws[row] = draw
    logits = torch.randn(257, 101, generator=torch.Generator().manual_seed(0)).to(device) * 4
    crowd = sampled(kernels, logits, SamplingState.start(draws, device), -1)
    for row in (0, 100, 255, 256):
        alone = sampled(kernels, logits[row : row + 1], SamplingState.start(draws[row : row + 1], device), -1)
        assert torch.equal(crowd[row : row + 1], alone)


@pytest.mark.parametrize("route", ["definition", "kernel"])
def test_a_row_is_greedy_alike_among_256(launcher, device, route: str) -> None:
    kernels = launcher("sampling") if route == "kernel" else sampling.reference
    device = device if route == "kernel" else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    head = pack(torch.randn(130, 40, generator=generator), "fp32").to(device)
    x = torch.randn(257, 40, generator=generator).to(device)
    fixed = head.data, head.scale, head.counters, head.kind, head.group, head.rows

    def step(rows: slice) -> torch.Tensor:
        state = SamplingState.start([Draw(most=2)] * 257, device)
        live = (getattr(state, name)[rows] for name in ("position", "least", "remaining", "status"))
        return kernels.greedy_step(x[rows], *fixed, 1e-5, *live, -1, -1)

    crowd = step(slice(None))  # four tiles of 64 and one row in another launch
    assert crowd.unique().numel() > 20
    for row in (0, 17, 100, 255, 256):
        assert torch.equal(step(slice(row, row + 1)), crowd[row : row + 1])


def test_steps_of_no_rows(launcher, device) -> None:
    head = pack(torch.randn(5, 8), "fp32").to(device)
    none = SamplingState.start([], device)
    kernels = launcher("sampling")
    for family in (kernels, sampling.reference):
        assert sampled(family, torch.empty(0, 5, device=device), none, -1).shape == (0,)
        live = none.position, none.least, none.remaining, none.status
        fixed = head.data, head.scale, head.counters, head.kind, head.group, head.rows
        assert family.greedy_step(torch.empty(0, 8, device=device), *fixed, None, *live, -1, -1).shape == (0,)


@pytest.mark.parametrize(("kind", "columns"), [("fp32", 40), ("int8", 1100)])
def test_greedy_steps_are_the_arg_max_of_the_head(launcher, device, kind: str, columns: int) -> None:
    kernels = launcher("sampling")
    weight = torch.randn(70, columns, generator=torch.Generator().manual_seed(1))
    weight[66] = weight[3] = weight[20]  # equals, in two tiles
    head = pack(weight, kind).to(device)
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    x = torch.randn(6, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[0] = 3 * weight[3]
    x[1], x[2] = 3 * weight[9], 3 * weight[68]  # the end and the pad row would win
    x[4, 5] = torch.nan
    draws = [Draw(most=2, least=1)] * 5 + [Draw(most=1)]
    mine, theirs = SamplingState.start(draws, device), SamplingState.start(draws)
    fixed = head.data, head.scale, head.counters, head.kind, head.group, head.rows
    for step in range(2):
        wanted = greedy_step(x, head.to(torch.device("cpu")), theirs, end_id=9, pad_id=68, eps=1e-5)
        live = mine.position, mine.least, mine.remaining, mine.status
        assert torch.equal(kernels.greedy_step(x.to(device), *fixed, 1e-5, *live, 9, 68).cpu(), wanted)
        assert torch.equal(mine.status.cpu(), theirs.status) and torch.equal(mine.position.cpu(), theirs.position)
        assert wanted[0] == 3 and (wanted[1] == 9) == (step == 1) and wanted[2] != 68
    assert theirs.status.tolist() == [2, 1, 2, 2, 3, 2] and not head.counters.any()
    logits = linear(x, head.to(torch.device("cpu")), eps=1e-5, wide=True)
    logits[:, [9, 68]] = -torch.inf
    assert int(logits[3].argmax()) == int(wanted[3])


@pytest.mark.parametrize("guided", [False, True])
def test_operators_are_sound(guided: bool) -> None:
    state = SamplingState.start(DRAWS[:3])
    logits = torch.randn(3, 11)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.kinetok.sample_step.default,
        (logits, logits.flip(1) if guided else None, *names_of(state).values(), 4, -1),
        test_utils=checks,
    )
    head = pack(torch.randn(11, 8), "int8")
    live = (state.position, state.least, state.remaining, state.status)
    fixed = head.data, head.scale, head.counters, "int8", 0, 11
    torch.library.opcheck(
        torch.ops.kinetok.greedy_step.default, (torch.randn(3, 8), *fixed, 1e-5, *live, 4, -1), test_utils=checks
    )


def test_compile_and_export_keep_the_operators() -> None:
    head = pack(torch.randn(11, 8), "fp32")

    class Step(torch.nn.Module):
        def forward(self, x: torch.Tensor, names: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            state = SamplingState(**names)
            token = sample_step(linear(x, head), state, end_id=4)
            return token, greedy_step(x, head, state, end_id=4)

    x, module = torch.randn(3, 8), Step()
    wanted = module(x, names_of(SamplingState.start(DRAWS[:3])))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    names = names_of(SamplingState.start(DRAWS[:3]))
    assert all(torch.equal(a, b) for a, b in zip(compiled(x, names), wanted, strict=True))
    assert names["position"].sum() > 0
    program = torch.export.export(module, (x, names_of(SamplingState.start(DRAWS[:3]))))
    targets = {node.target for node in program.graph.nodes}
    assert {torch.ops.kinetok.sample_step.default, torch.ops.kinetok.greedy_step.default} <= targets
    got = program.module()(x, names_of(SamplingState.start(DRAWS[:3])))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="at least one token"):
        SamplingState.start([Draw(most=0)])
    state = SamplingState.start([Draw(most=1)])
    with pytest.raises(UserError, match=r"logits \[1, V\]"):
        sample_step(torch.zeros(2, 4), state, end_id=3)
    with pytest.raises(UserError, match="empty"):
        sample_step(torch.zeros(1, 4), state, end_id=3, empty=torch.zeros(1, 5))
    with pytest.raises(UserError, match="unpaired"):
        greedy_step(torch.zeros(1, 4), pack(torch.ones(4, 4), "fp32", paired=True), state, end_id=3)
    with pytest.raises(UserError, match="bfloat16"):
        greedy_step(torch.zeros(1, 4), pack(torch.ones(4, 4), "bf16"), state, end_id=3)


@pytest.mark.parametrize("peak", [0.0, 1.0, 6.0])  # even: the likely ones do not hold the share; then they do
@pytest.mark.parametrize("top_p", [1e-4, 0.3, 0.95, 0.99999])
def test_the_shortcut_of_top_p_changes_nothing(monkeypatch, peak: float, top_p: float) -> None:
    torch.manual_seed(3)
    logits = torch.randn(4, 300).mul(peak).round(decimals=1)  # rounded: many tie
    logits[0, 7:] = -torch.inf
    names = {name: torch.arange(4) + number for number, name in enumerate(("seed", "position", "request"))}
    wanted = sampling.reference.sample(logits, **names, top_p=top_p)
    for likely in (1, 9, 299):
        monkeypatch.setattr(sampling.reference, "LIKELY", likely)
        assert torch.equal(sampling.reference.sample(logits, **names, top_p=top_p), wanted)
