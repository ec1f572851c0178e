"""Fixtures shared by all tests."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def decoder_of() -> Callable[..., Any]:
    """Makes a small ``MotionDecoder`` with random weights; keywords change its sizes."""
    from kinetok.model.config import DecoderConfig
    from kinetok.model.decoder import MotionDecoder

    def make(**changes: Any) -> MotionDecoder:
        torch.manual_seed(1)
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64, "codebook": 240, "text_dim": 12, "block_size": 40}
        decoder = MotionDecoder(DecoderConfig(**{**sizes, **changes})).eval()
        with torch.no_grad():
            decoder.embed.weight.mul_(0.5)
            for name, value in decoder.named_parameters():
                if name.endswith("scale"):
                    value.add_(torch.randn_like(value) * 0.1)
        return decoder

    return make


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[..., Any]:
    """Makes a small ``MotionTokenizer`` with random weights; keywords change its form."""
    from kinetok.model.config import TokenizerConfig
    from kinetok.model.tokenizer import MotionTokenizer

    def make(**changes: Any) -> MotionTokenizer:
        torch.manual_seed(2)
        form = {"nb_code": 256, "code_dim": 8, "width": 32, "depth": 2, "patcher": "none", "causal": True}
        tokenizer = MotionTokenizer(TokenizerConfig(**{**form, **changes})).eval()
        with torch.no_grad():
            for name, value in [*tokenizer.named_parameters(), *tokenizer.named_buffers()]:
                if "norm" in name and value.is_floating_point():
                    value.add_(torch.rand_like(value) * 0.2)
        return tokenizer

    return make


@pytest.fixture
def interpreted_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels loop to computed bounds under Triton's interpreter; skips without triton, does nothing on a GPU.

    Triton 3.6 makes a bound's number of an array of one, shape ``[1]``, which NumPy 2.4 refuses; later ones squeeze it first.
    """
    pytest.importorskip("triton", reason="triton is not installed, so there are no kernels to run")
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)


@pytest.fixture
def folder_of_graphs(tmp_path) -> Callable[..., dict[str, Any]]:
    """Write graphs that share a weights' file and open them: ``f(build, ...)`` with ``build(weights) -> Graph``."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    from kinetok.model.graphs.builder import WeightFile

    def opened(path: Path) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def write(*builders: Callable[..., Any]) -> dict[str, Any]:
        with (tmp_path / "weights.bin").open("wb") as file:
            weights = WeightFile(file, "weights.bin")
            graphs = [build(weights) for build in builders]
        for graph in graphs:
            (tmp_path / f"{graph.name}.onnx").write_bytes(graph.model().SerializeToString())
        return {graph.name: opened(tmp_path / f"{graph.name}.onnx") for graph in graphs}

    return write
