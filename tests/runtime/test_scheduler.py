"""Tokens of many characters: against an uncached oracle, windows and new texts included; the queue; what goes wrong.

All of it twice: drawn on the host, and on the device, where the host reads a step late (there by the kernels' definitions).
"""

import copy
from dataclasses import replace

import pytest
import torch

from kinetok.errors import UserError
from kinetok.kernels.sampling import guide, sample
from kinetok.model.config import DecoderConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.runtime import SamplingParams, steps
from kinetok.runtime.backends.fused import FusedBackend
from kinetok.runtime.backends.torch import TorchBackend
from kinetok.runtime.character import Character, Job
from kinetok.runtime.scheduler import Scheduler

PLAIN = SamplingParams(temperature=1.0, top_k=0, top_p=0.9, guidance=1.0)


@pytest.fixture(scope="module")
def decoder() -> MotionDecoder:
    torch.manual_seed(3)
    return MotionDecoder(DecoderConfig(n_layer=2, n_head=2, n_embd=32, codebook=60, text_dim=8, block_size=64)).eval()


@pytest.fixture(autouse=True, params=[TorchBackend, FusedBackend], ids=["host", "device"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    monkeypatch.setitem(globals(), "KIND", request.param)
    return request.param


def features(seed: int, length: int = 4) -> torch.Tensor:
    return torch.randn(length, 8, generator=torch.Generator().manual_seed(seed))


def job(seed: int = 0, **changes) -> Job:
    values = {"text": features(seed), "empty": None, "params": replace(PLAIN, seed=seed), "least": 20, "most": 20}
    return Job(**{**values, "window": 30, "keep": 5, **changes})


def scheduler(decoder: MotionDecoder, slots: int = 4, **changes) -> Scheduler:
    return Scheduler(KIND(decoder, slots, 64), decoder.config, changes.get("queue", 9))  # type: ignore[name-defined]  # noqa: F821


@torch.inference_mode()
def oracle(decoder: MotionDecoder, texts: list[list[torch.Tensor]], job: Job, contexts: list[int]) -> list[int]:
    """Tokens by the training layout: for token i, the texts ``texts[i]`` and the last ``contexts[i]`` tokens."""
    tokens: list[int] = []
    for rows, context in zip(texts, contexts, strict=True):
        logits = [whole(decoder, text, tokens[len(tokens) - context :]) for text in rows]
        scores = guide(*logits, job.params.guidance) if len(rows) == 2 else logits[0]
        scores[:, decoder.config.end_id] = -torch.inf
        name = (torch.tensor([v]) for v in (job.params.seed, len(tokens), job.request))
        chosen = dict(zip(("seed", "position", "request"), name, strict=True))
        tokens.append(int(sample(scores, **chosen, temperature=1.0, top_p=0.9)))
    return tokens


@torch.inference_mode()
def whole(decoder: MotionDecoder, text: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Logits ``[1, V]`` after the last token by the training layout, without the end token."""
    ids = [decoder.config.pad_id] * len(text) + tokens
    logits = decoder(torch.tensor([ids]), text[None], torch.ones(1, len(text)))[0, -1:]
    logits[:, decoder.config.end_id] = -torch.inf
    return logits


def run(crowd: Scheduler, *characters) -> None:
    while not all(character.over for character in characters):
        crowd.step()


def test_a_full_window_goes_on_from_its_last_tokens(decoder) -> None:
    long = job(2, least=40, most=40, window=12, keep=5, params=replace(PLAIN, guidance=2.0), empty=features(9, 2))
    crowd = scheduler(decoder)
    character = crowd.submit(long)
    run(crowd, character)
    contexts = [*range(13), *(5 + i % 8 for i in range(27))]  # 12 tokens, then 5 of them and up to 7 more
    assert character.tokens == oracle(decoder, [long.texts] * 40, long, contexts)


@pytest.mark.parametrize("wide", [False, True])
def test_of_a_held_pose_one_token_is_kept_before_the_window_is_full(decoder, wide) -> None:
    held = copy.deepcopy(decoder)
    torch.nn.init.zeros_(held.head.weight)  # all tokens are alike, and greedy takes the first
    wish = job(least=40, most=40, window=30 if wide else 12, keep=5, params=replace(PLAIN, temperature=0))
    bases = []
    for one in (held, decoder):
        crowd, found = scheduler(one), []
        character = crowd.submit(wish)
        while not character.over:
            crowd.step()
            found.append(character.base)
        bases.append(list(dict.fromkeys(found)))
    assert bases[0] == [(0, 0), (11, 12), (22, 23), (33, 34)]
    assert len(set(character.tokens)) > 5 and {last - first for first, last in bases[1][1:]} == {5}


def test_a_clip_that_fits_its_window_holds_a_pose_undisturbed(decoder) -> None:
    held = copy.deepcopy(decoder)
    torch.nn.init.zeros_(held.head.weight)
    crowd = scheduler(held)
    character = crowd.submit(job(least=30, most=30, window=30, keep=5, params=replace(PLAIN, temperature=0)))
    while not character.over:
        crowd.step()
        assert character.base == (0, 0)


def test_a_hold_is_judged_by_what_lies_behind_the_text_but_the_newest_token() -> None:
    wish = job(most=99, keep=5, window=30)
    for tokens, base, slides in (
        ([7] * 11 + [8], 0, True),  # the newest says nothing
        ([7] * 11, 0, False),  # ten of the text's own, and one more, have to be there
        ([7] * 9 + [8] + [7] * 2, 0, False),
        ([9] * 20 + [7] * 12, 20, True),
        ([7] * 31, 20, False),  # as many were kept
    ):
        assert Character(wish, tokens=tokens, base=(base, base)).slides(len(tokens) - 1) is slides, tokens


def test_how_many_kinds_of_tokens_are_a_held_pose() -> None:
    for tokens, kept in (
        ([7] * 10, 1),
        ([7] * 9 + [8], 5),
        ([1, 2, 3, 4, 5] + [7] * 10, 1),
        ([7] * 6, 1),
        ([7] * 5, 5),
    ):
        assert Character(job(keep=5), tokens=tokens).kept == kept, tokens
    assert Character(job(keep=15), tokens=[1, 2, 3, 4, 5] * 6).kept == 1
    assert Character(job(keep=15), tokens=[1, 2, 3, 4, 5, 6] * 5).kept == 15
    assert Character(job(keep=5), tokens=[7] * 10, carry=2).kept == 2


def test_a_new_text_sees_nothing_of_the_old_one(decoder) -> None:
    crowd = scheduler(decoder, slots=1)
    character = crowd.submit(job(1))
    for _ in range(9):
        crowd.step()
    crowd.backend.slab[:] = torch.where(torch.rand_like(crowd.backend.slab) < 0.5, torch.nan, 9.0)
    other = replace(character.job, text=features(8, 7))
    crowd.redirect(character, other, carry=3)
    run(crowd, character)
    assert character.tokens[:9] == oracle(decoder, [[features(1)]] * 9, character.job, list(range(9)))
    contexts = [*range(9), *(3 + i for i in range(11))]
    expected = oracle(decoder, [[features(1)]] * 9 + [[features(8, 7)]] * 11, character.job, contexts)
    assert character.tokens == expected


def test_characters_join_and_leave_and_keep_their_bits(decoder) -> None:
    jobs = [
        job(
            i,
            least=7 + 3 * i,
            most=7 + 3 * i,
            empty=features(50, 2) if i % 2 else None,
            params=replace(PLAIN, seed=i, guidance=1.5 if i % 2 else 1.0, temperature=0 if i == 4 else 0.8),
        )
        for i in range(7)
    ]
    alone = []
    for one in jobs:
        single = scheduler(decoder, slots=2)
        alone.append(single.submit(one))
        run(single, alone[-1])
    crowd = scheduler(decoder, slots=5)
    together = [crowd.submit(one) for one in jobs]
    run(crowd, *together)
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    assert sorted(crowd.free) == list(range(5))


def test_nobody_overtakes_in_the_queue(decoder) -> None:
    crowd = scheduler(decoder, slots=2, queue=3)
    guided = {"empty": features(1), "params": replace(PLAIN, guidance=2.0)}
    first, second, third = crowd.submit(job(0)), crowd.submit(job(1, **guided)), crowd.submit(job(2))
    with pytest.raises(UserError, match="full: 3"):
        crowd.submit(job(3))
    crowd.step()
    assert [c.state for c in (first, second, third)] == [
        "running",
        "queued",
        "queued",
    ]  # one free slot is not for third
    crowd.cancel(first)
    crowd.step()
    assert [len(c.tokens) for c in (second, third)] == [1, 0]


def test_deadlines_pass_in_the_queue_and_under_way(decoder) -> None:
    crowd = scheduler(decoder, slots=1)
    first, second = crowd.submit(job(0, deadline=100.0)), crowd.submit(job(1, deadline=50.0))
    third = crowd.submit(job(2))
    assert crowd.step(now=49.0) == [first]
    assert crowd.step(now=50.0) == [second, first]
    assert second.state == "expired" and "after 0 tokens" in second.error
    crowd.step(now=100.0)
    assert first.state == "expired" and "after 2 tokens" in first.error and len(third.tokens) == 1


def test_what_can_never_run_is_refused(decoder) -> None:
    crowd = scheduler(decoder, slots=1)
    for bad in (job(least=62, most=62, window=62), job(text=features(0, 64)), job(most=99, window=61)):
        with pytest.raises(UserError, match="holds 64"):
            crowd.submit(bad)
    with pytest.raises(UserError, match="2 slots"):
        crowd.submit(job(empty=features(1)))
    for bad in (torch.zeros(3, 9), torch.zeros(0, 8), torch.zeros(8)):
        with pytest.raises(UserError, match=r"features \[L, 8\]"):
            crowd.submit(job(text=bad))
    assert not crowd.waiting
    longest = crowd.submit(job(least=61, most=61, window=61))
    run(crowd, longest)
    assert longest.state == "done" and len(longest.tokens) == 61


def test_one_whose_logits_are_no_numbers_fails_alone(decoder) -> None:
    crowd = scheduler(decoder)
    good, bad = crowd.submit(job(0)), crowd.submit(job(1, text=torch.full((3, 8), torch.nan)))
    run(crowd, good, bad)
    assert bad.state == "failed" and good.state == "done"
    assert "token 0" in bad.error and "finite" in bad.error
    single = scheduler(decoder)
    again = single.submit(job(0))
    run(single, again)
    assert again.tokens == good.tokens


@pytest.mark.parametrize("error", [RuntimeError("lost the device"), KeyboardInterrupt()])
@pytest.mark.parametrize("name", ["a step", "prefill"])
def test_a_step_that_was_cut_off_can_be_repeated(decoder, kind, monkeypatch, error, name: str) -> None:
    crowd = scheduler(decoder)
    characters = [crowd.submit(job(0))]
    for _ in range(3):
        crowd.step()
    characters.append(crowd.submit(job(1, empty=features(9), params=replace(PLAIN, guidance=2.0))))
    owner = crowd.backend
    names = {"a step": "decode", "prefill": "prefill"}
    if kind is FusedBackend:
        names = {"a step": "decode_and_draw", "prefill": "prefill_all"}
    name = names[name]
    healthy = getattr(owner, name)

    def breaks(*args):
        monkeypatch.setattr(owner, name, healthy)
        raise error

    monkeypatch.setattr(owner, name, breaks)
    with pytest.raises(type(error)):
        crowd.step()
    run(crowd, *characters)
    for character in characters:
        single = scheduler(decoder)
        alone = single.submit(character.job)
        run(single, alone)
        assert character.tokens == alone.tokens


@pytest.mark.parametrize(
    "error", [UserError("no room for it"), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]
)
def test_one_that_cannot_be_prefilled_fails_alone(decoder, monkeypatch, error) -> None:
    crowd = scheduler(decoder)
    good, bad = crowd.submit(job(0)), crowd.submit(job(1))
    for name in ("prefill", "prefill_all"):
        healthy = getattr(crowd.backend, name, None)

        def refuses(first, *args, healthy=healthy):
            if first == 1 or (isinstance(first, list) and any(row[0] == 1 for row in first)):
                raise error
            return healthy(first, *args)

        if healthy is not None:
            monkeypatch.setattr(crowd.backend, name, refuses)
    run(crowd, good, bad)
    assert good.state == "done" and bad.state == "failed"
    wanted = "no room for it" if isinstance(error, UserError) else "out of memory: a text of 4 positions"
    assert bad.error.startswith(f"at token 0: {wanted}") and "Tried" not in bad.error


def test_those_who_run_do_not_wait_for_all_who_join(decoder, monkeypatch) -> None:
    monkeypatch.setattr(steps, "PREFILLED_AT_ONCE", 10)
    crowd = scheduler(decoder, slots=8, queue=8)
    first = crowd.submit(job(0, text=features(0, 20)))  # longer than a step's share, and joins at once all the same
    crowd.step()
    assert len(first.tokens) == 1
    others = [crowd.submit(job(i, text=features(i, 4))) for i in range(1, 6)]
    counts = []
    for _ in range(4):
        moved = crowd.step()
        assert all(c in moved for c in (first, *others) if c.tokens)
        counts.append([len(c.tokens) for c in (first, *others)])
    assert counts == [[2, 1, 1, 0, 0, 0], [3, 2, 2, 1, 1, 0], [4, 3, 3, 2, 2, 1], [5, 4, 4, 3, 3, 2]]
    run(crowd, first, *others)
    for character in (first, *others):
        single = scheduler(decoder)
        alone = single.submit(character.job)
        run(single, alone)
        assert character.tokens == alone.tokens


def test_nobody_who_slides_is_passed_over_for_ever(decoder, monkeypatch) -> None:
    monkeypatch.setattr(steps, "PREFILLED_AT_ONCE", 1)
    crowd = scheduler(decoder, slots=4)
    characters = [crowd.submit(job(i, least=18, most=18, window=3, keep=2)) for i in range(4)]
    spread = 0
    for _ in range(80):  # each wants a prefill every other token, and a step has one
        crowd.step()
        counts = [len(c.tokens) for c in characters]
        spread = max(spread, max(counts) - min(counts))
    assert counts == [18] * 4 and spread <= 4


@pytest.mark.parametrize("steps", [0, 6])
def test_a_fork_prefills_nothing_and_goes_on_under_its_own_name(decoder, kind, monkeypatch, steps: int) -> None:
    crowd = scheduler(decoder)
    first = crowd.submit(job(0))
    for _ in range(steps):
        crowd.step()
    prefilled = []
    name = "prefill" if kind is TorchBackend else "prefill_all"
    prefill = getattr(crowd.backend, name)
    monkeypatch.setattr(crowd.backend, name, lambda *args: prefilled.append(1) or prefill(*args))
    twins = [crowd.fork(first, replace(first.job, request=request)) for request in (0, 1)]
    run(crowd, first, *twins)
    assert len(prefilled) == (0 if steps else 1)
    assert twins[0].tokens == first.tokens != twins[1].tokens
    named = [first.job] * steps + [twins[1].job] * (20 - steps)
    expected: list[int] = []
    for index, one in enumerate(named):  # the oracle again, with another name from the fork on
        logits = whole(decoder, first.job.text, expected)
        names = (torch.tensor([v]) for v in (one.params.seed, index, one.request))
        chosen = dict(zip(("seed", "position", "request"), names, strict=True))
        expected.append(int(sample(logits, **chosen, temperature=1.0, top_p=0.9)))
    assert twins[1].tokens == expected


def test_a_fork_needs_a_running_character_and_a_free_slot(decoder) -> None:
    crowd = scheduler(decoder, slots=2)
    first = crowd.submit(job(0))
    crowd.fork(first, job(0, request=1))  # runs at once: a slot was free
    waits = crowd.submit(job(1))
    with pytest.raises(UserError, match="queued"):
        crowd.fork(waits, waits.job)
    with pytest.raises(UserError, match="no free slots"):
        crowd.fork(first, first.job)
    with pytest.raises(UserError, match="guidance"):
        crowd.redirect(first, job(0, empty=features(3)), carry=1)
    crowd.cancel(first)
    with pytest.raises(UserError, match="cancelled"):
        crowd.redirect(first, first.job, carry=1)
