"""A small model with random weights and a bank."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="needs the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")

from kinetok.model.bank import PromptBank
from kinetok.model.pretrained import ModelBundle
from kinetok.motion.skeleton import CANONICAL_OFFSETS

PROMPTS = ("a person walks forward", "a person runs")


@pytest.fixture(scope="session")
def model_of(decoder_of, tokenizer_of, tmp_path_factory) -> Callable[..., ModelBundle]:
    """A model with a bank and no text encoder; keywords change the decoder's sizes."""

    def make(tokenizer: dict[str, Any] | None = None, **decoder: Any) -> ModelBundle:
        torch.manual_seed(3)
        folder = tmp_path_factory.mktemp("model")
        decoder_module = decoder_of(**decoder)
        dim = decoder_module.config.text_dim
        rows = {text: torch.randn(3 + i, dim).half().float() for i, text in enumerate(("", *PROMPTS))}
        PromptBank(rows, name="none", dim=dim).save(folder / "bank.safetensors")
        return ModelBundle(
            tokenizer=tokenizer_of(**(tokenizer or {})),
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
