"""Steps that draw on the device and are read late: the host's tokens, and who waits for whom."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kinetok.model.config import DecoderConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.runtime import SamplingParams
from kinetok.runtime.backends import DrawingBackend
from kinetok.runtime.backends.fused import Drawn, FusedBackend
from kinetok.runtime.character import Job
from kinetok.runtime.scheduler import Scheduler

PLAIN = SamplingParams(temperature=1.0, top_k=0, top_p=0.9, guidance=1.0)


@pytest.fixture(scope="module")
def decoder() -> MotionDecoder:
    torch.manual_seed(3)
    return MotionDecoder(DecoderConfig(n_layer=2, n_head=2, n_embd=32, codebook=60, text_dim=8, block_size=64)).eval()


def features(seed: int, length: int = 4) -> torch.Tensor:
    return torch.randn(length, 8, generator=torch.Generator().manual_seed(seed))


def job(seed: int = 0, **changes) -> Job:
    values = {"text": features(seed), "empty": None, "params": replace(PLAIN, seed=seed), "least": 20, "most": 20}
    return Job(**{**values, "window": 30, "keep": 5, **changes})


def scheduler(decoder: MotionDecoder, *, host: bool = False) -> Scheduler:
    backend = FusedBackend(decoder, 4, 64)
    return Scheduler(OnHost(backend) if host else backend, decoder.config, queue=8)  # type: ignore[arg-type]


class OnHost:
    """A backend's logits without its draws."""

    def __init__(self, backend: FusedBackend) -> None:
        self.slots, self.capacity, self.device = backend.slots, backend.capacity, backend.device
        self.prefill, self.decode, self.copy = backend.prefill, backend.decode, backend.copy


def wishes() -> list[Job]:
    guided = {"empty": features(60, 2)}
    return [
        job(0, params=replace(PLAIN, seed=2**64 - 1, top_k=7, top_p=0.8)),
        job(1, params=replace(PLAIN, seed=1, temperature=0)),
        job(2, params=replace(PLAIN, seed=2, temperature=0.3, guidance=3.0), **guided, request=5),
        job(3, least=0, most=40, window=9, keep=3, params=replace(PLAIN, temperature=2.0)),
        job(4, least=30, most=30, window=9, keep=3, params=replace(PLAIN, guidance=0.5, top_k=1), **guided),
        job(5, least=0, most=float("inf"), window=12, keep=4, params=replace(PLAIN, top_p=1.0)),
        job(6, least=3, most=6),
        job(7, least=1, most=1, params=replace(PLAIN, temperature=0, guidance=1.7), **guided),
    ]


@pytest.mark.parametrize("tied", [False, True])
def test_what_the_device_draws_is_what_the_host_draws(tied: bool) -> None:
    torch.manual_seed(4)
    config = DecoderConfig(n_layer=2, n_head=2, n_embd=32, codebook=60, text_dim=8, block_size=64, tie_weights=tied)
    decoder = MotionDecoder(config).eval()
    with torch.no_grad():
        decoder.head.weight *= 0.1 if tied else 4
    hosts = Scheduler(OnHost(FusedBackend(decoder, 8, 64)), config, queue=8)  # type: ignore[arg-type]
    ours = Scheduler(FusedBackend(decoder, 8, 64), config, queue=8)
    assert not isinstance(hosts.backend, DrawingBackend) and isinstance(ours.backend, DrawingBackend)
    both = [[crowd.submit(one) for one in wishes()] for crowd in (hosts, ours)]
    for _ in range(90):
        moved = [crowd.step() for crowd in (hosts, ours)]
        assert [len(c.tokens) for c in both[0]] == [len(c.tokens) for c in both[1]]
        assert len(moved[0]) == len(moved[1])
    for host, device in zip(*both, strict=True):
        assert (host.tokens, host.state) == (device.tokens, device.state)
    assert any(c.ended and 1 < len(c.tokens) < 40 for c in both[1])


