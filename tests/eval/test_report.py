# SPDX-License-Identifier: Apache-2.0
"""The report: self-contained, harmless whatever a model wrote, whole with any part missing."""

import html.parser
import math
import re
import xml.etree.ElementTree

import matplotlib.figure
import numpy as np
import pytest

from r1jax.eval import figures
from r1jax.eval.report import headlines, write_picture, write_report

VOID = {"meta", "br", "link", "img"}


def make_stage(name, parameters, pass_at_1, **more):
    stage = {"name": name, "parameters": parameters, "steps": 10, "seconds": 65.0}
    return stage | {"pass_at_1": pass_at_1, "self_correction_rate": pass_at_1 / 2} | more


STAGES = [
    make_stage("pretrain", 1000, 0.0, self_correction_rate=None),
    make_stage("cold_start", 1000, 0.25),
    make_stage("rl_1", 1000, 0.75),
    make_stage("sft_2", 1000, 0.5),
    make_stage("rl_2", 1000, 0.9),
    make_stage("student_qwen2", 400, 0.8),
    make_stage("student_llama", 399, 0.85),
]
SUMMARY = {
    "stages": STAGES,
    "seed": 3,
    "versions": {"jax": "0.10.2"},
    "host": {"processor": "Abacus", "cores": 2},
}


def make_metrics():
    load = np.array([[1.0, 3.0], [2.0, 2.0]])
    rows = []
    for stage, steps in (("pretrain", 4), ("cold_start", 3)):
        rows += [{"stage": stage, "step": s, "loss": 1.0 / s} for s in range(1, steps + 1)]
    for stage, steps in (("rl_1", 6), ("rl_2", 4)):
        for step in range(1, steps + 1):
            row = {"stage": stage, "step": step, "reward": 0.1 * step, "accuracy": 0.5, "format": 1}
            row |= {"mean_tokens": 40.0 + step, "kl": 0.01, "entropy": math.nan, "reflection": 0.2}
            rows.append(row | ({"expert_load": (load * step).tolist()} if step % 2 else {}))
    return rows


SAMPLE = {
    "question": "use 3 5 7 to make 26",
    "before": "<think> try 3 + 5 no </think>",
    "after": "<think> wait try 3 * 7 yes </think>",
    "before_correct": False,
    "after_correct": True,
}


