"""The detokenizer's graphs against ``MotionTokenizer.decode``, whole and streamed."""

import numpy as np
import pytest
import torch

from kinetok.errors import UserError
from kinetok.model.graphs.detokenizer import DetokenizerExport, context

MEAN, STD = np.linspace(-1, 1, 272), np.linspace(0.5, 2, 272)
VARIANTS = [
    {},
    {"causal": False},
    {"patcher": "haar", "patch_size": 4, "norm": "BN", "activation": "silu"},
    {"patcher": "rearrange", "patch_size": 2, "norm": "none", "activation": "gelu"},
    {"patcher": "db2", "patch_size": 4},
    {"norm": "GN", "causal": False, "kernel_size": 5},
    {"down_t": 2, "depth": 3, "code_dim": 3},
    {"stride_t": 1, "patcher": "haar", "patch_size": 2},
]
IDS = [", ".join(f"{k} {v}" for k, v in variant.items()) or "default" for variant in VARIANTS]


def wanted(tokenizer, tokens):
    with torch.inference_mode():
        return tokenizer.decode(tokens).double().numpy() * STD + MEAN


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
@pytest.mark.parametrize("opset", [18, 23])
def test_a_whole_clip(tokenizer_of, folder_of_graphs, variant, opset) -> None:
    tokenizer = tokenizer_of(**variant)
    export = DetokenizerExport(tokenizer=tokenizer, mean=MEAN, std=STD, opset=opset)
    tokens = torch.randint(0, tokenizer.config.codebook, (2, 9))
    got = folder_of_graphs(export.whole)["detokenize"].run(None, {"tokens": tokens.numpy()})[0]
    np.testing.assert_allclose(got, wanted(tokenizer, tokens), atol=1e-5)


STREAMED = [variant for variant in VARIANTS if variant.get("patcher") != "db2" and variant.get("norm") != "GN"]
STREAMED += [
    {"causal": False, "kernel_size": 5, "norm": "BN", "patcher": "haar", "patch_size": 2},
    {"causal": False, "down_t": 2, "patcher": "rearrange", "patch_size": 4},
]


def push(session, names, state, tokens, clip):
    """Frames and the next state."""
    outputs = [value.name for value in session.get_outputs()]
    results = dict(zip(outputs, session.run(outputs, {"tokens": tokens, **clip, **state}), strict=True))
    return results["features"], {name: results[after] for name, after in names}


@pytest.mark.parametrize("variant", STREAMED)
@pytest.mark.parametrize("cuts", [[1, 2, 3, 9], [4, 9], [9]])
@pytest.mark.parametrize("opset", [18, 23])
def test_a_stream_gives_the_same_frames_wherever_it_is_cut(
    tokenizer_of, folder_of_graphs, variant, cuts, opset
) -> None:
    """Two rows; where the tokenizer looks ahead, the second one's clip starts two tokens after the first one's."""
    tokenizer = tokenizer_of(**variant)
    export = DetokenizerExport(tokenizer=tokenizer, mean=MEAN, std=STD, opset=opset)
    built = []

    def build(weights):
        built.append(export.stream(weights))
        return built[0].graph

    ((name, session),) = folder_of_graphs(build).items()
    stream, unit = built[0], tokenizer.config.frames_per_token
    assert name == ("detokenize_stream" if tokenizer.config.causal else "detokenize_ahead")
    shapes = {value.name: value.shape for value in session.get_inputs()}
    state = {name: np.zeros((2, *shapes[name][1:]), np.float32) for name, _ in stream.states}
    tokens = torch.randint(0, tokenizer.config.codebook, (2, 9))
    ids, pieces, start = tokens.numpy(), [], 0
    if tokenizer.config.causal:
        assert stream.delay_frames == 0
        for end in cuts:
            frames, state = push(session, stream.states, state, ids[:, start:end], {})
            pieces.append(frames)
            start = end
        np.testing.assert_allclose(np.concatenate(pieces, axis=1), wanted(tokenizer, tokens), atol=1e-5)
        return
    late, total = 2, 9  # the second row is a clip of seven tokens
    missing = -(-stream.delay_frames // unit)
    ids = np.concatenate((ids, np.ones((2, missing), np.int64)), axis=1)
    for end in [*cuts, total + missing]:
        ends = np.array([total, total - late]) if end > total else np.full(2, 1 << 40)
        clip = {"position": np.array([start, start - late]), "end": ends}
        frames, state = push(session, stream.states, state, ids[:, start:end], clip)
        pieces.append(frames)
        start = end
    got = np.concatenate(pieces, axis=1)[:, stream.delay_frames :]
    np.testing.assert_allclose(got[0, : total * unit], wanted(tokenizer, tokens[:1])[0], atol=1e-5)
    behind = got[1, late * unit : total * unit]
    np.testing.assert_allclose(behind, wanted(tokenizer, tokens[1:, late:])[0], atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "why"),
    [({"patcher": "db3", "patch_size": 2}, "wraps around"), ({"norm": "GN"}, "whole clip")],
)
def test_what_cannot_be_streamed_says_why(tokenizer_of, variant, why) -> None:
    with pytest.raises(UserError, match=why):
        DetokenizerExport(tokenizer=tokenizer_of(**variant), mean=MEAN, std=STD).stream(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", [VARIANTS[i] for i in (0, 1, 2, 3, 6, 7)])
def test_the_context_is_what_frames_depend_on(tokenizer_of, variant) -> None:
    """Changing a token moves frames of every token within its reach, and of none beyond."""
    tokenizer = tokenizer_of(**variant)
    past, ahead = context(tokenizer)
    per, at, total = tokenizer.config.frames_per_token, 60, 120
    assert at + past + 2 < total and at - ahead - 2 > 0
    torch.manual_seed(0)
    tokens = torch.randint(0, tokenizer.config.codebook, (1, total))
    changed = tokens.clone()
    changed[0, at] = (tokens[0, at] + tokenizer.config.codebook // 2) % tokenizer.config.codebook
    with torch.inference_mode():
        moved = tokenizer.decode(tokens) - tokenizer.decode(changed)
    touched = np.nonzero(moved[0].abs().amax(1).numpy())[0] // per
    assert touched.min() >= at - ahead and touched.max() <= at + past
    assert touched.max() >= at + past - 1 and touched.min() <= at - ahead + (ahead > 0)
