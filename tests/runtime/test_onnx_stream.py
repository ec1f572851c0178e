"""Streaming detokenization in ONNX Runtime against torch's: frames, cuts, ends, and rows that do not know of each other."""

import pytest
import torch

pytest.importorskip("onnx", reason="needs the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")

from kinetok.errors import UserError
from kinetok.model.config import TokenizerConfig
from kinetok.model.streaming import StreamingDetokenizer
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.runtime.backends import open_detokenizer
from kinetok.runtime.backends.onnx_stream import OnnxStreamingDetokenizer


def small(**changes) -> MotionTokenizer:
    torch.manual_seed(0)
    sizes = {"nb_code": 256, "code_dim": 8, "width": 16, "depth": 2, "patcher": "haar", "causal": True}
    return MotionTokenizer(TokenizerConfig(**{**sizes, **changes})).eval()


KINDS = [{}, {"causal": False}, {"patcher": "none", "norm": "LN"}, {"causal": False, "patcher": "none", "norm": "BN"}]


def streamed(detokenizer, tokens: torch.Tensor, cuts: list[int], slot: int = 0) -> torch.Tensor:
    detokenizer.reset(slot)
    blocks = [detokenizer.push([slot], part[None])[0] for part in tokens.tensor_split(cuts)]
    return torch.cat((*blocks, *detokenizer.finish([slot])))


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("cuts", [[], [1, 2, 3], [0, 4, 4, 9]])
def test_frames_are_torchs_however_they_are_cut(changes, cuts) -> None:
    tokenizer = small(**changes)
    ours, theirs = OnnxStreamingDetokenizer(tokenizer, 2), StreamingDetokenizer(tokenizer, 2)
    tokens = torch.randint(240, (12,), generator=torch.Generator().manual_seed(len(cuts)))
    wanted = streamed(theirs, tokens, cuts)
    for slot in (1, 1):  # the second time after a reset
        torch.testing.assert_close(streamed(ours, tokens, cuts, slot), wanted, atol=1e-5, rtol=1e-5)
    assert ours.lookahead == theirs.lookahead and len(wanted) == 12 * tokenizer.config.frames_per_token


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("changes", KINDS[:2])
def test_a_clips_bits_do_not_depend_on_the_others(changes, together) -> None:
    tokenizer = small(**changes)
    crowd, alone = OnnxStreamingDetokenizer(tokenizer, 6), OnnxStreamingDetokenizer(tokenizer, 1)
    crowd.batched = crowd.batched and together
    tokens = torch.randint(240, (6, 9), generator=torch.Generator().manual_seed(1))
    frames: list[list[torch.Tensor]] = [[] for _ in range(6)]
    for step in range(9):
        slots = [slot for slot in (3, 0, 5, 1, 4, 2) if step >= slot]  # they begin one after another
        for slot, block in zip(
            slots, crowd.push(slots, tokens[slots, step - torch.tensor(slots)][:, None]), strict=True
        ):
            frames[slot].append(block)
    for slot, block in zip([2, 4], crowd.finish([2, 4]), strict=True):
        frames[slot].append(block)
        own = streamed(alone, tokens[slot, : 9 - slot], list(range(1, 9 - slot)))
        assert torch.equal(torch.cat(frames[slot]), own)


def test_a_copy_goes_its_own_way() -> None:
    detokenizer = OnnxStreamingDetokenizer(small(), 2)
    detokenizer.push([0], torch.tensor([[3, 1, 4]]))
    detokenizer.copy(0, 1)
    first = detokenizer.push([0, 1], torch.tensor([[1], [1]]))
    assert torch.equal(*first)
    detokenizer.push([1], torch.tensor([[200]]))
    again = OnnxStreamingDetokenizer(small(), 1)
    again.push([0], torch.tensor([[3, 1, 4]])), again.push([0], torch.tensor([[1]]))
    assert torch.equal(*(one.push([0], torch.tensor([[5]]))[0] for one in (detokenizer, again)))


def test_what_is_refused_and_who_gets_it() -> None:
    with pytest.raises(UserError, match=r"float32 on a CPU, got torch\.float16"):
        OnnxStreamingDetokenizer(small().half(), 1)
    with pytest.raises(UserError, match="cannot stream"):
        OnnxStreamingDetokenizer(small(norm="GN", width=32), 1)
    detokenizer = open_detokenizer("onnx", small(), 1)
    assert isinstance(detokenizer, OnnxStreamingDetokenizer)
    with pytest.raises(UserError, match="tokens from 0 to 239"):
        detokenizer.push([0], torch.tensor([[240]]))
    for backend in ("torch", "onnx:bundle", "tensorrt:engines"):
        assert type(open_detokenizer(backend, small(), 1)) is StreamingDetokenizer
