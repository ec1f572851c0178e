"""``kinetok verify``: a bundle's golden fixtures on this machine's ONNX Runtime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.export.golden import draw_token, scores_of
from kinetok.model.verify import Check, Report
from kinetok.runtime.backends.onnx import OnnxBackend, OnnxDetokenizer, open_session
from kinetok.runtime.bundle import Bundle, read_bundle


def replay(path: str | Path, device: str = "cpu") -> Report:
    """Run every fixture and compare; the report names each check and the first divergence in it.

    Tokens are judged with the golden ones fed back: a token differs when another is ahead of it by more than the
    tolerated margin, so one near-tie does not fail all that follow. Raises ``UserError`` for a bundle that is not intact.
    """
    bundle = read_bundle(path)
    tolerance = {name: float(value) for name, value in bundle.section("golden_tolerance").items()}
    cases = bundle.manifest.get("golden")
    if not isinstance(cases, list) or not cases:
        raise UserError(f"{bundle.directory}: this bundle carries no golden fixtures to replay")
    report = Report(str(path))
    backend = OnnxBackend(bundle, 2, bundle.number("decoder", "positions"), device)
    detokenizer = OnnxDetokenizer(bundle, device)
    streamed = "detokenize_stream" in bundle.section("graphs")
    encoder = (
        open_session(bundle, "text_encoder", backend.device) if "text_encoder" in bundle.section("graphs") else None
    )
    for number, case in enumerate(cases):
        if not isinstance(case, dict):
            raise UserError(f"{bundle.directory}: golden fixture {number} is no object")
        arrays = {name: bundle.tensor(case.get(name)) for name in ("features", "first_logits", "greedy", "frames")}

        def add(name: str, passed: bool, text: str, number: int = number) -> None:
            report.checks.append(Check(f"{number}.{name}", passed, text))

        if encoder is not None and "ids" in case:
            ids = bundle.tensor(case["ids"]).astype(np.int64)[None]
            add(
                "features",
                *_close(encoder.run(None, {"input_ids": ids})[0][0], arrays["features"], tolerance["features"]),
            )
        features = torch.from_numpy(arrays["features"].copy())
        first = backend.prefill(0, features)
        add("first_logits", *_close(first.cpu().numpy(), arrays["first_logits"], tolerance["logits"]))
        add("greedy", *_greedy(backend, bundle, first, case, arrays["greedy"], tolerance["margin"]))
        add("sampled", *_sampled(backend, bundle, features, case, tolerance["margin"]))
        tokens = arrays["greedy"].tolist()
        add("frames", *_close(detokenizer.decode(tokens), arrays["frames"], tolerance["frames"]))
        if streamed:
            stream = detokenizer.stream()
            pieces = [stream.push(tokens[at : at + 3]) for at in range(0, len(tokens), 3)]
            add("streamed", *_close(np.concatenate(pieces), arrays["frames"], tolerance["frames"]))
    return report


def _close(got: np.ndarray, wanted: np.ndarray, tolerance: float) -> tuple[bool, str]:
    if got.shape != wanted.shape:
        return False, f"expected the shape {list(wanted.shape)}, got {list(got.shape)}"
    allowed = tolerance * max(1.0, float(np.abs(wanted).max()))
    difference = np.abs(got.astype(np.float64) - wanted)
    worst = float(difference.max())
    text = f"largest difference {worst:.3g}, tolerance {allowed:.3g}"
    wrong = np.argwhere(~(difference <= allowed))  # NaN is wrong too
    if len(wrong):
        text += f"; first beyond it at {wrong[0].tolist()}"
    return not len(wrong), text


def _judge(gaps: list[float], allowed: float) -> tuple[bool, str]:
    """gaps: by how much each golden token is behind the best; NaN where it cannot be drawn at all."""
    wrong = [at for at, gap in enumerate(gaps) if not gap <= allowed]
    ties = sum(0 < gap <= allowed for gap in gaps)
    text = f"{len(gaps)} tokens, {ties} of them second by less than {allowed:.2g}"
    if wrong:
        text += f"; {len(wrong)} differ, first at {wrong[0]} (behind by {gaps[wrong[0]]:.3g})"
    return not wrong, text


def _greedy(
    backend: OnnxBackend, bundle: Bundle, logits: Tensor, case: Mapping[str, Any], tokens: np.ndarray, margin: float
) -> tuple[bool, str]:
    """Slot 0 stands after the text, with ``logits``."""
    end = bundle.number("decoder", "end_id")
    expected = [*tokens.tolist(), end] if len(tokens) < int(case.get("most", len(tokens))) else tokens.tolist()
    # The reference answers an end token at the very first step with the single token 1.
    if tokens.tolist() == [1] and int(logits.argmax()) == end:
        return True, "the end token comes first"
    gaps, largest = [], 1.0
    for at, token in enumerate(expected):
        scores = scores_of(logits[None], _banned(bundle))[0]
        largest = max(largest, float(logits.abs().max()))
        gaps.append(float(scores.max() - scores[token]))
        if at + 1 < len(expected):
            logits = backend.decode([0], torch.tensor([token], device=backend.device))[0]
    return _judge(gaps, margin * largest)


def _sampled(
    backend: OnnxBackend, bundle: Bundle, features: Tensor, case: Mapping[str, Any], margin: float
) -> tuple[bool, str]:
    about = bundle.section("sampled", case)
    tokens = bundle.tensor(about.get("tokens")).tolist()
    guidance, end = float(about["guidance"]), bundle.number("decoder", "end_id")
    rows = [features]
    if guidance != 1.0:
        rows.append(torch.from_numpy(bundle.tensor(case.get("empty")).copy()))
    logits = torch.stack([backend.prefill(slot, row) for slot, row in enumerate(rows)])
    if len(tokens) < int(about["most"]):
        tokens = [*tokens, end]
    gaps, largest = [], 1.0
    for at, token in enumerate(tokens):
        drawn, noisy = draw_token(logits, at, about, end, _banned(bundle))
        largest = max(largest, float(logits.abs().max()))
        gaps.append(0.0 if drawn == token else abs(float(noisy[drawn] - noisy[token])))
        if at + 1 < len(tokens):
            step = torch.full((len(rows),), token, device=backend.device)
            logits = backend.decode(range(len(rows)), step)
    return _judge(gaps, margin * largest)


def _banned(bundle: Bundle) -> list[int]:
    return list(bundle.section("decoder").get("banned_ids", []))
