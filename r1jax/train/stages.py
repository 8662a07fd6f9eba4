# SPDX-License-Identifier: Apache-2.0
"""The stages of the recipe as functions of a state: supervised, GRPO, rejection sampling."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from r1jax import optim
from r1jax.config import (
    DenseConfig,
    GRPOConfig,
    ModelConfig,
    RejectionConfig,
    SFTConfig,
    TaskConfig,
)
from r1jax.data import corpus
from r1jax.data.packing import Packed, example, pack
from r1jax.data.tasks import Problem
from r1jax.data.template import PRIMER_RL, R1, Template, prompt
from r1jax.data.tokenizer import TaskTokenizer
from r1jax.eval.score import score
from r1jax.rl.rewards import accuracy, combine, format_reward
from r1jax.rl.rollout import Rollout
from r1jax.train.grpo import compile_grpo
from r1jax.train.loop import Run, run_stage
from r1jax.train.program import Ahead
from r1jax.train.sampler import Completions, Sampler
from r1jax.train.state import Controls, TrainState, restart
from r1jax.train.supervised import compile_supervised, micro_batched

RewardFn = Callable[[Sequence[Problem], Sequence[str]], np.ndarray]


class Words(NamedTuple):
    """The language of a run: its tasks, its tokenizer and its template."""

    tasks: TaskConfig
    tokenizer: TaskTokenizer
    template: Template

    def mixture(self) -> dict[str, float]:
        """Task names and their shares."""
        return dict(zip(self.tasks.names, self.tasks.weights, strict=True))

    def problems(self, n: int, seed: int, split: str, *, unique: bool = False) -> list[Problem]:
        """`n` problems of the split, drawn by the run's mixture."""
        return corpus.problems(
            n,
            seed=seed,
            tasks=self.mixture(),
            split=split,
            unique=unique,
            difficulty=self.tasks.difficulty,
        )


def template_of(cfg: TaskConfig) -> Template:
    """The template that `tasks.template` names."""
    return {"r1": R1, "primer": PRIMER_RL}[cfg.template]


def load_row(metrics: dict[str, Any]) -> dict[str, Any]:
    """Loads as shares of a layer's tokens, for the expert picture. Nothing for dense models."""
    load_LE = np.asarray(metrics["load"])
    if not load_LE.size:
        return {}
    share_LE = load_LE / np.maximum(load_LE.sum(-1, keepdims=True), 1.0)
    return {"expert_load": np.round(share_LE, 4)}


def supervised(
    run: Run,
    stage: str,
    state: TrainState,
    packed: Packed,
    cfg: SFTConfig,
    *,
    model: ModelConfig | DenseConfig,
    seed: int,
    log_every: int = 10,
) -> tuple[TrainState, float]:
    """Trains on packed rows for `cfg.steps` steps with a fresh optimizer: (state, seconds)."""
    optimizer = optim.adamw(cfg.optim)
    step_jit = compile_supervised(optimizer, mtp_weight=cfg.mtp_weight)
    speed = model.moe.bias_update_speed if isinstance(model, ModelConfig) else 0.0

    def step_fn(step, carry):
        batch = corpus.batch_at(packed, step, batch_size=cfg.batch_size, seed=seed)
        controls = Controls(
            np.float32(optim.learning_rate(cfg.optim, step, cfg.steps)),
            np.float32(speed if step < cfg.steps * (1 - cfg.bias_freeze) else 0.0),
        )
        new, metrics = step_jit(carry["state"], micro_batched(batch, cfg.micro_batches), controls)

        def row():
            values = {k: v for k, v in metrics.items() if k != "load"}
            return values | {"lr": controls.learning_rate} | load_row(metrics)

        return {"state": new}, row

    carry = {"state": restart(state, optimizer)}
    carry, seconds = run_stage(run, stage, carry, step_fn, steps=cfg.steps, log_every=log_every)
    return carry["state"], seconds


