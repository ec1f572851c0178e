"""The decode step from packed weights against the decoder's own, and loops that never look at a token."""

import pytest
import torch

from kinetok.kernels.sampling import Draw, SamplingState, sample_step
from kinetok.model.config import DecoderConfig
from kinetok.model.decode_step import FusedDecoderStep
from kinetok.model.decoder import MotionDecoder
from kinetok.runtime import SamplingParams
from kinetok.runtime.backends.torch import TorchBackend
from kinetok.runtime.generate import ENDED_AT_ONCE, sample_tokens
from kinetok.runtime.scheduler import Job, Scheduler


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied head"])
def decoder(request: pytest.FixtureRequest) -> MotionDecoder:
    torch.manual_seed(3)
    config = DecoderConfig(
        n_layer=2, n_head=2, n_embd=32, codebook=60, text_dim=8, block_size=64, tie_weights=request.param
    )
    decoder = MotionDecoder(config).eval()
    for name, parameter in decoder.named_parameters():
        if name.endswith("scale"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return decoder


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, 8, generator=generator) for length in (3, 7, 1)]


@torch.inference_mode()
def test_logits_are_those_of_the_decoder(decoder: MotionDecoder) -> None:
    step = FusedDecoderStep(decoder, "fp32")
    cache = decoder.new_cache(3, 30)
    tokens = decoder.prefill(prompts(), cache).argmax(1)
    slab = cache.slab.clone()
    for _ in range(8):
        positions = torch.tensor(cache.lengths)
        wanted = decoder.decode_step(tokens, cache)
        torch.testing.assert_close(step.logits(tokens, positions, slab), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(slab, cache.slab, rtol=1e-5, atol=1e-5)
        tokens = wanted[:, : decoder.config.codebook].argmax(1)


@torch.inference_mode()
def test_a_row_within_reach_keeps_its_bits(decoder: MotionDecoder) -> None:
    step, cache = FusedDecoderStep(decoder, "fp32"), decoder.new_cache(3, 60)
    tokens = decoder.prefill(prompts(), cache).argmax(1)
    positions = torch.tensor([3, 40, 1])
    logits = [step.logits(tokens, positions, cache.slab.clone(), reach) for reach in (None, 41, 16)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0][[0, 2]], logits[2][[0, 2]]) and not torch.equal(logits[0][1], logits[2][1])


@torch.inference_mode()
def test_quantised_logits_are_near(decoder: MotionDecoder) -> None:
    cache = decoder.new_cache(3, 30)
    tokens = decoder.prefill(prompts(), cache).argmax(1)
    slab, positions = cache.slab.clone(), torch.tensor(cache.lengths)
    wanted = decoder.decode_step(tokens, cache)
    for kind, group, bound in (("int8", 0, 0.05), ("fp8", 0, 0.1), ("int4", 64, 0.5)):
        step = FusedDecoderStep(decoder, kind, group=group)
        logits = step.logits(tokens, positions, slab.clone())
        assert 0 < float((logits - wanted).norm() / wanted.norm()) < bound
    assert step.head.kind == "int8" and step.nbytes > 0


@torch.inference_mode()
def loop(decoder: MotionDecoder, features: list[torch.Tensor], draws: list[Draw], greedy: bool) -> list[list[int]]:
    """Tokens of each row; the loop runs a fixed number of steps and reads nothing before its end."""
    step = FusedDecoderStep(decoder, "fp32")
    cache = decoder.new_cache(len(features), 40)
    logits = decoder.prefill(features, cache)
    state, config = SamplingState.start(draws), decoder.config
    banned = config.pad_id if config.tie_weights else -1
    tokens = sample_step(logits, state, end_id=config.end_id, pad_id=banned)
    written, positions = [tokens], torch.tensor(cache.lengths)
    take = step.greedy if greedy else step.sample
    for _ in range(max(draw.most for draw in draws) - 1):
        tokens = take(tokens, positions, cache.slab, state)
        written.append(tokens)
        positions = positions + (state.status == 0)
    counts = state.position.tolist()
    assert (state.status > 0).all()
    return [torch.stack(written)[:count, row].tolist() or [ENDED_AT_ONCE] for row, count in enumerate(counts)]


def alone(
    decoder: MotionDecoder, features: torch.Tensor, params: SamplingParams, budget: tuple[int, int], request: int = 0
) -> list[int]:
    least, most = budget
    job = Job(text=features, empty=None, params=params, least=least, most=most, request=request, window=50, keep=9)
    return sample_tokens(Scheduler(TorchBackend(decoder, 1, 64), decoder.config, queue=1), job)


def test_a_greedy_batch_gives_the_tokens_of_single_clips(decoder: MotionDecoder) -> None:
    draws = [Draw(most=most, temperature=0) for most in (20, 5, 20)]
    params = SamplingParams(temperature=0, top_k=0, top_p=1.0, guidance=1.0)
    wanted = [
        alone(decoder, features, params, budget=(0, draw.most)) for features, draw in zip(prompts(), draws, strict=True)
    ]
    assert loop(decoder, prompts(), draws, greedy=True) == wanted


def test_a_sampled_batch_gives_the_tokens_of_single_clips(decoder: MotionDecoder) -> None:
    chosen = [(1.0, 0, 1.0), (0.7, 10, 1.0), (1.2, 0, 0.9)]
    draws, wanted = [], []
    for request, (features, (temperature, top_k, top_p)) in enumerate(zip(prompts(), chosen, strict=True)):
        params = SamplingParams(seed=5, temperature=temperature, top_k=top_k, top_p=top_p, guidance=1.0)
        wanted.append(alone(decoder, features, params, budget=(4, 12), request=request))
        draws.append(Draw(seed=5, request=request, least=4, most=12, temperature=temperature, top_k=top_k, top_p=top_p))
    assert loop(decoder, prompts(), draws, greedy=False) == wanted
