"""Streaming against decoding the whole clip: golden tokenizers, every kind of configuration, any cut into blocks."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.model.checkpoint import load_released_tokenizer
from kinetok.model.config import TokenizerConfig
from kinetok.model.streaming import StreamingDetokenizer
from kinetok.model.tokenizer import MotionTokenizer

GOLDEN = ["p1", "p2", "p4", "causal_p1", "causal_p2", "nopatcher_alt"]


def small(**changes) -> MotionTokenizer:
    torch.manual_seed(0)
    values = {"nb_code": 256, "code_dim": 16, "width": 32, "depth": 2, "input_dim": 12, **changes}
    return MotionTokenizer(TokenizerConfig(**values)).eval()


def stream(detokenizer: StreamingDetokenizer, tokens: torch.Tensor, cuts: list[int], slot: int = 0) -> torch.Tensor:
    """Frames of one clip pushed in pieces that end at ``cuts``."""
    parts, begin = [], 0
    detokenizer.reset(slot)
    for end in [*cuts, len(tokens)]:
        parts += detokenizer.push([slot], tokens[None, begin:end])
        begin = end
    return torch.cat([*parts, *detokenizer.finish([slot])])


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal to 1e-5 of the clip's range in fp32, to 1e-12 of it in float64."""
    share = 1e-5 if a.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(a, b, atol=share * max(1.0, float(b.detach().abs().max())), rtol=0)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("length", [1, 2, 7, 33])
def test_golden_tokenizers_token_by_token(golden, name: str, length: int) -> None:
    with np.load(golden(f"tokenizer_{name}.npz")) as z:
        model = load_released_tokenizer(golden(f"tokenizer_{name}.pth"), **json.loads(str(z["config_json"])))
    tokens = torch.randint(model.config.codebook, (length,), generator=torch.Generator().manual_seed(length))
    frames = stream(StreamingDetokenizer(model, 1), tokens, list(range(1, length)))
    close(frames, model.decode(tokens[None])[0])


def test_look_ahead_follows_from_the_configuration() -> None:
    released = MotionTokenizer(TokenizerConfig(width=8, code_dim=8, input_dim=4))
    assert StreamingDetokenizer(released, 1).lookahead == 16
    assert StreamingDetokenizer(small(causal=True), 1).lookahead == 0
    # Frame 2i needs the token i + 15 and frame 2i + 1 the token i + 16 (section 2).
    detokenizer = StreamingDetokenizer(released, 1)
    counts = [len(detokenizer.push([0], torch.tensor([[5]]))[0]) for _ in range(18)]
    assert counts == [0] * 15 + [1, 2, 2]
    assert len(detokenizer.finish([0])[0]) == 36 - 5


@pytest.mark.parametrize("down_t", [0, 1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {"patcher": "haar", "patch_size": 4},
        {"patcher": "rearrange", "patch_size": 2},
        {"kernel_size": 5, "norm": "BN", "activation": "silu"},
        {"kernel_size": 1, "norm": "none"},
        {"dilation_growth_rate": 2, "depth": 3, "patcher": "db4"},
    ],
)
def test_every_kind_of_configuration(change: dict, causal: bool, down_t: int) -> None:
    model = small(causal=causal, down_t=down_t, **change).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    tokens = torch.randint(240, (23,))
    close(stream(StreamingDetokenizer(model, 1), tokens, [1, 2, 3, 9]), model.decode(tokens[None])[0])


def test_a_stage_without_a_stride() -> None:
    model = small(patcher="haar", patch_size=2, stride_t=1, causal=True)
    tokens = torch.randint(240, (9,))
    close(stream(StreamingDetokenizer(model, 1), tokens, [4]), model.decode(tokens[None])[0])


MODEL = small()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.lists(st.integers(0, 40)))
def test_any_cut_into_blocks(length: int, cuts: list[int]) -> None:
    tokens = torch.randint(240, (length,), generator=torch.Generator().manual_seed(length))
    cuts = sorted(cut for cut in cuts if cut <= length)
    close(stream(StreamingDetokenizer(MODEL, 1), tokens, cuts), MODEL.decode(tokens[None])[0])


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("causal", [False, True])
def test_a_crowd_of_different_ages_leaves_every_clip_its_bits(causal: bool) -> None:
    model = small(causal=causal, width=64)
    crowd = StreamingDetokenizer(model, 5)
    clips = [torch.randint(240, (12 + 3 * i,)) for i in range(5)]
    parts: list[list[torch.Tensor]] = [[] for _ in clips]
    for slot in range(5):
        crowd.reset(slot)
    for step in range(40):
        slots = [i for i, clip in enumerate(clips) if 2 * i <= step < 2 * i + len(clip)]
        done = [i for i, clip in enumerate(clips) if step == 2 * i + len(clip)]
        new = crowd.push(
            slots, torch.tensor([[int(clips[i][step - 2 * i])] for i in slots], dtype=torch.int64).reshape(-1, 1)
        )
        for i, frames in zip(slots + done, new + crowd.finish(done), strict=True):
            parts[i].append(frames)
    for clip, frames in zip(clips, parts, strict=True):
        alone = stream(StreamingDetokenizer(model, 1), clip, list(range(1, len(clip))))
        assert torch.equal(torch.cat(frames), alone)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("width", [16, 64])
def test_clips_that_end_together_keep_their_bits(width: int) -> None:
    """On two threads a batch of products was shared out otherwise than one alone, and summed otherwise."""
    model = small(width=width, input_dim=272, patcher="none", causal=False)
    crowd, alone = StreamingDetokenizer(model, 3), StreamingDetokenizer(model, 1)
    clips = torch.randint(240, (3, 12))
    parts = [crowd.push([0, 1, 2], clips[:, step, None]) for step in range(12)] + [crowd.finish([0, 1, 2])]
    for i, clip in enumerate(clips):
        assert torch.equal(torch.cat([part[i] for part in parts]), stream(alone, clip, list(range(1, 12))))


def test_a_copy_goes_its_own_way_and_a_reset_forgets() -> None:
    detokenizer, tokens = StreamingDetokenizer(MODEL, 2), torch.randint(240, (30,))
    detokenizer.push([0], tokens[None, :20])
    detokenizer.copy(0, 1)
    detokenizer.push([0], tokens[None, :3])
    rest = torch.cat([*detokenizer.push([1], tokens[None, 20:]), *detokenizer.finish([1])])
    close(rest, MODEL.decode(tokens[None])[0, -len(rest) :])
    close(stream(detokenizer, tokens[:5], [2], slot=1), MODEL.decode(tokens[None, :5])[0])


@pytest.mark.parametrize("change", [{"norm": "GN"}, {"patcher": "db2", "patch_size": 2}])
def test_what_needs_the_whole_clip_is_refused(change: dict) -> None:
    with pytest.raises(UserError, match="cannot stream"):
        StreamingDetokenizer(small(**change), 1)


def test_bad_tokens() -> None:
    detokenizer = StreamingDetokenizer(MODEL, 1)
    for bad in (torch.tensor([[240]]), torch.tensor([[-1]]), torch.tensor([1]), torch.tensor([[1.0]])):
        with pytest.raises(UserError, match="expected"):
            detokenizer.push([0], bad)
