# SPDX-License-Identifier: Apache-2.0
"""Rejection sampling: every sample drawn once, judged, chosen; killed anywhere, the same files."""

import dataclasses
import json
import time
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.config import Difficulty
from r1jax.data.datasets import Message, Question, conversations
from r1jax.data.template import R1
from r1jax.data.text import TextTokenizer
from r1jax.data.tokenizer import task_tokenizer
from r1jax.io.model import Model
from r1jax.rl.rejection import ngrams_of
from r1jax.train.asking import Room, Wording, items_of, task_items
from r1jax.train.progress import Silent
from r1jax.train.rejection import Drawing, Item, Run, fingerprint, paired, plan, run
from r1jax.train.selection import Choice, choose, prose_of
from r1jax.train.start import state_of
from tests.nn import tiny
from tests.train.tiny import VOCAB

# A third of the vocabulary ends an answer, so that most answers end.
ENDS = range(100, 220)
DRAWING = Drawing(samples=6, max_tokens=8, rows=8)


def model(seed=0):
    words = TextTokenizer(task_tokenizer().inner, {"chat_template": TEMPLATE}, eos_ids=ENDS)
    cfg = tiny.dense_config(qwen2=True, vocab_size=VOCAB, num_layers=1)
    return Model(cfg, tiny.model(cfg, seed), words)


TEMPLATE = "{{ messages[-1]['content'] }} <|Assistant|>"


def items(n=3):
    words = model().tokenizer
    prompts = [(Message("user", f"compute {i} + 1"),) for i in range(n)]
    return [
        Item(p, words.chat_ids([dataclasses.asdict(p[0])]), str(i), "sums", f"sums/{i}", str(i))
        for i, p in enumerate(prompts)
    ]


def even(answers, texts):
    """Right is a text whose length is even."""
    return lambda: np.array([len(t) % 2 == 0 for t in texts], np.float32)


class Killed(Exception):
    pass


class KilledAt(Silent):
    """Ends the program behind some step."""

    def __init__(self, step):
        self.at = step

    def step(self, step, **numbers):
        if step == self.at:
            raise Killed


def go(out, *, progress=None, seed=0):
    how = Run(out, DRAWING, Choice(keep=2), even, None, progress or Silent())
    return run(model(seed), items(), how, asked={"read": 3})


def files(out):
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    return out, go(out)


@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=20), st.integers(1, 9), st.integers(1, 20)
)
def test_a_plan_draws_every_sample_once(lengths, samples, rows):
    drawing = Drawing(samples=samples, rows=rows)
    batches = plan(lengths, drawing)
    drawn = Counter((i, b.first + k) for b in batches for i in b.items for k in range(b.samples))
    assert drawn == Counter((i, k) for i in range(len(lengths)) for k in range(samples))
    assert [b.number for b in batches] == list(range(len(batches)))
    for b in batches:
        assert len(b.items) <= b.size
        assert b.size * min(samples, rows) <= max(rows, samples)
        assert all(lengths[i] <= b.length < 2 * max(lengths[i], 16) for i in b.items)


