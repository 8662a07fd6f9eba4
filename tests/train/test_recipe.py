# SPDX-License-Identifier: Apache-2.0
"""The recipe from end to end, minuscule: what it leaves, and that it goes on where it stopped."""

import dataclasses
import json

import chex
import numpy as np
import pytest

from r1jax.io import checkpoint, jsonl, metrics
from r1jax.train import recipe, stages
from r1jax.train.failure import StageFailed
from r1jax.train.progress import Silent
from tests.train import tiny

STAGES = [name for name in recipe.ORDER if not name.startswith("base_")]
KEYS = {
    "name",
    "parameters",
    "steps",
    "seconds",
    "pass_at_1",
    "greedy",
    "cons_at_3",
    "format_rate",
    "mean_tokens",
    "reflection_rate",
    "self_correction_rate",
}


class Watch(Silent):
    """Remembers the stages; fails at a step of one of them."""

    def __init__(self, fail_at: tuple[str, int] | None = None):
        self.names, self.messages, self.fail_at = [], [], fail_at

    def stage(self, name, total_steps):
        self.names.append(name)

    def step(self, step, **numbers):
        if (self.names[-1], step) == self.fail_at:
            raise RuntimeError("the power went")

    def message(self, text):
        self.messages.append(text)


def generous(*args):
    """Scores as they are, but every completion passes: random models find nothing right."""
    scores = SCORE(*args)
    every = np.ones_like(scores.correct)
    return scores._replace(correct=every, well_formed=every)


SCORE = stages.score


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(folder, summary, watches) of a run in three pieces, and the folder of a whole one."""
    cfg, out = tiny.recipe(), tmp_path_factory.mktemp("pieces")
    watches = [Watch(("rl_1", 2)), Watch(), Watch()]
    with pytest.raises(RuntimeError, match="the power went"):
        recipe.run(cfg, out, display=watches[0])
    with pytest.raises(StageFailed, match="sft_2: rejection sampling kept nothing.*rl_1.steps"):
        recipe.run(cfg, out, display=watches[1])
    assert not (out / "summary.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "score", generous)
        summary = recipe.run(cfg, out, display=watches[2])
        whole = tmp_path_factory.mktemp("whole")
        recipe.run(cfg, whole)
    return out, summary, watches, whole


def test_each_piece_begins_where_the_last_one_stopped(ran):
    first, second, third = (watch.names for watch in ran[2])
    assert first == ["pretrain", "cold_start", "rl_1"]
    assert second == ["rl_1", "sft_2: rejection sampling"]
    assert third == [
        "sft_2: rejection sampling",
        "sft_2",
        "rl_2",
        "base_qwen2",
        "distill: rejection sampling",
        "student_qwen2",
        "base_llama",
        "student_llama",
    ]


def without_clock(value):
    """The value with no `seconds` in it."""
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if k != "seconds"}
    return [without_clock(v) for v in value] if isinstance(value, list) else value


def test_pieces_are_bit_for_bit_the_whole(ran):
    pieces, whole = ran[0], ran[3]
    for name in ("metrics.jsonl", "traces/sft_2.jsonl", "traces/distill.jsonl"):
        assert without_clock(metrics_or_rows(pieces / name)) == without_clock(
            metrics_or_rows(whole / name)
        )
    for name in recipe.ORDER:
        states = [saved(folder / "checkpoints" / name) for folder in (pieces, whole)]
        chex.assert_trees_all_equal(*states)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (pieces, whole)]
    assert without_clock(summaries[0]) == without_clock(summaries[1])


def metrics_or_rows(path):
    return (metrics.read if path.name == "metrics.jsonl" else jsonl.read)(path)


def saved(folder):
    """The checksums of all arrays of the last checkpoint."""
    (step,) = checkpoint.steps(folder)
    return checkpoint._record(folder, step)["leaves"]


def test_the_summary_has_every_figure(ran):
    out, summary, _, _ = ran
    assert json.loads((out / "summary.json").read_text()) == summary
    assert [s["name"] for s in summary["stages"]] == STAGES
    assert [s["steps"] for s in summary["stages"]] == [2, 1, 2, 1, 1, 2, 2]
    for stage in summary["stages"]:
        assert stage.keys() >= KEYS
        assert stage["seconds"] > 0
        assert 0 < stage["mean_tokens"] <= 8
    parameters = {s["name"]: s["parameters"] for s in summary["stages"]}
    assert parameters["pretrain"] == parameters["rl_2"] != parameters["student_qwen2"]
    assert {"jax", "r1jax", "python"} <= summary["versions"].keys()
    assert summary["host"]["cores"] >= 1
    assert summary["seed"] == 0


def test_metrics_tell_every_stage_in_order(ran):
    rows = metrics.read(ran[0] / "metrics.jsonl")
    steps = [(r["stage"], r["step"]) for r in rows]
    assert steps == [
        ("pretrain", 2),
        ("cold_start", 1),
        ("rl_1", 1),
        ("rl_1", 2),
        ("sft_2", 1),
        ("rl_2", 1),
        ("base_qwen2", 1),
        ("student_qwen2", 2),
        ("base_llama", 1),
        ("student_llama", 2),
    ]
    by_stage = {r["stage"]: r for r in rows}
    assert {"loss", "mtp_loss", "balance", "lr", "expert_load"} <= by_stage["pretrain"].keys()
    told = {"reward", "accuracy", "format", "kl", "entropy", "mean_tokens", "reflection"}
    assert told | {"clip_fraction", "dead_groups", "expert_load"} <= by_stage["rl_1"].keys()
    assert "expert_load" not in by_stage["student_llama"]


def test_what_lies_in_the_folder(ran):
    out = ran[0]
    page = (out / "report.html").read_text()
    assert "student_llama" in page
    assert 'src="http' not in page
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    (sample,) = json.loads((out / "samples.json").read_text())
    assert {"question", "before", "after", "before_correct", "after_correct"} == sample.keys()
    traces = jsonl.read(out / "traces" / "sft_2.jsonl")
    assert 0 < len(traces) <= 4


def test_a_finished_run_is_left_alone(ran):
    out, summary, _, _ = ran
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in sorted(out.rglob("*"))}
    watch = Watch()
    assert recipe.run(tiny.recipe(), out, display=watch) == summary
    assert watch.names == watch.messages == []
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in sorted(out.rglob("*"))} == before


def test_another_config_is_refused(ran):
    other = dataclasses.replace(tiny.recipe(), seed=7)
    with pytest.raises(ValueError, match="seed: saved 0, asked for 7"):
        recipe.run(other, ran[0])
