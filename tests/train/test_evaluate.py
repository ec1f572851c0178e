"""The evaluation: its draws, its refusals, and a toy run that is cut off and goes on."""

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.model.bank import PromptBank
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.evaluator import Evaluator, EvaluatorConfig
from kinetok.model.pretrained import save_pretrained
from kinetok.model.text_minilm import PACKAGE
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion import Motion
from kinetok.motion.skeleton import CANONICAL_OFFSETS
from kinetok.runtime import Engine, load
from kinetok.train.charts import Bar, Group, bar_chart
from kinetok.train.clip_cache import CachedEngine
from kinetok.train.data.store import Clip
from kinetok.train.evaluate import Row, Sample, Settings, check_clips, distinct_pairs, evaluate, judge, quick
from kinetok.train.evaluation_page import COLUMNS, read_result, write_page, write_result
from kinetok.train.evaluator import SmallEvaluator

BANKED = ("a person stands still", "a person walks forward")
CAPTIONS = ("a person bows", "someone bows", "a person sways", "someone sways", "a person nods", "someone nods")


def swaying(seed: int, frames: int = 40) -> np.ndarray:
    rng = np.random.default_rng(seed)
    angles = np.sin(np.linspace(0, 6, frames)[:, None] + rng.uniform(0, 3, 22)) * rng.uniform(0, 0.3, 22)
    rotations = np.tile(np.eye(3), (frames, 22, 1, 1))
    rotations[..., 0, 0] = rotations[..., 1, 1] = np.cos(angles)
    rotations[..., 1, 0] = np.sin(angles)
    rotations[..., 0, 1] = -np.sin(angles)
    return Motion(rotations=rotations, root=np.tile([0.0, 0.95, 0.0], (frames, 1))).features


