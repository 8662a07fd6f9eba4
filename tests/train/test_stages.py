# SPDX-License-Identifier: Apache-2.0
"""The stages: resumed bit for bit, fresh noise, nothing compiled twice, only right traces kept."""

import contextlib
import dataclasses
import signal

import chex
import jax
import numpy as np
import pytest

from r1jax.config import RejectionConfig, RewardConfig, UpdateConfig
from r1jax.data import corpus
from r1jax.data.tasks import arithmetic
from r1jax.data.template import completion
from r1jax.io import metrics
from r1jax.train import stages
from r1jax.train.collect import Collector
from r1jax.train.judge import Rules, by_task
from r1jax.train.loop import Run
from r1jax.train.progress import Silent
from r1jax.train.sampler import Completions, Sampler
from tests.train import tiny

CFG = tiny.recipe()
WORDS = tiny.words(CFG)
STEPS = 4
COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, fun_name="", **__: (
        COMPILED.append(fun_name) if "backend_compile" in event else None
    )
)


class Watch(Silent):
    """Counts compilations at each step; interrupts at one, by a signal or as a fault would."""

    def __init__(self, at=None, how="signal"):
        self.at, self.how, self.compiled = at, how, []

    def step(self, step, **numbers):
        self.compiled.append(len(COMPILED))
        if step == self.at and self.how == "signal":
            signal.raise_signal(signal.SIGINT)
        elif step == self.at:
            raise RuntimeError("the power went")


def run_in(out, watch=None, *, every=1e9):
    return Run(out, {}, watch or Silent(), every)


def supervised(run):
    packed = corpus.pretrain_corpus(
        24,
        seed=0,
        tasks=("arithmetic",),
        template=WORDS.template,
        tokenizer=WORDS.tokenizer,
        length=CFG.pretrain.length,
        difficulty=CFG.tasks.difficulty,
    )
    cfg = dataclasses.replace(CFG.pretrain, steps=STEPS, bias_freeze=0.5)
    state = tiny.state(CFG.model)
    return stages.supervised(run, "s", state, packed, cfg, model=CFG.model, seed=1, log_every=1)[0]


def same(index, n, step):
    """The same questions in every batch."""
    return WORDS.asked(WORDS.problems(n, 0, "train"))


def fresh(index, n, step):
    """Other questions in every batch."""
    return WORDS.asked(WORDS.problems(n, index, "train"))


def grpo(run, *, questions=fresh, seed=0, lr=0.01, seen=None, dead=0, **changes):
    """Four steps; the reference is renewed after the second. `seen` takes the texts; the first
    `dead` rewards of a batch are equal."""
    rules = Rules(RewardConfig(), WORDS.template, by_task(WORDS.template), max_length=8)

    def judge(step, asked, done):
        if seen is not None:
            seen.append(tuple(done.texts))
        odd = [0.0] * dead + [text.count("7") + len(text) % 3 / 4 for text in done.texts[dead:]]
        verdict = rules(step, asked, done)()
        return lambda: verdict._replace(reward_B=np.array(odd, np.float32))

    optim = dataclasses.replace(CFG.rl_1.optim, learning_rate=lr)
    cfg = dataclasses.replace(CFG.rl_1, steps=STEPS, optim=optim, **changes)
    sampler = Sampler(CFG.sampling, WORDS.ending())
    collector = Collector(cfg, sampler, questions, judge, seed=seed)
    return stages.grpo(run, "g", tiny.state(CFG.model), cfg, collector, bias_speed=0.01)[0]


