# SPDX-License-Identifier: Apache-2.0
"""The loop: however often and however a run is interrupted, it ends as if it never was."""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from r1jax.io import checkpoint, metrics
from r1jax.train.loop import Run, finish, finished, load, run_stage
from r1jax.train.progress import Silent
from tests.train import tiny

ROOT = Path(__file__).parents[2]
CONFIG = {"seed": 0}
STEPS = 6


class Interrupts(Silent):
    """A progress that interrupts: by a signal, or by an exception as a fault would."""

    def __init__(self, at: int | None = None, how: str = "signal"):
        self.at, self.how, self.messages = at, how, []

    def step(self, step, **numbers):
        if step == self.at:
            if self.how == "signal":
                signal.raise_signal(signal.SIGINT)
            else:
                raise RuntimeError("interrupted")

    def message(self, text):
        self.messages.append(text)


def run_in(out, progress=None, *, every=1e9) -> Run:
    return Run(Path(out), CONFIG, progress or Silent(), every)


def start():
    """A carry as the stages have: a whole `TrainState`, and parameters beside it."""
    return {"state": tiny.state(tiny.QWEN2), "reference": {"w": jnp.arange(3.0)}}


@jax.jit
def turn(carry, step):
    """Something that depends on every bit of the carry and on the step."""
    state, reference = carry["state"], carry["reference"]
    params = jax.tree.map(lambda p: jnp.sin(3.0 * p + step), state.params)
    state = dataclasses.replace(state, step=state.step + 1, params=params)
    reference = jax.tree.map(lambda r: r + params["norm"]["weight"].sum(), reference)
    return {"state": state, "reference": reference}, params["embed"].sum()


def step_fn(step, carry):
    carry, loss = turn(carry, np.float32(step))
    return carry, lambda: {"loss": loss, "load": np.full((1, 2), step)}


def stage(run, name="one", **changes):
    return run_stage(run, name, start(), step_fn, **({"steps": STEPS} | changes))