def clip(number: int, split: str, captions: tuple[str, ...] | None = None) -> Clip:
    x = swaying(number)
    first = 2 * (number % 3)
    return Clip(
        id=str(number), subject=split, label="sway", split=split, captions=captions or CAPTIONS[first : first + 2],
        heading_flips=0, features=x, mirrored=x,
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Random weights; all its sentences are in the bank."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    bank = PromptBank({text: torch.randn(3, 12) for text in ("", *BANKED, *CAPTIONS)}, name="none", dim=12)
    bank.save(folder / "bank.safetensors")
    tokenizer = TokenizerConfig(nb_code=256, code_dim=8, width=8, depth=1, patcher="none")
    decoder = DecoderConfig(n_layer=1, n_head=2, n_embd=16, codebook=tokenizer.codebook, text_dim=12)
    made = save_pretrained(
        folder / "tiny", tokenizer=MotionTokenizer(tokenizer).eval(), decoder=MotionDecoder(decoder).eval(),
        mean=np.zeros(272), std=np.full(272, 0.05), skeleton_offsets=CANONICAL_OFFSETS,
        text_encoder={"type": "none", "name": "none"}, bank=folder / "bank.safetensors", provenance={"recipe": "none"},
    )  # fmt: skip
    return load(made, device="cpu")


@settings(deadline=None, max_examples=40)
@given(
    sets=st.lists(st.sets(st.integers(0, 7), min_size=1, max_size=4), min_size=1, max_size=9), seed=st.integers(0, 99)
)
def test_pairs_are_distinct_and_as_many_as_there_can_be(sets: list[set[int]], seed: int) -> None:
    captions = [tuple(map(str, sorted(one))) for one in sets]
    pairs = distinct_pairs(captions, np.random.default_rng(seed))
    assert len({i for i, _ in pairs}) == len({text for _, text in pairs}) == len(pairs)
    assert all(text in captions[i] for i, text in pairs)
    assert len(distinct_pairs(captions, np.random.default_rng(seed), 2)) == min(2, len(pairs))
    csgraph = pytest.importorskip("scipy.sparse.csgraph", reason="scipy, the oracle, is not installed")
    sparse = pytest.importorskip("scipy.sparse", reason="scipy, the oracle, is not installed")
    edges = sparse.csr_matrix([[int(column in one) for column in range(8)] for one in sets])
    assert len(pairs) == (csgraph.maximum_bipartite_matching(edges) >= 0).sum()


def test_clips_that_cannot_be_evaluated_are_named() -> None:
    good = [clip(0, "train"), clip(1, "test")]
    assert check_clips(good, "test") == good[1:]
    nan = good[1].features.copy()
    nan[7, 3] = np.nan
    for clips, words in (
        ([*good, good[0]], "'0' occurs twice"),
        ([good[0], replace(good[1], captions=())], "'1': expected at least one caption"),
        ([good[0], replace(good[1], features=good[1].features[:, :263])], r"'1': expected \[T, 272\].*\[40, 263\]"),
        ([good[0], replace(good[1], features=nan)], "'1': .* NaN or infinity in frame 7"),
        (good[:1], r"split 'test', found none; there are \['train'\]"),
        ([], "no clips at all"),
    ):
        with pytest.raises(UserError, match=words):
            check_clips(clips, "test")


def points(seed: int, spread: float = 1.0) -> list[Sample]:
    at = spread * np.random.default_rng(seed).standard_normal((12, 6))
    return [Sample(row.astype(np.float32), {"jerk": float(i)}) for i, row in enumerate(at)]


def row(name: str, samples: list[Sample], several: np.ndarray | None = None) -> Row:
    captions = [(f"text {i}",) for i in range(12)]
    pick = lambda i, text, rng: samples[i]  # noqa: E731
    return Row(name=name, title=name, captions=captions, pick=pick, several=several)


def test_judged_rows_are_what_they_were_made_to_be() -> None:
    true, other = points(0), points(1)
    words = {f"text {i}": sample.embedding for i, sample in enumerate(true)}
    same = [other[0]] * 12
    chosen = Settings(repeats=20, pool=8, pairs=2, dimensions=3)
    modes = np.stack([np.stack([s.embedding] * 5) for s in true])
    result = judge([row("real", true), row("train", other), row("one", same), row("again", true, modes)], words, chosen)
    assert (result["pool"], result["drawn"], result["dimensions"]) == (8, 12, 3)
    real, train, one, again = (item["figures"] for item in result["rows"])
    assert real["r_precision_1"]["mean"] == 1 and real["matching"]["mean"] == 0
    assert train["r_precision_3"]["mean"] < 0.8 and train["fid"]["mean"] > real["fid"]["mean"]
    assert one["r_precision_3"]["mean"] < 0.5 and one["diversity"]["mean"] == 0
    # Equal motions get equal pools and draws, so rows differ by their motions alone.
    assert {k: v for k, v in again.items() if k != "multimodality"} == {
        k: v for k, v in real.items() if k != "multimodality"
    }
    assert again["multimodality"]["mean"] == 0 and real["multimodality"] is None and real["mpjpe_mm"] is None
    assert real["jerk"]["low"] < 5.5 < real["jerk"]["high"] and real["jerk"]["repeats"] == 20
    few = [row("real", true)] * 2
    with pytest.raises(UserError, match=r"at least 4 distinct captions .* got 3"):
        judge(few, words, replace(chosen, pool=3))


def test_clips_are_generated_once(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    cached = CachedEngine(engine, tmp_path, lambda: told.append(1))
    (first,) = cached.generate(BANKED[0], seed=3, seconds=1)
    np.testing.assert_array_equal(first.features, engine.generate(BANKED[0], seed=3, seconds=1)[0].features)
    monkeypatch.setattr(Engine, "generate", None)
    (again,) = CachedEngine(engine, tmp_path, lambda: told.append(1)).generate(BANKED[0], seed=3, seconds=1)
    np.testing.assert_array_equal(again.features, first.features)
    np.testing.assert_array_equal(again.joints, first.joints)
    assert again.text == BANKED[0] and len(told) == 2
    for changes in ({"seed": 4}, {"temperature": 0.5}):
        with pytest.raises(TypeError):
            cached.generate(BANKED[0], **{"seed": 3, "seconds": 1, **changes})
    with pytest.raises(UserError, match="one sentence"):
        cached.generate([BANKED[0]])


@pytest.fixture(scope="module")
def result(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict:
    pytest.importorskip(PACKAGE, reason="captions need MiniLM, whose weights are not installed")
    torch.manual_seed(0)
    module = Evaluator(EvaluatorConfig(latent_dim=8, num_layers=1, num_heads=2, ff_size=8, text_dim=384))
    about = {"recipe": "none", "seed": 0, "step": 0, "commit": "none", "held_out": {"top1": 0.5}}
    metadata = {"provenance": about, "text_encoder": {"pooled_scale": 10.0}}
    evaluator = SmallEvaluator(module, np.zeros(272), np.ones(272), metadata)
    clips = [clip(i, "train") for i in range(6)] + [clip(i, "test") for i in range(6, 12)]
    chosen = replace(quick(), most_clips=None, pairs=2)
    work, steps = tmp_path_factory.mktemp("work"), []

    def stop(done: int, of: int, what: str) -> None:
        steps.append((done, of, what))
        if len(steps) == 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(engine, evaluator, clips, work, chosen, stop)
    assert steps[-1][2] == "model"
    before = set(work.rglob("*.npy"))
    found = evaluate(engine, evaluator, clips, work, chosen, stop)
    assert steps[-1][:2] == (6 + 12 + 6 * 2 + 2, 6 + 12 + 6 * 2 + 2)
    assert before and before < set(work.rglob("*.npy"))
    again = evaluate(engine, evaluator, clips, work, chosen)
    for report in (found, again):
        del report["machine"]["load_average"]  # of the moment
    assert json.dumps(found) == json.dumps(again)
    return found


def test_a_run_goes_on_and_gives_every_row(result: dict) -> None:
    assert [row["name"] for row in result["rows"]] == ["real", "train", "tokenizer", "model", "retrieval"]
    for item in result["rows"]:
        given = {name for name, figure in item["figures"].items() if figure is not None}
        optional = {"tokenizer": {"mpjpe_mm", "mpjpe_rotations_mm"}, "model": {"multimodality"}}
        assert given == set(COLUMNS) - {"mpjpe_mm", "mpjpe_rotations_mm", "multimodality"} | optional.get(
            item["name"], set()
        )
        for figure in item["figures"].values():
            assert figure is None or figure["low"] - 1e-9 <= figure["mean"] <= figure["high"] + 1e-9
    # Each test caption occurs in training, and clips of one caption are the nearest ones.
    assert result["data"]["test_captions_in_train"] == 6 and result["pool"] == 6
    assert result["probes"][0]["passed"][1] == 1 and result["probes"][0]["held_out"] is None
    assert "/" not in result["model"]["model"]


def test_results_and_page_hold_the_same_numbers(result: dict, tmp_path: Path) -> None:
    write_result(result, tmp_path / "eval.json")
    back = read_result(tmp_path / "eval.json")
    assert back == json.loads(json.dumps(result))
    files = write_page(back, tmp_path / "docs" / "page.md")
    text = (tmp_path / "docs" / "page.md").read_text(encoding="utf-8")
    for item in result["rows"]:
        for name, figure in item["figures"].items():
            if figure is not None:
                assert f"{figure['mean']:.{COLUMNS[name][2]}f} ({figure['low']:.{COLUMNS[name][2]}f} to" in text
    jerk = {item["name"]: item["figures"]["jerk"]["mean"] for item in result["rows"]}
    assert f"| model | {jerk['model'] / jerk['real']:.2f} x |" in text
    pictures = re.findall(r"\]\((images/\S+)\)", text)
    assert [tmp_path / "docs" / name for name in pictures] == files[:-1] and len(pictures) == 2
    for picture in files[:-1]:
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"format": "kinetok-evaluation", "version": 2}', "version 1, got 'kinetok-evaluation' version '2'"),
        ('{"setting": {}}', "got 'None'"),
        ("notes of mine", "expected JSON"),
        ("[1]", "expected a JSON object"),
    ],
)
def test_other_files_are_not_overwritten(tmp_path: Path, content: str, words: str) -> None:
    target = tmp_path / "eval.json"
    target.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"{words}.*nothing was overwritten"):
        write_result({"format": "kinetok-evaluation", "version": 1}, target)
    assert target.read_text(encoding="utf-8") == content and list(tmp_path.iterdir()) == [target]
    with pytest.raises(UserError, match="lack something"):
        write_page({"probes": [], "pool": 3, "rows": []}, tmp_path / "page.md")
    assert list(tmp_path.iterdir()) == [target]


