"""Small models with random weights, and graphs run from memory or from a folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="needs the extra 'onnx'")
ort = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")

from kinetok.model.bank import PromptBank  # noqa: E402
from kinetok.model.config import DecoderConfig, TokenizerConfig  # noqa: E402
from kinetok.model.decoder import MotionDecoder  # noqa: E402
from kinetok.model.graphs.builder import Graph, WeightFile  # noqa: E402
from kinetok.model.pretrained import ModelBundle  # noqa: E402
from kinetok.model.tokenizer import MotionTokenizer  # noqa: E402
from kinetok.motion.skeleton import CANONICAL_OFFSETS  # noqa: E402

TOKENIZER = {"nb_code": 256, "code_dim": 8, "width": 32, "depth": 2, "patcher": "none", "causal": True}
PROMPTS = ("a person walks forward", "a person runs")


def session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def make_decoder(**changes: Any) -> MotionDecoder:
    torch.manual_seed(1)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64, "codebook": 240, "text_dim": 12, "block_size": 40}
    decoder = MotionDecoder(DecoderConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        decoder.embed.weight.mul_(0.5)
        for name, value in decoder.named_parameters():
            if name.endswith("scale"):
                value.add_(torch.randn_like(value) * 0.1)
    return decoder


def make_tokenizer(**changes: Any) -> MotionTokenizer:
    torch.manual_seed(2)
    tokenizer = MotionTokenizer(TokenizerConfig(**{**TOKENIZER, **changes})).eval()
    with torch.no_grad():
        for name, value in [*tokenizer.named_parameters(), *tokenizer.named_buffers()]:
            if "norm" in name and value.is_floating_point():
                value.add_(torch.rand_like(value) * 0.2)
    return tokenizer


@pytest.fixture
def folder_of_graphs(tmp_path) -> Callable[..., dict[str, Any]]:
    """Write graphs that share a weights' file and open them: ``f(build, ...)`` with ``build(weights) -> Graph``."""

    def write(*builders: Callable[[WeightFile], Graph]) -> dict[str, Any]:
        with (tmp_path / "weights.bin").open("wb") as file:
            weights = WeightFile(file, "weights.bin")
            graphs = [build(weights) for build in builders]
        for graph in graphs:
            (tmp_path / f"{graph.name}.onnx").write_bytes(graph.model().SerializeToString())
        return {graph.name: session(tmp_path / f"{graph.name}.onnx") for graph in graphs}

    return write


@pytest.fixture(scope="session")
def model_of(tmp_path_factory) -> Callable[..., ModelBundle]:
    """A model with a bank and no text encoder; keywords change the decoder's sizes."""

    def make(tokenizer: dict[str, Any] | None = None, **decoder: Any) -> ModelBundle:
        torch.manual_seed(3)
        folder = tmp_path_factory.mktemp("model")
        decoder_module = make_decoder(**decoder)
        dim = decoder_module.config.text_dim
        rows = {text: torch.randn(3 + i, dim).half().float() for i, text in enumerate(("", *PROMPTS))}
        PromptBank(rows, name="none", dim=dim).save(folder / "bank.safetensors")
        return ModelBundle(
            tokenizer=make_tokenizer(**(tokenizer or {})),
            decoder=decoder_module,
            mean=np.linspace(-1, 1, 272),
            std=np.linspace(0.5, 2, 272),
            offsets=np.array(CANONICAL_OFFSETS),
            text_encoder={"type": "none", "name": "none"},
            sampling={"guidance": 2.0, "top_p": 0.9},
            provenance={"made": "for a test"},
            licence="none",
            bank=folder / "bank.safetensors",
            directory=folder,
        )

    return make


@pytest.fixture(scope="session")
def decoder_of() -> Callable[..., MotionDecoder]:
    return make_decoder


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[..., MotionTokenizer]:
    return make_tokenizer
