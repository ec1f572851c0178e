"""Greedy and sampled decoding: golden tokens, the uncached route, guidance, budgets."""

import json

import numpy as np
import pytest
import torch

from kinetok.errors import UserError
from kinetok.kernels.sampling import sample
from kinetok.model.checkpoint import load_released_decoder
from kinetok.model.config import DecoderConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.runtime import SamplingParams, generate_tokens, steps
from kinetok.runtime.backends.torch import TorchBackend
from kinetok.runtime.generate import sample_tokens
from kinetok.runtime.sampling import token_budget
from kinetok.runtime.scheduler import Job, Scheduler

PLAIN = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, guidance=1.0)


@pytest.fixture(scope="module")
def decoder() -> MotionDecoder:
    torch.manual_seed(3)
    return MotionDecoder(DecoderConfig(n_layer=2, n_head=2, n_embd=32, codebook=60, text_dim=8, block_size=64)).eval()


def sampled(
    decoder: MotionDecoder, features: torch.Tensor, params: SamplingParams, budget: tuple[int, int], **more
) -> list[int]:
    job = Job(
        text=features,
        empty=more.pop("empty", None),
        params=params,
        least=budget[0],
        most=budget[1],
        window=50,
        keep=9,
        **more,
    )
    backend = TorchBackend(decoder, len(job.texts), decoder.config.block_size)
    return sample_tokens(Scheduler(backend, decoder.config, queue=1), job)


@torch.inference_mode()
def uncached(decoder: MotionDecoder, features: torch.Tensor, count: int) -> list[int]:
    """As the reference: the whole sequence again for each token, logits for all positions."""
    tokens: list[int] = []
    for _ in range(count):
        row = torch.tensor([[decoder.config.pad_id] * len(features) + tokens])
        token = int(decoder(row, features[None], torch.ones(1, len(features)))[0, -1].argmax())
        if token == decoder.config.end_id:
            break
        tokens.append(token)
    return tokens or [1]


def test_golden_greedy_tokens(golden) -> None:
    with np.load(golden("transformer_small.npz")) as z:
        model = load_released_decoder(golden("transformer_small.pth"), **json.loads(str(z["config_json"])))
        for row in range(8):
            features = torch.from_numpy(z["prompt_features"][row][z["prompt_mask"][row].astype(bool)])
            assert generate_tokens(model, features) == z["greedy_tokens"][row][: z["greedy_len"][row]].tolist()


@pytest.mark.parametrize("length", [1, 3, 9])
def test_tokens_equal_the_uncached_route(decoder, length: int) -> None:
    features = torch.randn(length, 8, generator=torch.Generator().manual_seed(length))
    assert generate_tokens(decoder, features, max_tokens=40) == uncached(decoder, features, 40)


def test_text_and_motion_must_fit(decoder) -> None:
    assert len(generate_tokens(decoder, torch.zeros(15, 8), max_tokens=50)) <= 50
    with pytest.raises(UserError, match="positions"):
        generate_tokens(decoder, torch.zeros(16, 8), max_tokens=50)
    with pytest.raises(UserError, match="L > 0"):
        generate_tokens(decoder, torch.zeros(0, 8))


def test_temperature_zero_is_greedy(decoder) -> None:
    features = torch.randn(4, 8)
    params = SamplingParams(temperature=0, top_k=0, top_p=1.0, guidance=1.0)
    assert sampled(decoder, features, params, budget=(0, 30)) == generate_tokens(decoder, features, 30)


def test_the_seed_and_the_request_name_the_draw(decoder) -> None:
    features = torch.randn(4, 8)

    def draw(**names) -> list[int]:
        params = SamplingParams(seed=names.pop("seed", 0), temperature=1.0, top_k=0, top_p=1.0, guidance=1.0)
        return sampled(decoder, features, params, budget=(12, 12), **names)

    assert draw() == draw() and len(draw()) == 12
    assert draw() != draw(seed=1) and draw() != draw(request=1) and draw(seed=2**64 - 1) != draw(seed=2**63)


