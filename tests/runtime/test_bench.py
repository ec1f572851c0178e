"""``kinetok.runtime.bench``: peers write the tokens that the weights choose, wrong ones get no speed, figures by hand."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from kinetok.errors import UserError
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.presets import decoder_preset
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.runtime import generate_tokens
from kinetok.runtime.bench import checks, decode, figures, live, record, routes, schema, step, subject, tokenizer
from kinetok.runtime.bench.clock import spread

CPU = torch.device("cpu")
CONFIG = {"n_layer": 2, "n_head": 2, "n_embd": 64, "codebook": 240, "text_dim": 8, "block_size": 64}
TOKENIZER = TokenizerConfig(nb_code=256, code_dim=8, width=8, depth=1, patcher="none")


@pytest.fixture(autouse=True)
def limits(monkeypatch) -> None:
    """Limits that need no measuring."""
    for module in (figures, record, tokenizer):
        monkeypatch.setattr(module, "matmul_rate", lambda device, dtype: 1e11)
    for module in (figures, record):
        monkeypatch.setattr(module, "copy_bandwidth", lambda device: 2e10)
        monkeypatch.setattr(module, "read_bandwidth", lambda device: 1e10)


def tiny_subject(dtype: str = "fp32", seed: int = 3, **changes) -> subject.Subject:
    config = DecoderConfig(**{**CONFIG, **changes})
    model = subject.random_model(config, CPU, subject.activations(dtype, CPU), causal=False)
    decoder = subject.random_decoder(config, CPU, torch.float32, seed)
    torch.manual_seed(1)
    model = replace(model, decoder=decoder, tokenizer=MotionTokenizer(TOKENIZER).eval())
    return subject.Subject(name="tiny", dtype=dtype, model=model, plain=decoder, load_s=0.5)


@pytest.fixture
def tiny(monkeypatch) -> subject.Subject:
    """The model that every measurement loads."""
    made = tiny_subject()
    for module in (decode, step, live):
        monkeypatch.setattr(module, "load", lambda *_, **__: made)
    return made


def settings(**changes) -> decode.DecodeSettings:
    return decode.DecodeSettings(**{"device": CPU, "tokens": (6,), "text": 4, **changes})


def features(batch: int, length: int) -> torch.Tensor:
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("peer", ["uncached", "graph", "hf", "ort"])
def test_every_peer_writes_our_tokens(peer: str, tied: bool) -> None:
    if peer == "ort":
        pytest.importorskip("onnxruntime", reason="the peer ort needs the extra 'onnx'")
    made, text = tiny_subject(tie_weights=tied), features(3, 5)
    asked = settings(tokens=(12,), text=12)
    marks: list[int] = []
    if peer == "graph":  # the step that a GPU would capture
        route = routes.Graph(made.plain, 3, 24, capture=False)
    else:
        route = decode.make(peer, made, asked, 3)
    found = route.run(text, 12, lambda: marks.append(0))
    ours = decode.make("ours", made, asked, 3).run(text, 12, lambda: None)
    assert found.tolist() == ours.tolist() and len(marks) == 12
    drawn = decode.make("ours", made, replace(asked, backend="fused"), 3).run(text, 12, lambda: marks.append(0))
    assert drawn.tolist() == ours.tolist() and len(marks) == 24
    assert checks.greedy(made.plain, text, found)["passed"]
    if not tied:
        assert len(ours.unique()) > 15
        assert ours[0].tolist() == generate_tokens(made.plain, text[0], 12)


def test_the_compiled_peer_writes_our_tokens_and_compiles_once_for_shorter_clips() -> None:
    made, text = tiny_subject(n_layer=1), features(1, 4)
    asked = settings(tokens=(4, 9))
    route = decode.make("compile", made, asked, 1)
    ours = decode.make("ours", made, asked, 1).run(text, 9, lambda: None)
    assert route.run(text, 9, lambda: None).tolist() == ours.tolist()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert route.run(text, 4, lambda: None).tolist() == ours[:, :4].tolist()


def test_a_bundle_is_a_peer_too(tmp_path) -> None:
    pytest.importorskip("onnx", reason="exporting needs the extra 'onnx'")
    from kinetok.export.bundle import export_bundle

    made, text = tiny_subject(), features(2, 4)
    folder = export_bundle(copy.deepcopy(made.model), tmp_path / "bundle", text=False, check=False)
    asked = settings(tokens=(8,), onnx=str(folder))
    found = decode.make("ort", made, asked, 2).run(text, 8, lambda: None)
    assert checks.greedy(made.plain, text, found)["passed"] and len(found.unique()) > 4
    with pytest.raises(routes.CannotRun, match="made from another model"):
        decode.make("ort", tiny_subject(n_layer=1), asked, 2)


def test_a_report_has_every_figure_and_is_json(tiny) -> None:
    said: list[str] = []
    saved: list[int] = []
    asked = settings(batch=(1, 2), tokens=(3, 6), peers=("uncached", "graph"), note="quiet", backend="torch")
    report = decode.measure(asked, said.append, lambda found: saved.append(len(found["rows"])))
    assert [(row["batch"], row["tokens"], row["route"]) for row in report["rows"]] == [
        (batch, tokens, route) for batch in (1, 2) for tokens in (6, 3) for route in ("ours", "uncached")
    ]
    assert saved == [2, 4, 6, 8]  # a measurement that is cut off keeps what it had
    assert schema.violation(report, schema.REPORT) is None
    assert [found["reason"] for found in report["cannot_run"]] == ["a CUDA graph needs a CUDA device"] * 2
    for row in report["rows"]:
        count = row["tokens"]
        assert len(row["seconds"]) == 5 and len(row["itl_ms_by_position"]) == count - 1
        assert row["mbu_read"] == pytest.approx(2 * row["mbu"])
        moved = row["gb_per_s"] * 1e6 * row["median_itl_ms"]
        kv = torch.float32 if row["route"] == "ours" else None
        assert moved == pytest.approx(figures.step_bytes(tiny.plain, row["batch"], 4 + count / 2, kv))
        assert row["check"]["passed"] and row["check"]["distinct_tokens"] > 2 and row["load_s"] == 0.5
        assert row["mean_tpot_ms"] * (count - 1) + row["mean_ttft_ms"] == pytest.approx(row["mean_e2el_ms"])
        # The tokenizer's first frame needs more than three tokens here.
        assert ("median_ttff_ms" in row) == (count == 6) == ("first_frame_tokens" in row)
        if count == 6:
            assert 3 < row["first_frame_tokens"] <= 6 and row["median_ttff_ms"] > row["median_ttft_ms"]
    assert report["rows"][0]["ours_is_faster"] == 1
    assert set(report["characters_in_real_time"]) == {"16.6_ms", "66.7_ms"}
    assert json.loads(json.dumps(report, allow_nan=False))["note"] == "quiet"
    assert len(said) == 10


def test_wrong_tokens_get_no_speed(tiny, monkeypatch) -> None:
    other = routes.Uncached(tiny_subject(seed=4).plain)
    monkeypatch.setattr(decode, "Uncached", lambda decoder: other)
    report = decode.measure(settings(peers=("uncached",)), lambda line: None)
    assert [row["route"] for row in report["rows"]] == ["ours"]
    assert "other tokens" in report["cannot_run"][0]["reason"]
    # Ours are no exception.
    monkeypatch.setattr(decode, "Uncached", routes.Uncached)
    monkeypatch.setattr(decode.Backended, "ours", lambda *_: other)
    report = decode.measure(settings(peers=("uncached",)), lambda line: None)
    assert [row["route"] for row in report["rows"]] == ["uncached"] and "ours_is_faster" not in report["rows"][0]
    assert report["cannot_run"][0]["route"] == "ours"
    assert schema.violation(report, schema.REPORT) is None


def test_a_peer_that_breaks_is_named_and_ours_is_not_hidden(tiny, monkeypatch) -> None:
    def broken(*_) -> None:
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(decode, "Compiled", broken)
    report = decode.measure(settings(peers=("compile",)), lambda line: None)
    assert report["cannot_run"] == [{"route": "compile", "batch": 1, "reason": "RuntimeError: no compiler here"}]
    monkeypatch.setattr(decode.Backended, "ours", broken)
    with pytest.raises(RuntimeError, match="no compiler"):
        decode.measure(settings(), lambda line: None)


def test_too_many_characters_for_the_memory_are_named(tiny, monkeypatch) -> None:
    def full(*_) -> None:
        raise UserError("out of memory: a cache of 2 rows needs more")

    monkeypatch.setattr(decode.Backended, "ours", full)
    monkeypatch.setattr(step, "open_backend", full)
    for found in (
        decode.measure(settings(), lambda line: None),
        step.measure(step.StepSettings(device=CPU, positions=(30,), text=4), lambda line: None),
    ):
        assert found["rows"] == [] and "out of memory" in found["cannot_run"][0]["reason"]
        assert found["characters_in_real_time"] == {"16.6_ms": 0, "66.7_ms": 0}


@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_weights_that_are_no_numbers_get_no_speed(tiny, backend) -> None:
    with torch.no_grad():
        tiny.plain.embed.weight.fill_(torch.nan)
    asked = step.StepSettings(device=CPU, positions=(30,), text=4, backend=backend)
    for found in (
        decode.measure(settings(backend=backend), lambda line: None),
        step.measure(asked, lambda line: None),
    ):
        assert found["rows"] == [] and found["cannot_run"][0]["route"] == "ours"


def test_near_ties_are_told_from_other_tokens() -> None:
    plain, text = tiny_subject().plain, features(1, 4)
    ours = routes.Uncached(plain).run(text, 8, lambda: None)
    found = checks.greedy(plain, text, ours)
    assert found == {
        "passed": True,
        "margin": 0.0,
        "allowed": 1e-3,
        "near_ties": 0,
        "distinct_tokens": len(ours.unique()),
    }
    assert checks.greedy(plain, text, ours, kv=torch.float8_e4m3fn)["allowed"] == checks.FP8_MARGIN
    theirs = ours.clone()
    theirs[0, 7] = (theirs[0, 7] + 1) % 240
    found = checks.greedy(plain, text, theirs)
    assert not found["passed"] and found["near_ties"] == 1 and found["margin"] > 1e-3
    assert checks.greedy(plain, text, theirs, given=7)["near_ties"] == 1
    assert checks.greedy(plain, text, theirs[:, :7])["passed"]
    with torch.no_grad():  # two equal rows of the head: which of the two wins is rounding
        plain.head.weight[int(theirs[0, 7])] = plain.head.weight[int(ours[0, 7])]
        assert checks.greedy(plain, text, theirs)["passed"]
        plain.head.weight.fill_(torch.nan)
    found = checks.greedy(plain, text, ours)
    assert not found["passed"] and found["margin"] is None


def test_step_bytes_and_work_by_hand() -> None:
    plain = tiny_subject().plain
    width = plain.config.mlp_width
    products = 2 * (64 * 192 + 64 * 64 + 64 * 2 * width + width * 64) + 241 * 64
    norms = (2 * 2 + 1) * 64
    assert figures.step_bytes(plain, 3, 10, torch.float32) == 4 * (products + norms + 3 * 64 * (1 + 2 * 2 * 10))
    assert figures.step_bytes(plain, 3, 10, torch.bfloat16) == 4 * (products + norms + 3 * 64 * (1 + 2 * 10))
    assert figures.step_bytes(plain, 1, 10, None) == 4 * (products + norms + 64)
    assert figures.step_work(plain, 3, 10) == 2 * 3 * (products + 2 * 2 * 64 * 10)


@pytest.mark.parametrize(("dtype", "share"), [("int8", 0.27), ("int4", 0.18), ("fp8", 0.27)])
def test_quantised_weights_are_counted_as_stored_and_checked_against_their_values(monkeypatch, dtype, share) -> None:
    small = DecoderConfig(n_layer=2, n_head=4, n_embd=256, codebook=240, text_dim=8, block_size=64)
    monkeypatch.setattr(subject, "decoder_preset", lambda name: small)
    report = decode.measure(settings(dtype=dtype, peers=("uncached",)), lambda line: None)
    assert [(row["route"], row["dtype"], row["kv"]) for row in report["rows"]] == [
        ("ours", dtype, "fp32"),
        ("uncached", "fp32", "none"),
    ]
    made = subject.load("111M", None, CPU, dtype)
    packed, plain = (figures.step_bytes(found, 1, 0, None) for found in (made.model.decoder, made.plain))
    assert 0.7 * share < packed / plain < 1.3 * share
    assert figures.step_work(made.model.decoder, 1, 5) == figures.step_work(made.plain, 1, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peers": ("tgi",)}, "unknown peers"),
        ({"dtype": "fp64"}, "dtype"),
        ({"repeats": 4}, "at least 5"),
        ({"batch": (0,)}, "batch"),
        ({"tokens": (1,)}, "2 tokens"),
    ],
)
def test_bad_settings(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(**changes)


def test_a_clip_that_does_not_fit_is_refused(tiny) -> None:
    with pytest.raises(UserError, match="this model has 64"):
        decode.measure(settings(tokens=(62,)), lambda line: None)
    with pytest.raises(UserError, match="at most 64, this takes 65"):
        step.measure(step.StepSettings(device=CPU, positions=(64,)), lambda line: None)
    with pytest.raises(UserError, match="need at least 22"):
        step.StepSettings(device=CPU, positions=(21,))


@pytest.mark.parametrize(("backend", "kv"), [("torch", "auto"), ("fused", "auto"), ("fused", "fp8")])
def test_steps_at_positions(tiny, monkeypatch, backend, kv) -> None:
    sizes = {"positions": (8, 40), "batch": (1, 3), "text": 4, "steps": 4, "repeats": 5}
    asked = step.StepSettings(device=CPU, backend=backend, kv=kv, **sizes)
    seen: list[tuple[int, list[int]]] = []
    opened = step.open_backend

    def watched(name, model, slots, capacity, kv):
        backend = opened(name, model, slots, capacity, kv)
        method = "decode_and_draw" if name == "fused" else "decode"
        decoded = getattr(backend, method)

        def call(slots, *tokens):
            seen.append((len(slots), sorted({backend.lengths[slot] for slot in slots})))
            return decoded(slots, *tokens)

        setattr(backend, method, call)
        return backend

    monkeypatch.setattr(step, "open_backend", watched)
    report = step.measure(asked, lambda line: None)
    assert schema.violation(report, schema.REPORT) is None
    assert [(row["batch"], row["context"]) for row in report["rows"]] == [(1, 8), (1, 40), (3, 8), (3, 40)]
    assert {row["kv"] for row in report["rows"]} == {"fp8" if kv == "fp8" else "fp32"}
    # Every run passes the same four positions around the one that is asked for, behind one more, all characters at once.
    assert {number for number, _ in seen} == {1, 3}
    assert {at for _, lengths in seen for at in lengths} == {5, 6, 7, 8, 9, 37, 38, 39, 40, 41}
    assert all(len(lengths) == 1 for _, lengths in seen)
    for row in report["rows"]:
        assert row["cost_over_first"] == 1 if row["context"] == 8 else row["cost_over_first"] > 0
        assert row["output_throughput"] == pytest.approx(1e3 * row["batch"] / row["median_itl_ms"])


def test_a_wrong_step_gets_no_speed(tiny, monkeypatch) -> None:
    other = tiny_subject(seed=4)
    opened = step.open_backend
    monkeypatch.setattr(step, "open_backend", lambda name, model, *sizes: opened(name, other.model, *sizes))
    report = step.measure(step.StepSettings(device=CPU, positions=(30,), text=4), lambda line: None)
    assert report["rows"] == [] and "other tokens" in report["cannot_run"][0]["reason"]


def test_a_crowd_that_is_not_its_characters_alone_gets_no_speed(tiny, monkeypatch) -> None:
    asked = live.LiveSettings(preset="111M", device=CPU, seconds=0.5, characters=(2,), text=4, backend="torch")
    found = live.crowd(asked, lambda line: None)
    assert len(found["rows"]) == 1 and schema.violation(found, schema.REPORT) is None
    whole = live.clips
    monkeypatch.setattr(
        live, "clips", lambda engine, requests: [clip + len(requests) for clip in whole(engine, requests)]
    )
    found = live.crowd(asked, lambda line: None)
    assert found["rows"] == [] and "alone" in found["cannot_run"][0]["reason"]
    found = live.stream(asked, lambda line: None)
    assert found["rows"] == [] and "not the clip" in found["cannot_run"][0]["reason"]


def test_a_tokenizer_that_is_wrong_gets_no_speed(monkeypatch) -> None:
    whole = tokenizer.TokenizerSettings(preset="default", device=CPU, tokens=(3,), repeats=5)
    found = tokenizer.measure(whole, lambda line: None)
    assert [row["route"] for row in found["rows"]] == ["decode", "encode"]
    assert schema.violation(found, schema.REPORT) is None
    loaded = tokenizer.load

    def spoilt(asked):
        made = loaded(asked)
        decoded, encoded = made.decode, made.encode
        made.decode = lambda tokens: decoded(tokens) * (1.01 if decoded(tokens).dtype == torch.float32 else 1)
        made.encode = lambda frames: encoded(frames) + 1
        return made

    monkeypatch.setattr(tokenizer, "load", spoilt)
    monkeypatch.setattr(tokenizer.copy, "deepcopy", lambda _: loaded(whole))
    found = tokenizer.measure(whole, lambda line: None)
    assert found["rows"] == [] and len(found["cannot_run"]) == 2


def test_who_keeps_a_deadline() -> None:
    rows = [{"route": "ours", "batch": batch, "p99_itl_ms": 4.0 * batch} for batch in (1, 4, 16, 32)]
    other = {"route": "hf", "batch": 64, "p99_itl_ms": 1.0}
    assert figures.characters([*rows, other]) == {"16.6_ms": 4, "66.7_ms": 16}


def test_spread_by_hand() -> None:
    values = [float(i) for i in range(101)]
    found = spread("itl", values)
    assert found["mean_itl_ms"] == found["median_itl_ms"] == found["p50_itl_ms"] == 50
    assert found["p95_itl_ms"] == 95 and found["p99_itl_ms"] == 99
    assert spread("itl", [2.0])["p99_itl_ms"] == 2.0


def test_a_steps_own_settings_fit_the_papers_models() -> None:
    asked = step.StepSettings(device=CPU)
    assert max(asked.positions) - asked.steps // 2 + asked.steps <= decoder_preset(asked.preset).block_size