def test_only_an_earlier_page_is_replaced(result: dict, tmp_path: Path) -> None:
    write_result(result, tmp_path / "eval.json")
    before = (tmp_path / "eval.json").read_bytes()
    with pytest.raises(UserError, match=r"expected an earlier page.*nothing was overwritten"):
        write_page(result, tmp_path / "eval.json")
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]
    assert (tmp_path / "eval.json").read_bytes() == before
    write_page(result, tmp_path / "page.md")
    write_page(result, tmp_path / "page.md")


@pytest.mark.parametrize("changes", [{"rows": None}, {"probes": [{}]}, {"model": {}}, {"settings": {"repeats": 1}}])
def test_results_that_lack_something_are_one_line(result: dict, tmp_path: Path, changes: dict) -> None:
    with pytest.raises(UserError, match="lack something"):
        write_page({**result, **changes}, tmp_path / "page.md")
    none = {**result["probes"][0], "train": [0, 0]}
    with pytest.raises(UserError, match="lack something"):
        write_page({**result, "probes": [none]}, tmp_path / "page.md")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("few", ["train", "test"])
def test_few_captions_are_refused_before_a_clip_is_made(engine: Engine, tmp_path: Path, few: str) -> None:
    clips = [clip(i, split) for i in range(6) for split in ("train", "test")]
    clips = [replace(one, id=f"{one.split}{one.id}") for one in clips]
    clips = [replace(one, captions=CAPTIONS[:2]) if one.split == few else one for one in clips]
    module = Evaluator(EvaluatorConfig(latent_dim=8, num_layers=1, num_heads=2, ff_size=8, text_dim=384))
    evaluator = SmallEvaluator(module, np.zeros(272), np.ones(272), {})
    with pytest.raises(UserError, match=f"at least 4 distinct captions of the clips '{few}', got 2"):
        evaluate(engine, evaluator, clips, tmp_path, quick())
    assert list(tmp_path.iterdir()) == []


def test_bars_are_as_long_as_their_values() -> None:
    groups = [Group("a <b>", [Bar(0.5, 0.4, 0.6), None], 0.9), Group("c", [Bar(2.0, 1.0, 3.0), Bar(0.0, 0.0, 0.1)])]
    root = ElementTree.fromstring(bar_chart("t & u", ["x", "y"], groups, 1.0, "goal"))
    name = "{http://www.w3.org/2000/svg}"
    bars = [float(r.get("width", 0)) for r in root.iter(f"{name}rect") if r.get("height") == "10"]
    assert bars == [pytest.approx(265), pytest.approx(530), 0]
    words = [text.text for text in root.iter(f"{name}text")]
    assert {"a <b>", "c", "t & u", "x", "y", "goal", "0", "1"} <= set(words)