def grpo(
    run: Run,
    stage: str,
    state: TrainState,
    cfg: GRPOConfig,
    sampler: Sampler,
    *,
    words: Words,
    bias_speed: float,
    seed: int,
    reward_fn: RewardFn | None = None,
) -> tuple[TrainState, float]:
    """Reinforcement learning on the train split with the reference set to the starting policy.

    Args:
        reward_fn: `(problems, texts) -> float32 [B]` instead of accuracy and format: for controls.

    Returns:
        (state, seconds).
    """
    optimizer = optim.adamw(cfg.optim)
    step_jit = compile_grpo(cfg.update, optimizer)
    temperature = np.float32(sampler.cfg.temperature)
    temperatures = [sampler.cfg.temperature] * cfg.group_size

    def controls_at(step):
        rate = optim.learning_rate(cfg.optim, step, cfg.steps)
        return Controls(np.float32(rate), np.float32(bias_speed))

    compiling: list[Ahead] = []

    def step_fn(step, carry):
        if not compiling:  # in the first step: a finished stage compiles nothing
            rollouts = sampler.ahead(carry["state"], cfg.prompts, len(temperatures)).shapes
            compiling.append(_compiling(step_jit, carry, rollouts, controls_at(0), temperature))
        problems = words.problems(cfg.prompts, seed + step, "train")
        done = sampler(carry["state"], problems, (seed, step), temperatures)
        reward_B, shares = _rewards(done, cfg, words, reward_fn)
        compiling[0].join()
        new, metrics = step_jit(
            carry["state"], carry["reference"], done.rollout, reward_B, controls_at(step),
            temperature=temperature,
        )  # fmt: skip
        renew = cfg.reference_every and (step + 1) % cfg.reference_every == 0
        reference = _copied(new.params) if renew else carry["reference"]

        def row():
            seen = shares | _seen(done, words) | load_row(metrics)
            return {k: v for k, v in metrics.items() if k != "load"} | seen

        return {"state": new, "reference": reference}, row

    carry = {"state": restart(state, optimizer), "reference": _copied(state.params)}
    carry, seconds = run_stage(run, stage, carry, step_fn, steps=cfg.steps)
    return carry["state"], seconds


def _compiling(step_jit, carry, rollouts: Rollout, controls: Controls, temperature) -> Ahead:
    """The step, compiling in a thread: the sampler compiles in its first call meanwhile."""
    rewards_B = rollouts.ended_B.update(dtype=np.float32)
    args = carry["state"], carry["reference"], rollouts, rewards_B, controls
    return Ahead(step_jit, *args, temperature=temperature).start()


def _copied(params):
    """Arrays of their own: the state's are donated."""
    return jax.tree.map(lambda x: x.copy(), params)


def _rewards(done: Completions, cfg: GRPOConfig, words: Words, reward_fn: RewardFn | None):
    """(rewards [B] of `reward_fn`, or the recipe's; shares of right and of well-formed answers)."""
    right = accuracy(done.problems, done.texts, words.template)
    formed = format_reward(done.texts, words.template)
    if reward_fn is None:
        reward_B = combine((cfg.accuracy_weight, cfg.format_weight), right, formed)
    else:
        reward_B = reward_fn(done.problems, done.texts)
    return reward_B, {"accuracy": right.mean(), "format": formed.mean()}


def _seen(done: Completions, words: Words) -> dict[str, float]:
    """What the metrics tell of completions beside their rewards."""
    scores = score(done.problems, done.texts, done.tokens_B, words.template)
    return {"mean_tokens": done.tokens_B.mean(), "reflection": scores.reflects.mean()}


def rejection_sample(
    run: Run,
    name: str,
    state: TrainState,
    cfg: RejectionConfig,
    sampler: Sampler,
    *,
    words: Words,
    batch: tuple[int, int],
    seed: int,
) -> list[dict[str, str]]:
    """Draws train problems and keeps up to `cfg.keep` distinct right, well-formed traces of each.

    Problems are drawn with repetition, as for RL; one drawn twice is asked, and kept, twice.

    Args:
        batch: prompts and samples of a call of the sampler; samples beyond `cfg.samples` are
            ignored.

    Returns:
        Rows of task, question and completion.
    """
    prompts, group_size = batch
    problems = words.problems(cfg.problems, seed, "train")
    kept, rounds = [], -(-cfg.samples // group_size)
    run.progress.stage(name, -(-len(problems) // prompts) * rounds)
    done_steps = 0
    for start in range(0, len(problems), prompts):
        chunk = problems[start : start + prompts]
        padded = chunk + problems[: prompts - len(chunk)]
        found: dict[int, list[str]] = {i: [] for i in range(len(chunk))}
        for again in range(rounds):
            noise = (seed, start * rounds + again)
            done = sampler(state, padded, noise, [1.0] * group_size)
            scores = score(done.problems, done.texts, done.tokens_B, words.template)
            asked_B = again * group_size + np.arange(len(done.texts)) % group_size < cfg.samples
            good = scores.correct & scores.well_formed & asked_B
            for row in np.flatnonzero(good):
                traces = found.get(row // group_size)
                text = done.texts[row]
                if traces is not None and text not in traces and len(traces) < cfg.keep:
                    traces.append(text)
            done_steps += 1
            run.progress.step(done_steps, kept=float(sum(map(len, found.values())) + len(kept)))
        kept += [
            {"task": chunk[i].task, "question": chunk[i].question, "completion": text}
            for i, traces in found.items()
            for text in traces
        ]
    return kept


def pack_traces(traces: Sequence[dict[str, str]], words: Words, *, length: int) -> Packed:
    """Kept traces as packed rows in which only the completions are learnt."""
    encode = words.tokenizer.encode
    examples = [
        example(encode(prompt(t["question"], words.template)), encode(t["completion"]))
        for t in traces
    ]
    return pack(examples, length=length, pad_id=words.tokenizer.pad_id)
