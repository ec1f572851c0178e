"""Fixtures shared by all tests."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton, which decides then how its kernels run
    os.environ["TRITON_INTERPRET"] = "1"

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell leaves it to its background jobs; Ctrl-C is tested
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
# ``python -m pytest`` puts the current folder first, where transformers would take our bare kernels/ for a package of its own.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
SHIPPED = ROOT / "tests" / "golden"
NOT_SHIPPED = ROOT.parent / "shared" / "reference" / "golden"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """Path of a golden file by name; skips, saying why, where only the development machines have it."""

    def find(name: str) -> Path:
        for folder in (SHIPPED, NOT_SHIPPED):
            if (folder / name).exists():
                return folder / name
        pytest.skip(f"{name} is not in tests/golden: its arrays derive from a body model that may not be redistributed")

    return find


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory) -> Callable[..., Path]:
    """Writes a tiny random Flan-T5 with a tiny tokenizer; keywords change its sizes."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    def write(**changes: object) -> Path:
        path = tmp_path_factory.mktemp("t5")
        words = [(f"▁{word}", -2.0) for word in ("a", "person", "walks", "forward", "runs")]
        letters = [(letter, -5.0) for letter in "▁abcdefghij"]
        vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words, *letters]
        tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(path)
        torch.manual_seed(0)
        sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
        kinds = {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
        config = transformers.T5Config(vocab_size=len(vocabulary), **{**sizes, **kinds, **changes})
        transformers.T5ForConditionalGeneration(config).save_pretrained(path)  # with its decoder, as released
        return path

    return write