def test_a_step_is_launched_before_the_one_before_is_read(decoder, monkeypatch) -> None:
    crowd, order = scheduler(decoder), []

    def told(name: str, call: Callable) -> Callable:
        return lambda *args: order.append(name) or call(*args)

    for name in ("prefill_all", "begin", "decode_and_draw"):
        monkeypatch.setattr(crowd.backend, name, told(name, getattr(crowd.backend, name)))
    monkeypatch.setattr(Drawn, "token", told("read", Drawn.token))
    character = crowd.submit(job(0, least=9, most=9, window=5, keep=2))
    told_by_step = []
    while not character.over:
        order.clear()
        crowd.step()
        told_by_step.append(list(order))
    ahead = ["decode_and_draw", "read"]
    assert told_by_step[:6] == [["prefill_all", "begin", *ahead], *[ahead] * 4, ["read"]]  # the window is full
    assert told_by_step[6:] == [["prefill_all", "begin", *ahead], ahead, ["read"]]


def test_one_who_ends_wastes_one_step(decoder, monkeypatch) -> None:
    crowd, drawn = scheduler(decoder), []
    step = crowd.backend.decode_and_draw
    monkeypatch.setattr(crowd.backend, "decode_and_draw", lambda *args: drawn.append(1) or step(*args))
    ended = []
    for seed in range(20):
        character = crowd.submit(job(seed, least=2, most=20))
        drawn.clear()
        while not character.over:
            crowd.step()
        assert len(drawn) == (len(character.tokens) + 1 if character.ended else 19)
        ended.append(character.ended)
    assert set(ended) == {False, True}


@pytest.mark.parametrize("name", ["begin", "token"])
def test_a_begin_or_a_reading_that_was_cut_off_can_be_repeated(decoder, monkeypatch, name: str) -> None:
    crowd, alone = scheduler(decoder), scheduler(decoder)
    characters = [crowd.submit(job(0))]
    crowd.step()
    characters.append(crowd.submit(job(1)))
    owner = Drawn if name == "token" else crowd.backend
    healthy = getattr(owner, name)

    def breaks(*args):
        monkeypatch.setattr(owner, name, healthy)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, breaks)
    with pytest.raises(KeyboardInterrupt):
        crowd.step()
    again = [alone.submit(job(i)) for i in range(2)]
    for _ in range(20):
        crowd.step()
        alone.step()
    assert [c.tokens for c in characters] == [c.tokens for c in again]


@pytest.mark.parametrize("written", [1, 4, 5, 6, 9])
def test_a_twin_of_one_that_is_ahead_draws_for_itself(decoder, written: int) -> None:
    """Before, at and after a slide; the twin's tokens are those of a character that took the other name at that token."""
    crowd, hosts = scheduler(decoder), scheduler(decoder, host=True)
    guided = {"params": replace(PLAIN, guidance=2.0), "empty": features(7, 2), "window": 5, "keep": 2}
    firsts = [one.submit(job(0, **guided)) for one in (crowd, hosts)]
    for _ in range(written):
        crowd.step()
        hosts.step()
    twins = [one.fork(first, job(0, **guided, request=3)) for one, first in zip((crowd, hosts), firsts, strict=True)]
    for _ in range(20):
        crowd.step()
        hosts.step()
    assert [c.tokens for c in (firsts[0], twins[0])] == [c.tokens for c in (firsts[1], twins[1])]
    assert firsts[0].tokens != twins[0].tokens and len(twins[0].tokens) == 20


def test_one_that_stands_still_keeps_what_was_drawn(decoder) -> None:
    crowd, alone = scheduler(decoder), scheduler(decoder)
    still, other, single = crowd.submit(job(0)), crowd.submit(job(1)), alone.submit(job(0))
    for step in range(40):
        still.paused = 3 <= step < 9 or step == 12
        crowd.step()
        alone.step()
        assert len(still.tokens) == min(20, step + 1 - max(0, min(6, step - 2)) - (step >= 12))
    assert still.tokens == single.tokens and other.state == "done"


def test_a_new_text_drops_what_was_drawn_for_the_old_one(decoder) -> None:
    crowd, hosts = scheduler(decoder), scheduler(decoder, host=True)
    both = [one.submit(job(0)) for one in (crowd, hosts)]
    for _ in range(5):
        crowd.step()
        hosts.step()
    for one, character in zip((crowd, hosts), both, strict=True):
        one.redirect(character, replace(character.job, text=features(8, 7)), carry=2)
    for _ in range(15):
        crowd.step()
        hosts.step()
    assert both[0].tokens == both[1].tokens and both[0].state == "done"
