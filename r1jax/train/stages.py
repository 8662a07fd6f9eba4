# SPDX-License-Identifier: Apache-2.0
"""Stages as functions of a state: supervised, GRPO, PPO, pairs of answers, rejection sampling."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from r1jax import optim
from r1jax.config import (
    REWARD_LOSSES,
    DenseConfig,
    GRPOConfig,
    ModelConfig,
    PairsConfig,
    PPOConfig,
    RejectionConfig,
    SFTConfig,
)
from r1jax.data import corpus
from r1jax.data.packing import Packed, example, pack
from r1jax.data.template import prompt
from r1jax.eval.score import score
from r1jax.parallel import hosts
from r1jax.rl.rollout import Rollout, layout
from r1jax.sharding import fed, pieces, place, placed_shape, spec
from r1jax.train.answers import Answers, answers_layout
from r1jax.train.behind import Apart, Behind
from r1jax.train.collect import Collector, InTurns
from r1jax.train.grpo import compile_grpo
from r1jax.train.loop import Run, run_stage
from r1jax.train.pairs import compile_dpo, compile_reward_model
from r1jax.train.ppo import ActorCritic, compile_ppo, compile_shared_ppo, policy_of
from r1jax.train.program import Ahead
from r1jax.train.rebalance import fullest
from r1jax.train.sampler import Sampler
from r1jax.train.state import Controls, TrainState, restart
from r1jax.train.supervised import Batch, compile_supervised
from r1jax.train.words import Words


def load_row(metrics: dict[str, Any]) -> dict[str, Any]:
    """Loads as shares of a layer's tokens, for the expert picture. Nothing for dense models.

    On a mesh that deals experts out, also what the fullest device has of the mean.
    """
    load_LE = hosts.read(metrics["load"])
    if not load_LE.size:
        return {}
    share_LE = load_LE / np.maximum(load_LE.sum(-1, keepdims=True), 1.0)
    devices = pieces("expert")
    balance = {"fullest_device": fullest(share_LE, devices)} if devices > 1 else {}
    return {"expert_load": np.round(share_LE, 6)} | balance


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
        rows = corpus.rows_at(packed, step, batch_size=cfg.batch_size, seed=seed)
        controls = Controls(
            np.float32(optim.learning_rate(cfg.optim, step, cfg.steps)),
            np.float32(speed if step < cfg.steps * (1 - cfg.bias_freeze) else 0.0),
        )
        batch = _fed(packed, rows.reshape(cfg.micro_batches, -1))
        new, metrics = step_jit(carry["state"], batch, controls)

        def row():
            values = {k: v for k, v in metrics.items() if k != "load"}
            return values | {"lr": controls.learning_rate} | load_row(metrics)

        return {"state": new}, row

    carry = {"state": restart(state, optimizer)}
    carry, seconds = run_stage(run, stage, carry, step_fn, steps=cfg.steps, log_every=log_every)
    return carry["state"], seconds


def _fed(packed: Packed, rows_MB: np.ndarray) -> Batch:
    """Micro-batches [M, B, T] of these rows; each process reads those that its devices learn."""
    where, shape = spec(None, "batch", "length"), (*rows_MB.shape, packed.tokens_NT.shape[1])

    def one(array_NT: np.ndarray):
        return fed(shape, where, lambda part: array_NT[rows_MB[part[:2]]][..., part[2]])

    return {name: one(array_NT) for name, array_NT in corpus.columns(packed).items()}


def grpo(
    run: Run,
    stage: str,
    state: TrainState,
    cfg: GRPOConfig,
    collector: Collector,
    *,
    bias_speed: float,
    apart: Apart | None = None,
) -> tuple[TrainState, float]:
    """Reinforcement learning with the reference set to the starting policy: (state, seconds).

    Args:
        apart: devices that draw the next batch meanwhile; None: batches are drawn in turns.
    """
    optimizer = optim.adamw(cfg.optim)
    step_jit = compile_grpo(cfg.update, optimizer)
    temperature = np.float32(cfg.temperature)
    batches = InTurns(collector) if apart is None else Behind(collector, apart)

    def controls_at(step):
        rate = optim.learning_rate(cfg.optim, step, cfg.steps)
        return Controls(np.float32(rate), np.float32(bias_speed))

    compiling: list[Ahead] = []

    def step_fn(step, carry):
        if not compiling:  # in the first step: a finished stage compiles nothing
            rollouts = batches.shapes(carry["state"])
            compiling.append(_compiling(step_jit, carry, rollouts, controls_at(0), temperature))
        got, carried = batches(carry, step)
        compiling[0].join()
        sampled = place(got.rollout, layout())
        new, metrics = step_jit(
            carry["state"], carry["reference"], sampled, got.reward_B, controls_at(step),
            temperature=temperature,
        )  # fmt: skip
        reference = renewed(carry["reference"], new.params, step, cfg.reference_every)

        def row():
            values = {k: v for k, v in metrics.items() if k != "load"}
            return values | got.shown | load_row(metrics)

        carry = {"state": new, "reference": reference, "drawn": np.int32(got.drawn)}
        return carry | carried, row

    reference = copied(state.params) if cfg.update.beta else None
    carry = {
        "state": restart(state, optimizer, counted=_counted(collector)),
        "reference": reference,
        "drawn": np.int32(0),
        **batches.carried(),
    }
    carry, seconds = run_stage(run, stage, carry, step_fn, steps=cfg.steps)
    return carry["state"], seconds


def _counted(collector: Collector) -> bool:
    """Whether its sampler copies experts, which it does by their loads."""
    return collector.sampler.cfg.redundant_experts > 0


def _compiling(step_jit, carry, rollouts: Rollout, controls: Controls, temperature) -> Ahead:
    """The step, compiling in a thread: beside the sampler, which began while this was traced."""
    rewards_B = rollouts.ended_B.update(dtype=np.float32)
    rollouts = jax.tree.map(placed_shape, rollouts, layout())
    args = carry["state"], carry["reference"], rollouts, rewards_B, controls
    return Ahead(step_jit, *args, temperature=temperature).start()


def ppo(
    run: Run,
    stage: str,
    state: TrainState,
    critic: TrainState | None,
    cfg: PPOConfig,
    *,
    collector: Collector,
    bias_speed: float,
) -> tuple[TrainState, float]:
    """PPO with the reference set to the starting policy: (state of the policy, seconds).

    Args:
        state: of the policy; with `cfg.critic` "shared" of an `nn.value.Valued` policy.
        critic: of its own, an `nn.value.Valued`, or None where it is shared.
    """
    temperature = np.float32(cfg.temperature)
    optimizer, value_optimizer = optim.adamw(cfg.optim), optim.adamw(cfg.value_optim)
    counted = _counted(collector)
    if critic is None:
        step_jit = compile_shared_ppo(cfg.update, optimizer, cfg.value_weight)
        models, policy = {"state": restart(state, optimizer, counted=counted)}, policy_of
    else:
        step_jit = compile_ppo(cfg.update, optimizer, value_optimizer)
        models = {"state": restart(state, optimizer, counted=counted)}
        models["critic"] = restart(critic, value_optimizer)
        policy = lambda state: state  # noqa: E731

    def controls_at(step):
        rates = (optim.learning_rate(how, step, cfg.steps) for how in (cfg.optim, cfg.value_optim))
        found = ActorCritic(*(Controls(np.float32(r), np.float32(bias_speed)) for r in rates))
        return found.actor if critic is None else found

    def step_fn(step, carry):
        got = collector.batch(policy(carry["state"]), step, int(carry["drawn"]))
        now = carry["state"] if critic is None else ActorCritic(carry["state"], carry["critic"])
        sampled = place(got.rollout, layout())
        new, metrics = step_jit(
            now, carry["reference"], sampled, got.reward_B, controls_at(step),
            temperature=temperature,
        )  # fmt: skip
        new = {"state": new} if critic is None else {"state": new.actor, "critic": new.critic}
        reference = renewed(carry["reference"], new["state"].params, step, cfg.reference_every)

        def row():
            values = {k: v for k, v in metrics.items() if k != "load"}
            return values | got.shown | load_row(metrics)

        return new | {"reference": reference, "drawn": np.int32(got.drawn)}, row

    reference = copied(state.params) if cfg.update.beta else None
    carry = models | {"reference": reference, "drawn": np.int32(0)}
    carry, seconds = run_stage(run, stage, carry, step_fn, steps=cfg.steps)
    return carry["state"], seconds


def pairs(
    run: Run,
    stage: str,
    state: TrainState,
    rows: Answers,
    cfg: PairsConfig,
    *,
    bias_speed: float,
    seed: int,
) -> tuple[TrainState, float]:
    """DPO and its kin, or a reward model, on answers already given: (state, seconds).

    A policy's reference is the starting policy.
    """
    optimizer = optim.adamw(cfg.optim)
    is_policy = cfg.loss not in REWARD_LOSSES
    step_jit = (compile_dpo if is_policy else compile_reward_model)(cfg, optimizer)

    def step_fn(step, carry):
        batch = rows.batch(step, cfg.batch_size, cfg.micro_batches, seed=seed)
        batch = place(batch, answers_layout(batch))
        rate = optim.learning_rate(cfg.optim, step, cfg.steps)
        controls = Controls(np.float32(rate), np.float32(bias_speed))
        given = (carry["state"], carry["reference"]) if is_policy else (carry["state"],)
        new, metrics = step_jit(*given, batch, controls)

        def row():
            values = {k: v for k, v in metrics.items() if k != "load"}
            return values | {"lr": controls.learning_rate} | load_row(metrics)

        return carry | {"state": new}, row

    carry = {"state": restart(state, optimizer)}
    if is_policy:
        carry["reference"] = copied(state.params)
    carry, seconds = run_stage(run, stage, carry, step_fn, steps=cfg.steps)
    return carry["state"], seconds


def renewed(reference, params, step: int, every: int):
    """The reference after a step: the policy itself every so many steps, if it is ever renewed."""
    renew = reference is not None and every and (step + 1) % every == 0
    return copied(params) if renew else reference


def copied(params):
    """Arrays of their own: the state's are donated."""
    return jax.tree.map(lambda x: x.copy(), params)


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
            done = sampler(state, words.asked(padded).ids, noise, [1.0] * group_size)
            repeated = [p for p in padded for _ in range(group_size)]
            scores = score(repeated, done.texts, done.tokens_B, words.template)
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
