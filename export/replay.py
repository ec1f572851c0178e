"""``kinetok verify``: a bundle's golden fixtures on this machine's ONNX Runtime."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.export.golden import draw_token, scores_of
from kinetok.export.plausible import drawable
from kinetok.model.graphs.builder import MICROSOFT
from kinetok.model.graphs.precision import FP32_ACTIVATIONS
from kinetok.model.verify import Check, Report
from kinetok.runtime.backends.onnx import OnnxBackend, OnnxDetokenizer, open_session
from kinetok.runtime.bundle import Bundle, read_bundle


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """What this machine makes of one fixture.

    arrays: name, kind of tolerance, got and wanted. greedy ``[n + 1, 1, V]`` and sampled ``[m + 1, 1 or 2, V]``: logits
    before each of the golden tokens, which are fed back, and after the last.
    """

    case: Mapping[str, Any]
    arrays: list[tuple[str, str, np.ndarray, np.ndarray]]
    greedy: Tensor
    greedy_tokens: list[int]
    sampled: Tensor
    sampled_tokens: list[int]


def replay(path: str | Path, device: str = "cpu") -> Report:
    """Run every fixture and compare; the report names each check and the first divergence in it.

    Tokens are judged with the golden ones fed back, and one is right that logits within the tolerance may draw: so one
    near-tie does not fail all that follow. Raises ``UserError`` for a bundle that is not intact.
    """
    bundle = read_bundle(path)
    return judge(bundle, run(bundle, device), bundle.section("golden_tolerance"))


def run(bundle: Bundle, device: str = "cpu") -> list[Outputs]:
    """Every fixture of a bundle. Raises ``UserError`` where it has none, or ONNX Runtime cannot run its graphs."""
    if not bundle.manifest["golden"]:
        raise UserError(f"{bundle.directory}: this bundle carries no golden fixtures to replay")
    try:
        return _run(bundle, device)
    except Exception as error:
        # onnxruntime's exceptions have no common base of their own.
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{bundle.directory}: onnxruntime cannot run its graphs: {detail}") from error


def _positions(case: Mapping[str, Any]) -> int:
    """How long a cache a fixture needs."""
    texts = [part["shape"][0] for part in (case["features"], case["empty"]) if part is not None]
    return int(max(texts) + max(case["greedy"]["shape"][0], case["sampled"]["tokens"]["shape"][0]))


def _tokens(bundle: Bundle, reference: Any) -> list[int]:
    tokens, codebook = bundle.tensor(reference), bundle.number("decoder", "codebook")
    if tokens.min() < 0 or tokens.max() >= codebook:
        raise UserError(f"{bundle.directory}: expected golden tokens from 0 to {codebook - 1}")
    return [int(token) for token in tokens]


def _run(bundle: Bundle, device: str) -> list[Outputs]:
    graphs, cases = bundle.section("graphs"), bundle.manifest["golden"]
    backend = OnnxBackend(bundle, 2, max(map(_positions, cases)), device)
    detokenizer = OnnxDetokenizer(bundle, device)
    encoder = open_session(bundle, "text_encoder", backend.device) if "text_encoder" in graphs else None
    results: list[Outputs] = []
    for case in cases:
        wanted = {name: bundle.tensor(case[name]) for name in ("features", "first_logits", "last_logits", "frames")}
        greedy, sampled = (_tokens(bundle, part) for part in (case["greedy"], case["sampled"]["tokens"]))
        text = torch.from_numpy(wanted["features"].copy())
        rows = [text]
        if case["sampled"]["guidance"] != 1.0:
            rows.append(torch.from_numpy(bundle.tensor(case["empty"]).copy()))
        followed = _forced(backend, [text], greedy)
        got = {"first_logits": followed[0, 0].numpy(), "last_logits": followed[-1, 0].numpy()}
        got["frames"] = detokenizer.decode(greedy)
        arrays = [(name, "frames" if name == "frames" else "logits", got[name], wanted[name]) for name in got]
        if not graphs.keys().isdisjoint({"detokenize_stream", "detokenize_ahead"}):
            stream = detokenizer.stream()
            pieces = [*(stream.push(greedy[at : at + 3]) for at in range(0, len(greedy), 3)), stream.finish()]
            arrays.append(("streamed", "frames", np.concatenate(pieces), wanted["frames"]))
        if encoder is not None and "ids" in case:
            ids = bundle.tensor(case["ids"]).astype(np.int64)[None]
            arrays.append(("features", "features", encoder.run(None, {"input_ids": ids})[0][0], wanted["features"]))
        if not results and MICROSOFT in bundle.manifest["domains"]:
            exact = unrounded(bundle, text.numpy(), greedy)
            arrays.append(("weights", "weights", exact, wanted["last_logits"]))
        results.append(
            Outputs(
                case=case,
                arrays=arrays,
                greedy=followed,
                greedy_tokens=greedy,
                sampled=_forced(backend, rows, sampled),
                sampled_tokens=sampled,
            )
        )
    return results


def unrounded(bundle: Bundle, text: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """Logits fp32 ``[V]`` after features ``[L, D]`` and tokens, from graphs whose integer products take fp32 activations.

    8-bit activations are off by more than most changes of a weight would be. On the CPU, whatever the device.
    """
    sessions = {name: _unrounded_session(bundle, name) for name in ("prefill", "decode")}
    facts = {name: bundle.number("decoder", name) for name in ("layers", "heads", "head_dim")}
    shape = (1, facts["heads"], len(text) + len(tokens), facts["head_dim"])
    feeds = {"text_features": text[None], "text_lengths": np.array([len(text)])} | {
        f"past_key_values.{layer}.{kind}": np.zeros(shape, bundle.manifest["kv_dtype"])
        for layer in range(facts["layers"])
        for kind in ("key", "value")
    }
    for at, token in enumerate([None, *tokens]):
        session = sessions["prefill" if token is None else "decode"]
        names = [value.name for value in session.get_outputs()]
        results = dict(zip(names, session.run(names, feeds), strict=True))
        logits = results.pop("logits")[0]
        feeds = {name.replace("present", "past_key_values"): value for name, value in results.items()}
        if at < len(tokens):
            feeds |= {"input_ids": np.array([[tokens[at]]]), "position_ids": np.array([[len(text) + at]])}
    return logits


def _unrounded_session(bundle: Bundle, name: str) -> Any:
    import onnx
    import onnxruntime

    model = onnx.load(str(bundle.graph(name)), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = FP32_ACTIVATIONS
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(bundle.directory.resolve())
    )
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def deviation(outputs: Sequence[Outputs]) -> dict[str, float]:
    """The largest error of each kind, as a part of the largest expected value, at least 1; NaN is infinite."""
    worst: dict[str, float] = {}
    for _, kind, got, wanted in (array for output in outputs for array in output.arrays):
        same = got.shape == wanted.shape
        error = float((np.abs(got.astype(np.float64) - wanted) / _scale(wanted)).max()) if same else np.inf
        worst[kind] = max(worst.get(kind, 0.0), np.inf if np.isnan(error) else error)
    return worst


def judge(bundle: Bundle, outputs: Sequence[Outputs], tolerance: Mapping[str, float]) -> Report:
    """The report on fixtures that were run."""
    end, banned = bundle.number("decoder", "end_id"), bundle.section("decoder")["banned_ids"]
    report = Report(str(bundle.directory))
    for number, output in enumerate(outputs):
        found = {name: _close(got, wanted, tolerance[kind]) for name, kind, got, wanted in output.arrays}
        found["greedy"] = _greedy(output, end, banned, tolerance["logits"])
        found["sampled"] = _sampled(output, end, banned, tolerance["logits"])
        report.checks.extend(Check(f"{number}.{name}", *verdict) for name, verdict in found.items())
    return report


def _scale(wanted: np.ndarray | Tensor) -> float:
    """What errors are parts of."""
    return max(1.0, float(np.abs(np.asarray(wanted)).max()))


def _close(got: np.ndarray, wanted: np.ndarray, tolerance: float) -> tuple[bool, str]:
    if got.shape != wanted.shape:
        return False, f"expected the shape {list(wanted.shape)}, got {list(got.shape)}"
    allowed = tolerance * _scale(wanted)
    difference = np.abs(got.astype(np.float64) - wanted)
    text = f"largest difference {float(difference.max()):.3g}, tolerance {allowed:.3g}"
    wrong = np.argwhere(~(difference <= allowed))  # NaN is wrong too
    if len(wrong):
        text += f"; first beyond it at {wrong[0].tolist()}"
    return not len(wrong), text


def _forced(backend: OnnxBackend, rows: Sequence[Tensor], tokens: Sequence[int]) -> Tensor:
    """fp32 ``[n + 1, rows, V]`` on the CPU: logits after the texts and after each of the tokens."""
    logits = [torch.stack([backend.prefill(slot, row) for slot, row in enumerate(rows)]).cpu()]
    for token in tokens:
        step = torch.full((len(rows),), token, device=backend.device)
        logits.append(backend.decode(range(len(rows)), step).cpu())
    return torch.stack(logits)


def _ended(tokens: list[int], most: int, end: int) -> list[int]:
    """The tokens with the end that a clip shorter than its limit drew."""
    return [*tokens, end] if len(tokens) < most else tokens


def _verdict(wrong: list[int], near: int, count: int) -> tuple[bool, str]:
    text = f"{count} tokens, {near} of them not this machine's but within the tolerance"
    if wrong:
        text += f"; {len(wrong)} differ, first at {wrong[0]}"
    return not wrong, text


def _greedy(output: Outputs, end: int, banned: Sequence[int], tolerance: float) -> tuple[bool, str]:
    tokens, wrong, near = _ended(output.greedy_tokens, int(output.case["most"]), end), [], 0
    # The reference answers an end token at the very first step with the single token 1.
    if output.greedy_tokens == [1] and int(output.greedy[0].argmax()) == end:
        return True, "the end token comes first"
    for at, (token, logits) in enumerate(zip(tokens, output.greedy, strict=False)):
        if not logits.isfinite().all():
            wrong.append(at)
            continue
        scores = scores_of(logits, banned)[0]
        if int(scores.argmax()) != token:
            fine = drawable(token, scores, torch.zeros_like(scores), tolerance * _scale(logits))
            near += fine
            wrong += [] if fine else [at]
    return _verdict(wrong, near, len(tokens))


def _sampled(output: Outputs, end: int, banned: Sequence[int], tolerance: float) -> tuple[bool, str]:
    about = output.case["sampled"]
    tokens, wrong, near = _ended(output.sampled_tokens, int(about["most"]), end), [], 0
    guidance, temperature = float(about["guidance"]), float(about["temperature"])
    stretch = (abs(guidance) + abs(1 - guidance)) / temperature  # what guidance and temperature make of an error
    for at, (token, logits) in enumerate(zip(tokens, output.sampled, strict=False)):
        if not logits.isfinite().all():
            wrong.append(at)
            continue
        drawn, scaled, noise = draw_token(logits, at, about, end, banned)
        if drawn != token:
            slack, top_k, top_p = tolerance * _scale(logits) * stretch, int(about["top_k"]), float(about["top_p"])
            fine = drawable(token, scaled, noise, slack, top_k=top_k, top_p=top_p)
            near += fine
            wrong += [] if fine else [at]
    return _verdict(wrong, near, len(tokens))