def rows(out):
    """metrics.jsonl without the clock."""
    return [
        {k: v for k, v in r.items() if k != "seconds"} for r in metrics.read(out / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(carry, rows) of a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole")
    carry, _ = stage(run_in(out))
    return jax.device_get(carry), rows(out)


interruptions = st.lists(
    st.tuples(
        st.integers(1, STEPS), st.sampled_from(["signal", "fault"]), st.sampled_from([0.0, 1e9])
    ),
    max_size=3,
)


@hypothesis.settings(max_examples=8)
@hypothesis.given(interruptions)
@hypothesis.example([(3, "signal", 1e9), (3, "fault", 0.0), (6, "signal", 1e9)])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path_factory, whole, cuts):
    out = tmp_path_factory.mktemp("cut")
    for at, how, every in cuts:
        with contextlib.suppress(KeyboardInterrupt, RuntimeError):
            stage(run_in(out, Interrupts(at, how), every=every))
    carry, _ = stage(run_in(out))
    chex.assert_trees_all_equal(jax.device_get(carry), whole[0])
    assert rows(out) == whole[1]


def test_a_signal_waits_for_the_step_and_loses_nothing(tmp_path):
    """The checkpoint of the interrupted step is on disk although none was due."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stage(run_in(tmp_path, Interrupts(4)))
    assert checkpoint.steps(tmp_path / "checkpoints" / "one") == [4]
    assert signal.getsignal(signal.SIGINT) is before
    progress = Interrupts()
    _, seconds = stage(run_in(tmp_path, progress))
    assert progress.messages == ["one: resumed at step 4"]
    assert seconds > metrics.read(tmp_path / "metrics.jsonl")[3]["seconds"]


def test_a_second_signal_does_not_wait(tmp_path):
    class Impatient(Interrupts):
        def step(self, step, **numbers):
            if step == 2:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGINT)
                pytest.fail("went on")

    with pytest.raises(KeyboardInterrupt):
        stage(run_in(tmp_path, Impatient()))
    assert checkpoint.steps(tmp_path / "checkpoints" / "one") == []


def test_outside_the_main_thread_it_runs_all_the_same(tmp_path, whole):
    found = []
    thread = threading.Thread(target=lambda: found.append(stage(run_in(tmp_path))[0]))
    thread.start()
    thread.join()
    chex.assert_trees_all_equal(jax.device_get(found[0]), whole[0])


KILLED = """
import os, signal
from tests.train import test_loop

def step_fn(step, carry):
    if step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return test_loop.step_fn(step, carry)

test_loop.run_stage(
    test_loop.run_in({out!r}, every=0.0), "one", test_loop.start(), step_fn, steps=test_loop.STEPS
)
"""


@pytest.mark.slow
def test_kill_9(tmp_path, whole):
    """The process is gone between two steps: what it had saved is what goes on."""
    code = KILLED.format(out=str(tmp_path))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 4
    progress = Interrupts()
    carry, _ = stage(run_in(tmp_path, progress))
    assert progress.messages == ["one: resumed at step 4"]
    chex.assert_trees_all_equal(jax.device_get(carry), whole[0])
    assert rows(tmp_path) == whole[1]


def damage(folder):
    """Overwrites the largest file of a checkpoint with zeros."""
    files = [p for p in folder.rglob("*") if p.is_file() and "tree" in p.parts]
    largest = max(files, key=lambda p: p.stat().st_size)
    largest.write_bytes(bytes(largest.stat().st_size))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, whole, caplog):
    with pytest.raises(KeyboardInterrupt):
        stage(run_in(tmp_path, Interrupts(5), every=0.0))
    series = tmp_path / "checkpoints" / "one"
    assert checkpoint.steps(series) == [4, 5]
    damage(series / "00000005")
    progress = Interrupts()
    carry, _ = stage(run_in(tmp_path, progress))
    assert progress.messages == ["one: resumed at step 4"]
    assert "cannot be read" in caplog.text
    chex.assert_trees_all_equal(jax.device_get(carry), whole[0])
    assert rows(tmp_path) == whole[1]


def test_rows_are_written_every_so_often_and_at_the_end(tmp_path):
    stage(run_in(tmp_path), log_every=4)
    assert [r["step"] for r in rows(tmp_path)] == [4, STEPS]


def test_no_steps_change_nothing(tmp_path):
    carry, _ = stage(run_in(tmp_path), steps=0)
    chex.assert_trees_all_equal(carry, start())
    assert rows(tmp_path) == []


def test_what_a_stage_leaves_when_it_ends(tmp_path, whole):
    """finish → finished, load: the record, the arrays, and where the metrics of the next begin."""
    run, record = run_in(tmp_path), {"name": "one", "seconds": 1.5, "pass_at_1": 0.25}
    assert finished(run, "one") is None
    with pytest.raises(ValueError, match="no checkpoint of stage one"):
        load(run, "one", {"state": start()["state"].slim()})
    carry, _ = stage(run, log_every=2)
    assert finished(run, "one") is None
    state = carry["state"].slim()
    finish(run, "one", {"state": state}, STEPS, record)
    stage(run, "two")
    kept = rows(tmp_path)

    again = run_in(tmp_path)  # another process comes back, after rows of the next stage
    assert finished(again, "one") == record
    like = {"state": tiny.state(tiny.QWEN2, seed=1).slim()}
    chex.assert_trees_all_equal(load(again, "one", like)["state"], state)
    assert again.metrics_position == run_position(tmp_path, 3)
    stage(again, "two")
    assert rows(tmp_path) == kept


def run_position(out, n):
    """Bytes of the first n rows."""
    return sum(len(line) for line in itertools.islice((out / "metrics.jsonl").open("rb"), n))


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stage(run_in(tmp_path, Interrupts(2)))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    other = dataclasses.replace(run_in(tmp_path), config={"seed": 1})
    with pytest.raises(ValueError, match="seed: saved 0, asked for 1"):
        stage(other)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_rows_are_json(tmp_path):
    stage(run_in(tmp_path))
    line = (tmp_path / "metrics.jsonl").read_text().splitlines()[1]
    row = json.loads(line)
    assert (row["stage"], row["step"], row["load"]) == ("one", 2, [[1, 1]])
    assert row["seconds"] >= 0