class Checker(html.parser.HTMLParser):
    """Collects tags and addresses, and that every element is closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.addresses, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        assert not [k for k, _ in attrs if k.startswith("on")], "no event handlers"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check(path):
    """The parsed page, after the checks that every page has to pass."""
    page = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert not {"script", "link", "iframe", "object", "form"} & set(checker.tags)
    assert all(a.startswith(("#", "data:image/png;base64,")) for a in checker.addresses)
    outside = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "namespaces"
    assert "@import" not in page
    return checker


def test_a_whole_report(tmp_path):
    path = write_report(tmp_path, SUMMARY, make_metrics(), [SAMPLE])
    assert path == tmp_path / "report.html"
    checker = check(path)
    text = " ".join(checker.text)
    for part in ("Stages", "Reinforcement learning", "Expert load", "Before and after", "Abacus"):
        assert part in text
    assert "25.0 → 90.0 %" in text
    assert checker.tags.count("svg") == 4
    assert checker.tags.count("tr") == 1 + len(STAGES)
    assert "mark" in checker.tags
    assert "right" in checker.text
    assert "wrong" in checker.text
    assert path.stat().st_size < 1_000_000


def test_the_page_is_reproducible(tmp_path):
    pages = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pages.append(write_report(tmp_path / name, SUMMARY, make_metrics(), [SAMPLE]).read_bytes())
    assert pages[0] == pages[1]


ATTACKS = [
    "<script>alert(1)</script>",
    "</pre><img src=x onerror=alert(1)>",
    "\"><svg onload='alert(1)'>",
    "&lt;script&gt; &amp;amp; {0} %s $x",
    "<i></pre></div></body></html>",
    "\x00\x07\ud800 \u202e \u2028",
    "<" * 20_000,
]


def test_what_a_model_or_a_file_says_stays_text(tmp_path):
    samples = [{"question": a, "before": a, "after": a, "after_correct": None} for a in ATTACKS]
    summary = {
        "stages": [make_stage(a, 10, 0.5) for a in ATTACKS],
        "seed": ATTACKS[0],
        "versions": {a: a for a in ATTACKS},
    }
    metrics = [{"stage": a, "step": i, "reward": 0.5} for a in ATTACKS[:3] for i in (1, 2)]
    metrics += [{"stage": a, "step": i, "loss": 0.5} for a in ATTACKS[3:] for i in (1, 2)]
    checker = check(write_report(tmp_path, summary, metrics, samples))
    assert "img" not in checker.tags
    text = "".join(checker.text)
    for attack in ATTACKS[:5]:  # question, two answers, stage, version: shown as it was said
        assert text.count(attack) >= 5


@pytest.mark.parametrize(
    ("summary", "metrics", "samples"),
    [
        ({}, [], []),
        ({"stages": []}, [{}], [{}]),
        ({"stages": [{}]}, [{"stage": "a"}], [{"question": None}]),
        ({"stages": [{"name": "rl_1"}]}, [{"stage": "rl_1", "reward": None}], []),
        ({}, [{"stage": "rl_1", "step": 1, "reward": math.nan, "kl": 0.1, "accuracy": 1}], []),
        ({}, [{"stage": "sft", "step": 1, "loss": math.inf, "expert_load": []}], []),
        ({}, [{"stage": "sft", "step": 1, "expert_load": [[0, 0]]}], []),
        ({}, [{"stage": "sft", "step": 1, "expert_load": math.nan}], []),
        ({"stages": [make_stage("a", None, math.nan)]}, [], []),
    ],
)
def test_missing_parts_do_not_matter(tmp_path, summary, metrics, samples):
    check(write_report(tmp_path, summary, metrics, samples))


@pytest.mark.parametrize("summary", [{}, {"stages": [{}, STAGES[0]]}])
def test_a_picture_of_little(tmp_path, summary):
    path = write_picture(tmp_path / "p.png", summary, [{"stage": "rl_1", "reward": None}])
    assert path.read_bytes()[1:4] == b"PNG"


def test_headlines():
    lines = headlines(SUMMARY, make_metrics())
    assert lines == [
        ("25.0 → 90.0 %", "pass@1, cold_start to rl_2"),
        ("12.5 → 45.0 %", "self-correction, cold_start to rl_2"),
        ("80.0 · 85.0 %", "pass@1 of the students student_qwen2, student_llama"),
        ("7 min 35 s", "training of the stages below; 1,000 parameters"),
    ]


def test_rl_stages_follow_one_another():
    rows = figures.rl_rows(make_metrics())
    assert [row["at"] for row in rows] == list(range(1, 11))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4]


def test_smoothing_keeps_constants_and_ends():
    np.testing.assert_allclose(figures._smooth(np.full(100, 0.3)), 0.3)
    y = np.arange(90.0)
    np.testing.assert_allclose(figures._smooth(y)[3:-3], y[3:-3])
    assert figures._smooth(np.array([2.0])) == [2.0]


def test_expert_load_is_relative_to_the_even_share():
    stages, relative_TLE = figures._expert_loads(make_metrics())
    assert stages == ["rl_1"] * 3 + ["rl_2"] * 2
    np.testing.assert_allclose(relative_TLE, np.tile([[0.5, 1.5], [1.0, 1.0]], (5, 1, 1)))


def test_figures_take_their_colours_from_the_page():
    for svg in (figures.bars(STAGES), figures.rl_curves(make_metrics())):
        xml.etree.ElementTree.fromstring(svg)
        assert "var(--ink)" in svg
        assert not set(figures._ROLES) & set(re.findall(r"#[0-9a-f]{6}", svg)), "a role left over"
        assert not re.search(r"(fill|stroke): #(000000|1c2330)", svg), "black on a dark page"


def test_the_picture_is_wide(tmp_path):
    data = write_picture(tmp_path / "curves.png", SUMMARY, make_metrics()).read_bytes()
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert width > 3 * height > 900


def test_a_picture_of_one_step_shows_it():
    """A line through one point is invisible, and steps are whole numbers."""
    figure = matplotlib.figure.Figure()
    axis = figure.subplots()
    rows = [{"stage": "sft", "step": 1, "loss": 0.5, "clip_fraction": 0.0}]
    figures.draw_panel(axis, rows, ("loss",), "Loss", figures.LIGHT)
    assert axis.lines[-1].get_marker() == "o"
    figure.draw_without_rendering()
    low, high = axis.get_xlim()
    assert [x for x in axis.get_xticks() if low <= x <= high] == [1.0]
    axis = figure.subplots()
    figures.draw_panel(axis, rows, ("clip_fraction",), "Clipped", figures.LIGHT)
    assert -0.1 < axis.get_ylim()[0] <= 0.0 < 0.5 < axis.get_ylim()[1]
