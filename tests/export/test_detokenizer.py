"""The detokenizer's graphs against ``MotionTokenizer.decode``, whole and streamed."""

import numpy as np
import pytest
import torch

from kinetok.errors import UserError
from kinetok.export.detokenizer import DetokenizerExport, context, why_not_streamed

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


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.get("causal", True) and v.get("patcher") != "db2"])
@pytest.mark.parametrize("cuts", [[1, 2, 3, 9], [4, 9], [9]])
def test_a_stream_gives_the_same_frames_wherever_it_is_cut(tokenizer_of, folder_of_graphs, variant, cuts) -> None:
    tokenizer = tokenizer_of(**variant)
    export = DetokenizerExport(tokenizer=tokenizer, mean=MEAN, std=STD)
    states = []

    def build(weights):
        graph, names = export.stream(weights)
        states.extend(names)
        return graph

    session = folder_of_graphs(build)["detokenize_stream"]
    shapes = {value.name: value.shape for value in session.get_inputs()}
    state = {name: np.zeros((2, *shapes[name][1:]), np.float32) for name, _ in states}
    tokens = torch.randint(0, tokenizer.config.codebook, (2, 9))
    pieces, start = [], 0
    outputs = [value.name for value in session.get_outputs()]
    for end in cuts:
        feeds = {"tokens": tokens[:, start:end].numpy(), **state}
        results = dict(zip(outputs, session.run(outputs, feeds), strict=True))
        pieces.append(results["features"])
        state = {name: results[after] for name, after in states}
        start = end
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), wanted(tokenizer, tokens), atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "why"),
    [({"causal": False}, "not causal"), ({"patcher": "db3", "patch_size": 2}, "wraps"), ({"norm": "GN"}, "whole clip")],
)
def test_what_cannot_be_streamed_says_why(tokenizer_of, variant, why) -> None:
    tokenizer = tokenizer_of(**variant)
    assert why in str(why_not_streamed(tokenizer.config))
    with pytest.raises(UserError, match=why):
        DetokenizerExport(tokenizer=tokenizer, mean=MEAN, std=STD).stream(None)  # type: ignore[arg-type]


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