def test_what_is_kept_is_right_ended_distinct_and_capped(whole):
    out, statistics = whole
    rows = [
        json.loads(line)
        for path in sorted((out / "samples").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert statistics["sampled"] == len(rows) == 18
    good = [(r["item"], r["text"]) for r in rows if r["reward"] == 1 and r["ended"] and r["text"]]
    expected = {i: list(dict.fromkeys(t for j, t in good if i == j))[:2] for i, _ in good}
    traces = [json.loads(line) for line in (out / "traces.jsonl").read_text().splitlines()]
    found = Counter(t["identity"] for t in traces)
    assert found == Counter({f"sums/{i}": len(texts) for i, texts in expected.items()})
    assert {t["messages"][-1]["content"] for t in traces} == {
        t for texts in expected.values() for t in texts
    }
    assert statistics["kept"] == len(traces) > 2
    assert statistics["dropped"]["unreadable"]["dropped"] > 0, "some answers have no text"
    assert statistics["dropped"]["wrong"]["dropped"] > 0
    assert statistics["dropped"]["cut_off"]["dropped_of_all"] > 0
    assert sum(s["dropped"] for s in statistics["dropped"].values()) == 18 - len(traces)
    assert statistics == json.loads((out / "statistics.json").read_text())
    learnt = conversations(out / "traces.jsonl").items
    assert [c.messages[0].content for c in learnt] == [t["messages"][0]["content"] for t in traces]


def test_kept_answers_are_paired_with_wrong_ones_of_their_question():
    """Each text once; cut off, empty and repeated wrong answers make no pair."""
    sample = {"item": 0, "text": "a", "ended": True, "reward": 0.0}
    rows = [
        sample | {"reward": 1.0},
        sample | {"text": "b"},
        sample | {"text": "b"},
        sample | {"text": "c", "ended": False},
        sample | {"text": " "},
        sample | {"text": "d"},
        sample | {"text": "e", "reward": 1.0},
        sample | {"text": "f", "reward": 1.0},
        sample | {"item": 1, "reward": 1.0},
        sample | {"item": 2, "text": "g"},
    ]
    keep = np.array([row["reward"] == 1 for row in rows])
    assert paired(rows, keep) == [(0, 1), (6, 5)]
    keep[0] = False
    assert paired(rows, keep) == [(6, 1), (7, 5)]


def test_samples_differ_and_are_the_seeds_own(whole, tmp_path):
    texts = [json.loads(line)["text"] for line in lines(whole[0])]
    assert len(set(texts)) > 12
    go(tmp_path / "again")
    assert files(tmp_path / "again") == files(whole[0])


def lines(out):
    return [x for p in sorted((out / "samples").glob("*.jsonl")) for x in p.open()]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_killed_behind_any_batch_it_leaves_the_same_files(whole, tmp_path, step):
    with pytest.raises(Killed):
        go(tmp_path, progress=KilledAt(step))
    assert len(list((tmp_path / "samples").glob("*.jsonl"))) == step
    assert not (tmp_path / "traces.jsonl").exists()
    # What a kill in the middle of a write leaves, and what no whole batch is.
    (tmp_path / "samples" / ".000002.jsonl.draft").write_text('{"item": 0')
    assert go(tmp_path) == whole[1]
    (tmp_path / "samples" / ".000002.jsonl.draft").unlink(missing_ok=True)
    assert files(tmp_path) == files(whole[0])


@pytest.mark.parametrize("damage", ["", '{"item": 0', '{"item": 0}\n', "[]\n"])
def test_a_batch_that_is_not_whole_is_drawn_again(whole, tmp_path, damage):
    go(tmp_path)
    (tmp_path / "samples" / "000001.jsonl").write_text(damage)
    assert go(tmp_path) == whole[1]
    assert files(tmp_path) == files(whole[0])


def test_samples_of_other_weights_are_refused(tmp_path):
    with pytest.raises(Killed):
        go(tmp_path, progress=KilledAt(1))
    with pytest.raises(ValueError, match="other weights .* --force"):
        go(tmp_path, seed=1)


def test_a_fingerprint_sees_every_bit_and_every_place():
    state = state_of(model().module)
    seen = {int(fingerprint(state))}
    for change in (lambda x: x.at[0, 0].add(1e-6), lambda x: x[::-1]):
        params = jax.tree.map(lambda x, c=change: c(x) if x.ndim == 2 else x, state.params)
        seen.add(int(fingerprint(dataclasses.replace(state, params=params))))
    assert len(seen) == 3
    assert int(fingerprint(state_of(model().module))) in seen


def test_questions_that_overlap_repeat_or_do_not_fit_are_counted():
    words = model().tokenizer
    asked = [
        Question(text, "1", "s", f"s/{text[:12]}")
        for text in ("1 + 1", "1 + 1", "1 + 2 + 3 + 4 + 5", "2 + 2 " * 20, "7", "8", "9")
    ]
    found, counts = items_of(
        asked,
        words,
        Wording(),
        room=Room(prompt=30, questions=2, seed=1),
        evaluation=ngrams_of(["1 + 2 + 3 + 4 + 5"], n=4),
    )
    assert counts == {
        "read": 7,
        "overlapping": 1,
        "repeated": 1,
        "too_long": 1,
        "not_drawn": 2,
        "sampled": 2,
    }
    assert len(found) == 2
    every, _ = items_of(asked, words, Wording(instruction="so"), room=Room(50), evaluation=None)
    assert all(item.messages[-1].content.endswith("\n\nso") for item in every)


def test_problems_of_tasks_are_distinct_and_of_the_train_split():
    words, easy = model().tokenizer, Difficulty(arithmetic_operations=(1,))
    found = task_items("arithmetic", 20, words, difficulty=easy, seed=3)
    assert len({item.identity for item in found}) == 20
    assert {item.source for item in found} == {"task:arithmetic"}


def test_style_is_judged_of_prose_where_programs_answer():
    block = "```python\nx = 1\n```"
    assert prose_of(f"so {block}", code=False) == f"so {block}"
    assert prose_of(f"so\n{block}", code=True) == "so\n"
    assert prose_of(f"so\n{block}\nthen\n~~~~\n~~~\n~~~~~\nend", code=True) == "so\nthen\nend"
    assert prose_of("so\n```\nx", code=True) == "so\n```\nx", "what is never closed stays"
    thought = f"t\n{block}\n</think>\n{block}\nend"
    assert prose_of(thought, code=True).count("```") == 2
    rows = [
        {"item": 0, "text": f"do\n{block}", "tokens": 3, "ended": True, "reward": 1.0},
        {"item": 1, "text": f"do\n{block}", "tokens": 3, "ended": True, "reward": 1.0},
    ]
    of = items(2)
    of[0] = of[0]._replace(code=True)
    assert choose(rows, of, Choice(), None).keep.tolist() == [True, False]


@pytest.mark.parametrize("loop", ["```python\n", "\n\n", "word ", "$", "中", "</think>", "| --- "])
def test_answers_that_run_in_circles_are_filtered_in_linear_time(loop):
    """A sampled answer is any text: 100,000 characters of a loop, twice."""
    text, evaluation = loop * (100_000 // len(loop)), ngrams_of(["a b c d e f g h i j k"])
    row = {"item": 0, "text": text, "tokens": 3, "ended": True, "reward": 1.0}
    of = [items(1)[0]._replace(code=code) for code in (False, True)]
    began = time.process_time()
    choose([row, row | {"item": 1}], of, Choice(template=R1), evaluation)
    assert time.process_time() - began < 5, "quadratic patterns take minutes"


@pytest.mark.parametrize(
    "wrong",
    [{"samples": 0}, {"rows": 0}, {"max_tokens": 0}, {"temperature": -1}, {"top_p": 0}],
)
def test_drawings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Drawing(**wrong)