def rows(out):
    """metrics.jsonl without the clock."""
    found = metrics.read(out / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


def refilled(run, questions=fresh):
    """DAPO: no reference is held, and a step may take several batches of questions."""
    dapo = UpdateConfig(objective="dapo", beta=0.0)
    return grpo(run, update=dapo, refill=1, questions=questions, dead=CFG.rl_1.group_size)


@pytest.mark.parametrize(
    "stage", [supervised, grpo, pytest.param(refilled, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("at", "how", "every"),
    [pytest.param(3, "signal", 1e9, marks=pytest.mark.slow), (4, "fault", 0.0)],
)
def test_a_resumed_stage_is_the_uninterrupted_one(tmp_path, stage, at, how, every):
    """Parameters, moments, router, reference, data, noise, and every number logged."""
    watch = Watch()
    whole = stage(run_in(tmp_path / "whole", watch))
    assert watch.compiled[-1] == watch.compiled[1]  # all is compiled by the second step
    with contextlib.suppress(KeyboardInterrupt, RuntimeError):
        stage(run_in(tmp_path / "cut", Watch(at, how), every=every))
        pytest.fail("was not interrupted")
    resumed = stage(run_in(tmp_path / "cut"))
    chex.assert_trees_all_equal(resumed, whole)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert len(rows(tmp_path / "cut")) == STEPS
    start = tiny.state(CFG.model).params["embed"]
    assert np.abs(whole.params["embed"][...] - start[...]).max() > 0


def test_sampler_and_step_are_compiled_once(tmp_path):
    """What is compiled ahead, in threads, is what the first step calls."""
    jax.clear_caches()
    COMPILED.clear()
    grpo(run_in(tmp_path))
    assert COMPILED.count("jit(run)") == COMPILED.count("jit(grpo_step)") == 1


def test_no_batch_of_questions_is_asked_twice(tmp_path):
    """Not even where a step took more than one."""
    asked = []

    def questions(index, n, step):
        asked.append(index)
        return fresh(index, n, step)

    refilled(run_in(tmp_path), questions)
    assert asked == list(range(len(asked)))
    assert len(asked) > STEPS


def test_the_biases_freeze_at_the_end(tmp_path):
    """γ is 0 in the last share of the steps."""
    speeds = []

    def compiled(optimizer, *, mtp_weight):
        def step(state, batch, controls):
            speeds.append(float(controls.bias_speed))
            return state, {"load": np.zeros((0, 0)), "loss": 0.0}

        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "compile_supervised", compiled)
        supervised(run_in(tmp_path))
    assert speeds == [np.float32(CFG.model.moe.bias_update_speed)] * 2 + [0.0] * 2


def test_noise_is_fresh_at_every_step_and_the_seed_decides(tmp_path):
    """At learning rate 0, on the same problems, only the noise can differ. Any seed will do."""
    first, again, other = [], [], []
    for i, (seen, seed) in enumerate(((first, 0), (again, 0), (other, 10**10))):
        run = run_in(tmp_path / str(i))
        grpo(run, questions=same, seed=seed, lr=0.0, seen=seen)
    assert first == again
    assert len({*first, *other}) == 2 * STEPS
    assert all(len(set(texts[:4])) > 1 for texts in first)  # the samples of one prompt differ


def test_rewards_are_logged_as_they_are(tmp_path):
    """A fraction survives; the tasks' own rewards are told beside it."""
    seen = []
    grpo(run_in(tmp_path), seen=seen)
    for row, texts in zip(rows(tmp_path), seen, strict=True):
        expected = np.mean([text.count("7") + len(text) % 3 / 4 for text in texts])
        np.testing.assert_allclose(row["reward"], expected, rtol=1e-6)
        assert row["accuracy"] == 0.0
        assert np.shape(row["expert_load"]) == (1, 6)
        np.testing.assert_allclose(np.sum(row["expert_load"], -1), 1.0, atol=1e-3)


def test_the_reference_becomes_the_policy_every_two_steps(tmp_path):
    """The KL of a batch is measured before its update: 0 where the two were just made equal."""
    grpo(run_in(tmp_path))
    kl = [row["kl"] for row in rows(tmp_path)]
    assert max(abs(kl[0]), abs(kl[2])) < 1e-6
    assert min(kl[1], kl[3]) > 1e-4


# ---------------------------------------------------------------------------- rejection sampling


def right(problem, seed):
    """A right, well-formed completion of an arithmetic problem."""
    mix = dataclasses.replace(CFG.tasks.mix, first_right=1.0)
    trace = arithmetic.cold_start(np.random.default_rng(seed), problem, mix)
    return completion(trace, WORDS.template)


class Script:
    """A sampler that answers by rule: sample g of any prompt is `texts[g](problem, call)`."""

    def __init__(self, *texts):
        self.texts, self.calls = texts, []

    def __call__(self, state, ids, noise, temperatures):
        assert len(temperatures) == len(self.texts)
        self.calls.append((len(ids), noise))
        problems = [KNOWN[tuple(row)] for row in ids]
        texts = [text(p, len(self.calls)) for p in problems for text in self.texts]
        return Completions(None, texts, np.array([len(t.split()) for t in texts]))


# What `reject` asks, by prompt: a sampler is given ids alone.
KNOWN = {
    tuple(ids): problem
    for n in (3, 4)
    for problem in WORDS.problems(n, 5, "train")
    for ids in WORDS.asked([problem]).ids
}


def reject(tmp_path, script, cfg):
    return stages.rejection_sample(
        run_in(tmp_path), "r", None, cfg, script, words=WORDS, batch=(2, 4), seed=5
    )


def test_only_right_well_formed_and_distinct_traces_are_kept(tmp_path):
    answer = lambda p, _: right(p, 0)  # noqa: E731
    wrong = lambda p, _: right(p, 0).replace("<answer> ", "<answer> 1")  # noqa: E731
    loose = lambda p, _: right(p, 0).replace("<think> ", "")  # noqa: E731
    script = Script(wrong, answer, answer, loose)
    kept = reject(tmp_path, script, RejectionConfig(problems=3, samples=4, keep=4))
    problems = WORDS.problems(3, 5, "train")
    assert kept == [
        {"task": "arithmetic", "question": p.question, "completion": right(p, 0)} for p in problems
    ]
    assert [n for n, _ in script.calls] == [2, 2]  # the shape of RL's batches, the last one filled


def test_as_many_calls_as_samples_need_each_with_its_own_noise(tmp_path):
    """Six samples by four are two calls a batch; `keep` bounds what is taken from all of them."""
    script = Script(*[lambda p, call, g=g: right(p, 0) + " " * (4 * call + g) for g in range(4)])
    kept = reject(tmp_path, script, RejectionConfig(problems=4, samples=6, keep=5))
    assert len({noise for _, noise in script.calls}) == len(script.calls) == 4
    assert len(kept) == 4 * 5
    assert len({(k["question"], k["completion"]) for k in kept}) == 4 * 5


def test_samples_beyond_those_asked_for_are_ignored(tmp_path):
    """Of six samples by four the second call's last two are surplus: only these are right here."""
    wrong = "<think> no </think> <answer> 1 + </answer>"
    surplus = lambda p, call: right(p, 0) if call % 2 == 0 else wrong  # noqa: E731
    script = Script(*[lambda p, _: wrong] * 2, surplus, surplus)
    assert reject(tmp_path, script, RejectionConfig(problems=4, samples=6, keep=2)) == []
    script = Script(*[lambda p, _: wrong] * 2, surplus, surplus)
    assert len(reject(tmp_path, script, RejectionConfig(problems=4, samples=8, keep=2))) == 4


def test_nothing_right_keeps_nothing(tmp_path):
    script = Script(*[lambda p, _: "<think> no </think> <answer> 1 + </answer>"] * 4)
    assert reject(tmp_path, script, RejectionConfig(problems=3, samples=4, keep=2)) == []


def test_traces_are_packed_so_that_only_completions_are_learnt():
    problem = WORDS.problems(1, 0, "train")[0]
    text = right(problem, 0)
    trace = {"task": "arithmetic", "question": problem.question, "completion": text}
    packed = stages.pack_traces([trace, trace], WORDS, length=64)
    encode = WORDS.tokenizer.encode
    for segment in (1, 2):
        (row,), places = (
            np.unique(np.where(packed.segments_NT == segment)[0]),
            packed.segments_NT == segment,
        )
        taught = packed.targets_NT[places & (packed.mask_NT > 0)]
        assert taught.tolist() == encode(text)
        assert row == 0
