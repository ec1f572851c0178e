"""Compare a model directory with arrays saved from the authors' code (docs/checkpoints.md has the file's layout)."""

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.model.pretrained import ModelBundle, load_pretrained

LOGIT_TOLERANCE = 1e-3
FRAME_TOLERANCE = 1e-3
"""Relative to the largest expected value, or to 1 when that is smaller; ids have no tolerance."""

_KINDS = {
    "text_features": ("f", 2),
    "text_mask": ("iub", 1),
    "greedy_tokens": ("iu", 1),
    "first_logits": ("f", 1),
    "tokens": ("iu", 1),
    "logits": ("f", 2),
    "frames_input": ("f", 2),
    "indices": ("iu", 1),
    "decoded": ("f", 2),
    "motion": ("f", 2),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One compared array: the largest difference and what was allowed, or the count of wrong ids."""

    name: str
    passed: bool
    text: str


@dataclass(frozen=True, slots=True)
class Report:
    """What was compared. ``str(report)`` is one line per array and a verdict."""

    source: str
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def divergence(self) -> Check | None:
        """The first check that failed."""
        return next((check for check in self.checks if not check.passed), None)

    def __str__(self) -> str:
        lines = [f"{'pass' if check.passed else 'FAIL'}  {check.name:<14} {check.text}" for check in self.checks]
        failed = sum(not check.passed for check in self.checks)
        verdict = "all arrays agree" if self.passed else f"{failed} of {len(self.checks)} arrays differ"
        return "\n".join([*lines, f"{self.source}: {verdict}"])


def verify_checkpoint(
    model: str | Path | ModelBundle, against: str | Path, *, device: str | torch.device = "auto", dtype: str = "float32"
) -> Report:
    """Run a model on the inputs of an ``.npz`` file and compare with the outputs in it.

    Every array is optional, but at least one output must be there with the inputs it needs. Raises ``UserError`` for a
    file of another layout; a disagreement is not an error but a failed check in the report.
    """
    arrays = _read(against)
    bundle = model if isinstance(model, ModelBundle) else load_pretrained(model, device=device, dtype=dtype)
    report = Report(str(against))
    with torch.inference_mode():
        _decoder_checks(bundle, arrays, report)
        _tokenizer_checks(bundle, arrays, report)
    if not report.checks:
        raise UserError(
            f"{against}: nothing to compare: give greedy_tokens, first_logits, logits, indices, decoded or motion"
        )
    return report


def _read(path: str | Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(file.files)
            unknown = sorted(set(names) - set(_KINDS))
            if unknown:
                raise UserError(f"{path}: unknown arrays {unknown[:8]}, expected some of {list(_KINDS)}")
            arrays = {name: file[name] for name in names}
    except UserError:
        raise
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        detail = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: expected an .npz file of plain arrays, got something else ({detail})") from error
    for name, array in arrays.items():
        kinds, axes = _KINDS[name]
        if array.dtype.kind not in kinds or array.ndim != axes or array.size == 0:
            wanted = "numbers" if "f" in kinds else "whole numbers"
            raise UserError(f"{path}: expected {name} to be {wanted} with {axes} axes, got {array.dtype} {array.shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(f"{path}: expected {name} to be finite, got NaN or infinity")
    needs = {
        "text_mask": ("text_features",),
        "greedy_tokens": ("text_features",),
        "first_logits": ("text_features",),
        "logits": ("text_features", "tokens"),
        "tokens": ("text_features", "logits"),
        "frames_input": ("indices",),
        "decoded": ("indices",),
        "motion": ("indices",),
    }
    for name, others in needs.items():
        missing = [other for other in others if other not in arrays]
        if name in arrays and missing:
            raise UserError(f"{path}: {name} needs {' and '.join(missing)} beside it")
    return arrays


def _decoder_checks(bundle: ModelBundle, arrays: Mapping[str, np.ndarray], report: Report) -> None:
    if "text_features" not in arrays:
        return
    features = arrays["text_features"]
    if "text_mask" in arrays:
        if arrays["text_mask"].shape != features.shape[:1]:
            raise UserError(f"expected text_mask to have {len(features)} entries, got {arrays['text_mask'].shape[0]}")
        features = features[arrays["text_mask"].astype(bool)]
    config = bundle.decoder.config
    if features.shape[1] != config.text_dim or not len(features):
        raise UserError(f"expected text_features [L, {config.text_dim}] with L > 0, got {list(features.shape)}")
    if "first_logits" in arrays:
        report.checks.append(
            _close("first_logits", _logits(bundle, features, np.empty(0, int))[0], arrays, LOGIT_TOLERANCE)
        )
    if "logits" in arrays:
        steps = len(arrays["logits"])
        if steps > len(arrays["tokens"]) + 1:
            raise UserError(f"expected at most {len(arrays['tokens']) + 1} rows of logits (tokens + 1), got {steps}")
        report.checks.append(
            _close("logits", _logits(bundle, features, arrays["tokens"])[:steps], arrays, LOGIT_TOLERANCE)
        )
    if "greedy_tokens" in arrays:
        report.checks.append(_greedy(bundle, features, arrays["greedy_tokens"]))


def _logits(bundle: ModelBundle, features: np.ndarray, tokens: np.ndarray) -> Tensor:
    """Logits ``[n + 1, head rows]``: row i follows the text and the first i tokens."""
    decoder, config = bundle.decoder, bundle.decoder.config
    if len(features) + len(tokens) > config.block_size:
        got = f"{len(features)} + {len(tokens)}"
        raise UserError(f"expected at most {config.block_size} text and motion positions, got {got}")
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < config.codebook:
        raise UserError(f"expected tokens from 0 to {config.codebook - 1}, got {tokens.min()} to {tokens.max()}")
    weight = next(decoder.parameters())
    ids = np.concatenate([np.full(len(features), config.pad_id), tokens.astype(np.int64)])
    text = torch.from_numpy(np.ascontiguousarray(features)).to(weight.device, weight.dtype)
    mask = torch.ones(1, len(features), dtype=torch.int64, device=weight.device)
    logits = decoder(torch.from_numpy(ids).to(weight.device)[None], text[None], mask)
    return logits[0, len(features) - 1 :].float().cpu()


def _greedy(bundle: ModelBundle, features: np.ndarray, tokens: np.ndarray) -> Check:
    """Greedy tokens, by feeding them: each must be the arg-max after those before it."""
    end = bundle.decoder.config.end_id
    logits = _logits(bundle, features, tokens[:-1])
    chosen = logits.argmax(-1).numpy()
    # The reference answers an end token at the very first step with the single token 1.
    if len(tokens) == 1 and tokens[0] == 1 and chosen[0] == end:
        return Check("greedy_tokens", True, "ids exact: the end token comes first, which the reference returns as [1]")
    wrong = np.nonzero(chosen != tokens)[0]
    if not len(wrong):
        return Check("greedy_tokens", True, f"ids exact: {len(tokens)} of {len(tokens)}")
    at = int(wrong[0])
    margin = float(logits[at, chosen[at]] - logits[at, int(tokens[at])])
    text = f"ids must be exact: {len(wrong)} of {len(tokens)} differ, first at {at} (by {margin:.2g} in the logits)"
    return Check("greedy_tokens", False, text)


def _tokenizer_checks(bundle: ModelBundle, arrays: Mapping[str, np.ndarray], report: Report) -> None:
    if "indices" not in arrays:
        return
    tokenizer = bundle.tokenizer
    weight = next(tokenizer.parameters())
    indices = torch.from_numpy(arrays["indices"].astype(np.int64)).to(weight.device)
    if "frames_input" in arrays:
        frames = torch.from_numpy(arrays["frames_input"]).to(weight.device, weight.dtype)
        got = tokenizer.encode(frames[None])[0].long()
        if got.shape != indices.shape:
            check = Check("indices", False, f"expected {len(indices)} ids, got {len(got)}")
        else:
            wrong = int((got != indices).sum())
            check = Check("indices", not wrong, f"ids must be exact: {wrong} of {len(indices)} differ")
        report.checks.append(check)
    if "decoded" in arrays or "motion" in arrays:
        decoded = tokenizer.decode(indices[None])[0].double().cpu()
        if "decoded" in arrays:
            report.checks.append(_close("decoded", decoded, arrays, FRAME_TOLERANCE))
        if "motion" in arrays:
            motion = decoded * torch.from_numpy(bundle.std) + torch.from_numpy(bundle.mean)
            report.checks.append(_close("motion", motion, arrays, FRAME_TOLERANCE))


def _close(name: str, got: Tensor, arrays: Mapping[str, np.ndarray], tolerance: float) -> Check:
    wanted = torch.from_numpy(arrays[name].astype(np.float64))
    if got.shape != wanted.shape:
        return Check(name, False, f"expected the shape {list(wanted.shape)}, got {list(got.shape)}")
    allowed = tolerance * max(1.0, float(wanted.abs().max()))
    difference = float((got.double() - wanted).abs().max())
    return Check(name, difference <= allowed, f"largest difference {difference:.3g}, tolerance {allowed:.3g}")
