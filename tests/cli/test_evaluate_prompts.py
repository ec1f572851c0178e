"""``kinetok evaluate prompts``: clips, scores and one page that needs nothing else."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest

from kinetok.motion import Motion, quality
from kinetok.train.prompt_page import Shown, motionmillion_eval, scores, write_prompt_page

WALK, RUN = "a person walks forward", "a person runs"


class Page(HTMLParser):
    """The text of every cell by row, the elements, and the embedded data."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.elements, self.script = [], [], ""
        self.feed(text)
        self.data = json.loads(self.script)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr" and "data-clip" in dict(attributes):
            self.rows.append([])
        if tag == "td" and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data):
        tag, attributes = self.elements[-1] if self.elements else ("", {})
        if tag == "script" and "id" in attributes:
            self.script += data
        elif tag == "td" and self.rows:
            self.rows[-1][-1] += data


@pytest.fixture
def command(model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{WALK}\n{WALK}\n{RUN}\n", encoding="utf-8")
    out = tmp_path / "out"
    return (
        "evaluate", "prompts", "--model", model, "-o", out, "--prompts", prompts, "--limit", 2, "--seconds", 1,
    ), out  # fmt: skip


def test_the_released_prompts():
    prompts = motionmillion_eval()
    assert len(prompts) == 126 and len(set(prompts)) == 124
    assert sorted(text for text in set(prompts) if prompts.count(text) == 2) == ["Drink water", "Snap fingers"]


def test_the_default_model_shows_released_prompts(kinetok, tmp_path):
    printed = kinetok("evaluate", "prompts", "-o", tmp_path, "--limit", 2, "--seconds", 1, "--json")
    assert printed.code == 0 and printed.err == ""
    report = json.loads(printed.out)
    assert [clip["prompt"] for clip in report["clips"]] == motionmillion_eval()[:2]
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert [row[1] for row in page.rows] == motionmillion_eval()[:2]
    for clip, row, drawn in zip(report["clips"], page.rows, page.data["clips"], strict=True):
        motion = Motion.load(tmp_path / f"{clip['name']}.npz")
        assert len(motion) == 30 and drawn["fps"] == 15 and len(drawn["joints"]) == 15
        assert drawn["joints"][3] == pytest.approx(100 * motion.joints[6].ravel(), abs=0.51)
        skate = quality.report(motion)["foot_skate_cm_per_s"]
        assert clip["scores"]["foot_skate_cm_per_s"] == pytest.approx(skate, rel=1e-3)
        assert f"{skate:.1f}" in row
    both = [clip["scores"]["jerk_m_per_s3"] for clip in report["clips"]]
    assert report["summary"]["jerk_m_per_s3"]["mean"] == pytest.approx(sum(both) / 2, rel=1e-2)


def test_the_page_asks_for_nothing_else(kinetok, command):
    arguments, out = command
    assert kinetok(*arguments).code == 0
    page = Page((out / "index.html").read_text(encoding="utf-8"))
    assert not [tag for tag, attributes in page.elements if {"src", "href"} & set(attributes)]
    assert {tag for tag, _ in page.elements}.isdisjoint({"link", "img", "iframe", "object"})


def test_a_prompt_that_occurs_twice_is_two_clips(kinetok, command):
    arguments, out = command
    first, second = json.loads(kinetok(*arguments, "--json", "--seed", 7).out)["clips"]
    assert (first["prompt"], second["prompt"]) == (WALK, WALK) and (first["seed"], second["seed"]) == (7, 8)
    a, b = (Motion.load(out / f"{clip['name']}.npz").joints for clip in (first, second))
    assert abs(a - b).max() > 1e-3


def test_a_run_is_resumed(kinetok, command):
    arguments, out = command
    kinetok(*arguments)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.npz")}
    pages = [(out / "index.html").read_bytes()]
    next(iter(kept)).unlink()
    assert "1 clips made, 1 kept" in kinetok(*arguments).out
    assert sum(path.stat().st_mtime_ns == when for path, when in kept.items()) == 1
    pages.append((out / "index.html").read_bytes())
    assert pages[0] == pages[1]
    assert "2 clips made, 0 kept" in kinetok(*arguments, "--format", "bvh,png").out
    assert {path.suffix for path in out.iterdir()} == {".npz", ".bvh", ".png", ".json", ".html"}
    assert "2 clips made, 0 kept" in kinetok(*arguments, "--seed", 1).out


def test_what_is_refused_stays_as_it_was(refused, command):
    arguments, out = command
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    assert "holds other files" in refused(*arguments)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    (out / "prompts.json").write_text("[]")
    assert "expected the index of an earlier run" in refused(*arguments)
    (out / "prompts.json").write_text('{"version": 2, "clips": {}}')
    assert "expected an index of version 1, got version '2'" in refused(*arguments)
    assert len(list(out.iterdir())) == 2 and "2" in (out / "prompts.json").read_text()
    assert "--format" in refused(*arguments, "--format", "exe")
    assert "--limit" in refused(*arguments, "--limit", 0)


def test_text_is_never_markup(tmp_path):
    motion = Motion(rotations=np.tile(np.eye(3), (1, 22, 1, 1)), root=np.array([[0.0, 0.9, 0.0]]))
    words = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a & b", "@DATA@ \\g<1>"]
    write_prompt_page(tmp_path / "p.html", [Shown(text, 0, motion, scores(motion)) for text in words], "<b>bold</b>")
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    page = Page(text)
    assert [row[1] for row in page.rows] == words
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and "img" not in tags and "b" not in tags
    write_prompt_page(tmp_path / "none.html", [], "nothing")
    assert Page((tmp_path / "none.html").read_text(encoding="utf-8")).data["clips"] == []
