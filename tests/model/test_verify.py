"""verify_checkpoint: agreement with the model's own outputs, failures when one number changes, bad files refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kinetok.errors import UserError
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.pretrained import load_pretrained, save_pretrained
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.model.verify import verify_checkpoint
from kinetok.motion.skeleton import CANONICAL_OFFSETS

CONFIG = DecoderConfig(n_layer=1, n_head=2, n_embd=16, codebook=240, text_dim=12, block_size=40)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory):
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("verify") / "model"
    tokenizer = MotionTokenizer(TokenizerConfig(nb_code=256, code_dim=8, width=8, depth=2))
    statistics = np.linspace(-1, 1, 272), np.linspace(0.1, 1, 272)
    save_pretrained(folder, tokenizer, MotionDecoder(CONFIG), *statistics, CANONICAL_OFFSETS, {"type": "none"})
    return load_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def arrays(bundle) -> dict[str, np.ndarray]:
    """What the model itself gives: the text has two masked rows, the tokens are greedy."""
    torch.manual_seed(6)
    features, mask = torch.randn(5, 12), torch.tensor([1, 1, 0, 1, 0])
    real = features[mask.bool()]
    ids: list[int] = []
    with torch.inference_mode():
        for _ in range(8):
            tokens = torch.tensor([[CONFIG.pad_id] * 3 + ids])
            logits = bundle.decoder(tokens, real[None], torch.ones(1, 3, dtype=torch.int64))[0, 2:]
            ids.append(int(logits[-1, : CONFIG.codebook].argmax()))
        frames = torch.randn(24, 272)
        indices = bundle.tokenizer.encode(frames[None])[0]
        decoded = bundle.tokenizer.decode(indices[None])[0].double().numpy()
    values = {
        "text_features": features,
        "text_mask": mask,
        "tokens": np.array(ids[:7]),
        "logits": logits,
        "first_logits": logits[0],
        "frames_input": frames,
        "indices": indices,
        "decoded": decoded,
        "motion": decoded * bundle.std + bundle.mean,
    }
    if (logits.argmax(-1) == CONFIG.end_id).any():
        raise AssertionError("choose another seed: the greedy tokens of this one meet the end")
    values["greedy_tokens"] = np.array(ids)
    return {name: np.asarray(value) for name, value in values.items()}


def write(path: Path, arrays: dict[str, np.ndarray], **changes) -> Path:
    np.savez(path, **{name: value for name, value in {**arrays, **changes}.items() if value is not None})
    return path


def test_agreement(bundle, arrays, tmp_path: Path) -> None:
    report = verify_checkpoint(bundle.directory, write(tmp_path / "a.npz", arrays), device="cpu")
    assert report.passed, str(report)
    names = {"first_logits", "logits", "greedy_tokens", "indices", "decoded", "motion"}
    assert {check.name for check in report.checks} == names
    assert "tolerance" in str(report) and "all arrays agree" in str(report)


@pytest.mark.parametrize("name", ["first_logits", "logits", "greedy_tokens", "indices", "decoded", "motion"])
def test_one_changed_number_is_found(bundle, arrays, tmp_path: Path, name: str) -> None:
    changed = arrays[name].copy()
    changed.flat[changed.size // 2] += 1
    report = verify_checkpoint(bundle, write(tmp_path / "a.npz", arrays, **{name: changed}))
    assert not report.passed
    assert name in {check.name for check in report.checks if not check.passed}
    assert "FAIL" in str(report) and "differ" in str(report)


def test_parts_alone_and_other_lengths(bundle, arrays, tmp_path: Path) -> None:
    alone = {name: arrays[name] for name in ("indices", "decoded")}
    assert [check.name for check in verify_checkpoint(bundle, write(tmp_path / "a.npz", alone)).checks] == ["decoded"]
    longer = write(tmp_path / "b.npz", alone, decoded=np.zeros((7, 272)))
    assert "expected the shape" in str(verify_checkpoint(bundle, longer))
    ids = write(tmp_path / "c.npz", {k: arrays[k] for k in ("frames_input",)}, indices=arrays["indices"][:-1])
    assert not verify_checkpoint(bundle, ids).passed


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"other": np.ones(1)}, "unknown arrays"),
        ({"text_features": np.ones((3, 12), dtype=int)}, "text_features to be numbers"),
        ({"text_features": np.ones((3, 11)), "text_mask": None}, r"\[L, 12\]"),
        ({"text_features": np.full((5, 12), np.inf)}, "finite"),
        ({"text_mask": np.ones(4, dtype=int)}, "5 entries"),
        ({"text_mask": np.zeros(5, dtype=int)}, "L > 0"),
        ({"tokens": np.full(7, 240)}, "from 0 to 239"),
        ({"tokens": np.array([1, 2])}, "at most 3 rows"),
        ({"tokens": np.zeros(60, dtype=int)}, "at most 40"),
        ({"tokens": None}, "logits needs tokens"),
        ({"indices": None}, "needs indices"),
        ({"indices": np.array([-1])}, "from 0 to 239"),
        ({"logits": np.array([["a"]])}, "logits to be numbers"),
        ({"logits": np.array([[None]])}, "plain arrays"),
        ({"greedy_tokens": np.array([], dtype=int)}, "greedy_tokens to be whole numbers"),
    ],
)
def test_bad_files_are_refused(bundle, arrays, tmp_path: Path, changes: dict, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        verify_checkpoint(bundle, write(tmp_path / "a.npz", arrays, **changes))
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(bundle, arrays, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to compare"):
        verify_checkpoint(bundle, write(tmp_path / "a.npz", {"text_features": arrays["text_features"]}))
    path = tmp_path / "b.npz"
    for content in (b"", b"text", write(tmp_path / "c.npz", arrays).read_bytes()[:500]):
        path.write_bytes(content)
        with pytest.raises(UserError):
            verify_checkpoint(bundle, path)
    np.save(tmp_path / "d.npy", np.ones(3))
    with pytest.raises(UserError, match="npz"):
        verify_checkpoint(bundle, tmp_path / "d.npy")
    with pytest.raises(UserError):
        verify_checkpoint(bundle, tmp_path / "absent.npz")


def test_end_at_the_first_step(bundle, arrays, tmp_path: Path, monkeypatch) -> None:
    """The reference returns the token 1 when the end comes first."""

    def ended(tokens, features, mask):
        logits = torch.zeros(*tokens.shape, CONFIG.head_rows)
        logits[..., CONFIG.end_id] = 1
        return logits

    monkeypatch.setattr(bundle.decoder, "forward", ended)
    one = {"text_features": arrays["text_features"], "greedy_tokens": np.array([1])}
    assert verify_checkpoint(bundle, write(tmp_path / "a.npz", one)).passed
    assert not verify_checkpoint(bundle, write(tmp_path / "b.npz", one, greedy_tokens=np.array([2]))).passed