@pytest.mark.parametrize("ahead", [1, 200, 1 << 16])
def test_noise_drawn_ahead_gives_the_tokens_of_single_draws(decoder, monkeypatch, ahead: int) -> None:
    monkeypatch.setattr(steps, "NOISE_AHEAD", ahead)  # of 61 classes: one, three and all positions at once
    features = torch.randn(4, 8, generator=torch.Generator().manual_seed(5))
    params = SamplingParams(seed=11, temperature=0.7, top_k=0, top_p=0.95, guidance=1.0)
    expected: list[int] = []
    with torch.inference_mode():
        cache = decoder.new_cache(1, 30)
        logits = decoder.prefill([features], cache)
        for position in range(20):
            logits[:, decoder.config.end_id] = -torch.inf
            seed, at, request = (torch.tensor([value]) for value in (11, position, 6))
            token = sample(logits, seed=seed, position=at, request=request, temperature=0.7, top_p=0.95)
            expected.append(int(token))
            logits = decoder.decode_step(token, cache)
    assert sampled(decoder, features, params, budget=(20, 20), request=6) == expected


def test_guidance_runs_a_second_row(decoder) -> None:
    features, empty = torch.randn(5, 8), torch.randn(2, 8)
    guided = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, guidance=3.0)
    one = sampled(decoder, features, guided, budget=(9, 9), empty=empty)
    # With the same text in both rows guidance changes nothing but rounding.
    same = sampled(decoder, features, guided, budget=(9, 9), empty=features)
    assert len(one) == 9 and same == sampled(decoder, features, PLAIN, budget=(9, 9))


@pytest.mark.parametrize(
    ("params", "defaults", "room", "budget"),
    [
        ({}, {}, 200, (0, 150)),
        ({}, {"min_seconds": 2.0}, 200, (30, 150)),
        ({}, {"min_seconds": 2.0}, 20, (20, 20)),
        ({"seconds": 6.0}, {}, 200, (90, 90)),
        ({"seconds": 0.01}, {}, 200, (1, 1)),
        ({"max_tokens": 50}, {}, 200, (0, 50)),
        ({"max_tokens": 50, "seconds": 10}, {}, 200, (50, 50)),
        ({"seconds": 60.0}, {}, 200, (900, 900)),
        ({"seconds": float("inf")}, {"min_seconds": 2.0}, 20, (float("inf"), float("inf"))),
    ],
)
def test_budget(params: dict, defaults: dict, room: int, budget: tuple[int, int]) -> None:
    assert token_budget(SamplingParams(**params), defaults, 15.0, room) == budget


def test_seconds_beyond_the_room_are_refused() -> None:
    with pytest.raises(UserError, match="room for 100"):
        token_budget(SamplingParams(seconds=10), {}, 15.0, 100)


@pytest.mark.parametrize(
    "bad",
    [
        {"seconds": 0},
        {"seconds": -1.0},
        {"seconds": 601},
        {"seconds": -float("inf")},
        {"seconds": float("nan")},
        {"temperature": -0.1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"top_k": 1.5},
        {"guidance": float("inf")},
        {"seed": -1},
        {"seed": 2**64},
        {"max_tokens": 0},
    ],
)
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        SamplingParams(**bad)


@pytest.mark.parametrize(("name", "least"), [("seconds", 0.001), ("top_p", 0.0001)])
def test_the_least_that_is_asked_for_is_accepted(name, least) -> None:
    assert getattr(SamplingParams(**{name: least}), name) == least
    with pytest.raises(UserError, match=f"{name}: expected .*{least}"):
        SamplingParams(**{name: least / 2})


def test_weights_that_are_not_numbers_are_named(decoder) -> None:
    features = torch.full((3, 8), torch.nan)
    with pytest.raises(UserError, match="token 0"):
        sampled(decoder, features, PLAIN, budget=(0, 5))
