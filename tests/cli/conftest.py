"""A tiny model with random weights and a prompt bank, and the command line called in this process."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from kinetok.cli import main
from kinetok.model.bank import PromptBank
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.pretrained import save_pretrained
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion.skeleton import CANONICAL_OFFSETS

PROMPTS = ("a person walks forward", "a person runs", "a person waves")


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def kinetok(monkeypatch, capsys):
    """Call ``kinetok(*arguments)``: its exit code and what it printed."""

    def call(*arguments) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["kinetok", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return Outcome(ended.value.code or 0, printed.out, printed.err)

    return call


@pytest.fixture
def refused(kinetok):
    """Call and expect exit code 2 with one line on standard error and nothing on standard output; returns the line."""

    def call(*arguments) -> str:
        outcome = kinetok(*arguments)
        assert outcome.code == 2, outcome
        assert outcome.out == ""
        assert outcome.err.startswith("kinetok: ") and outcome.err.count("\n") == 1, outcome.err
        assert "Traceback" not in outcome.err
        return outcome.err

    return call


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    bank = PromptBank({text: torch.randn(3 + i, 12) for i, text in enumerate(("", *PROMPTS))}, name="none", dim=12)
    folder = tmp_path_factory.mktemp("model")
    bank.save(folder / "bank.safetensors")
    tokenizer = TokenizerConfig(nb_code=256, code_dim=8, width=8, depth=1, patcher="none")
    decoder = DecoderConfig(n_layer=1, n_head=2, n_embd=16, codebook=tokenizer.codebook, text_dim=12)
    return save_pretrained(
        folder / "tiny",
        tokenizer=MotionTokenizer(tokenizer).eval(),
        decoder=MotionDecoder(decoder).eval(),
        mean=np.zeros(272),
        std=np.full(272, 0.05),
        skeleton_offsets=CANONICAL_OFFSETS,
        text_encoder={"type": "none", "name": "none", "dim": 12},
        bank=folder / "bank.safetensors",
    )
