# SPDX-License-Identifier: Apache-2.0
"""Runs of one trainer: open the model and the data, train, measure, leave a model behind.

run.json  metrics.jsonl  checkpoints/  summary.json  curves.png
model/    what was trained: `r1jax generate OUT/model`, and the start of the next run
"""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from r1jax.config import (
    DPORun,
    GRPORun,
    PPORun,
    RewardModelRun,
    RunConfig,
    SFTRun,
    check_rebalance,
    check_redundant,
    to_config_dict,
)
from r1jax.data.datasets import (
    conversation_examples,
    conversations,
    encode_labelled,
    encoded,
    labelled,
    preference_examples,
    preferences,
)
from r1jax.data.packing import pack
from r1jax.data.template import PRIMER_RL, R1, Template
from r1jax.eval.curves import draw_curves
from r1jax.eval.summary import read_summary, write_summary
from r1jax.io import metrics, outdir
from r1jax.nn.value import trunk_of, valued
from r1jax.parallel import hosts
from r1jax.parallel.mesh import entered
from r1jax.train import answers, stages
from r1jax.train.asked import (
    check_alike,
    heldout_questions,
    tell_unknown,
    training_questions,
)
from r1jax.train.behind import Apart
from r1jax.train.collect import Collector
from r1jax.train.judge import Rules
from r1jax.train.loop import Run, finish, finished, load
from r1jax.train.measure import measure, pair_accuracy
from r1jax.train.ppo import policy_of
from r1jax.train.progress import Progress, Silent
from r1jax.train.rebalance import Rebalance
from r1jax.train.reward_model import open_judges
from r1jax.train.sampler import Sampler
from r1jax.train.start import (
    Start,
    ending_of,
    fingerprint,
    open_start,
    save_reward_model,
    save_trained,
    state_of,
)
from r1jax.train.state import TrainState
from r1jax.train.trained import MODEL, is_run
from r1jax.train.verifying import verifier

Record = dict[str, Any]


def run_trainer(
    cfg: RunConfig, out: str | Path, *, display: Progress | None = None, force: bool = False
) -> Record:
    """Runs one trainer to its end and writes the model, the summary and the curves.

    Args:
        cfg: of the run.
        out: its folder; a half-done run of the same config goes on where it stopped.
        display: is told what happens.
        force: start anew.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        ValueError: the folder belongs to something else or another process is at work in it, or
            the model, the data and the config do not go together.
        KeyboardInterrupt: after saving.
    """
    as_dict = to_config_dict(cfg).to_dict()
    run = Run(Path(out), as_dict, display or Silent(), cfg.checkpoint_every)
    if not force and hosts.by_first(lambda: outdir.inspect(out, as_dict)) == "finished":
        return hosts.by_first(lambda: read_summary(out))
    with entered(cfg.mesh, spare=_apart(cfg)):
        return _run_trainer(cfg, run, force)


def _apart(cfg: RunConfig) -> int:
    """Devices that only sample."""
    return cfg.sampler.devices if isinstance(cfg, GRPORun) else 0


def _run_trainer(cfg: RunConfig, run: Run, force: bool) -> Record:
    out, as_dict = run.out, run.config
    rows, length = batch_of(cfg)

    def fits(model):
        copies = ("start.redundant_experts", cfg.start.redundant_experts)
        check_redundant(model, *copies, "mesh.expert", cfg.mesh.expert)
        cfg.mesh.check(model, rows=rows, length=length)
        if _apart(cfg):
            piece = cfg.grpo.prompts * cfg.grpo.group_size // cfg.grpo.pieces
            cfg.sampler.check(model, cfg.mesh, rows=piece)
        check_rebalance(model, cfg.rebalance_every, cfg.mesh)
        if isinstance(cfg, GRPORun | PPORun):
            own = _apart(cfg) > 0
            axis, where = ("sampler.expert", cfg.sampler) if own else ("mesh.expert", cfg.mesh)
            copies = ("sampling.redundant_experts", cfg.sampling.redundant_experts)
            check_redundant(model, *copies, axis, where.expert)

    if Path(cfg.start.path).exists() and not is_run(Path(cfg.start.path)):
        run.progress.message(f"reading {cfg.start.path}")  # perhaps many gigabytes
    # What is wrong is refused before anything is written.
    start = open_start(cfg.start, check=fits)
    hosts.check_same(fingerprint(start.model.module), f"start.path={cfg.start.path}")
    if cfg.rebalance_every:
        run.rebalance = Rebalance(cfg.rebalance_every, start.cfg.moe.n_group)
    at_work = cfg.mesh.devices + _apart(cfg)
    if at_work < jax.device_count():
        run.progress.message(
            f"{at_work} of {jax.device_count()} devices at work; for all of them set "
            f"mesh.fsdp={(jax.device_count() - _apart(cfg)) * cfg.mesh.fsdp // cfg.mesh.devices}"
        )
    with _trainer(cfg, run, start) as train, outdir.held(out, as_dict, force=force):
        records = train()
        left = {"stages": records, "seed": cfg.seed, "config": as_dict}

        def leave_behind() -> Record:
            summary = write_summary(run.out, left)
            rows = metrics.read(run.out / "metrics.jsonl")
            draw_curves(run.out / "curves.png", rows, cfg.trainer)
            return summary

        return hosts.by_first(leave_behind)


def batch_of(cfg: RunConfig) -> tuple[int, int]:
    """Rows of a micro-batch, and their length, of a run."""
    if isinstance(cfg, SFTRun):
        return cfg.sft.batch_size // cfg.sft.micro_batches, cfg.sft.length
    if isinstance(cfg, DPORun | RewardModelRun):
        return cfg.pairs.batch_size // cfg.pairs.micro_batches, cfg.pairs.length
    stage = cfg.grpo if isinstance(cfg, GRPORun) else cfg.ppo
    # A piece is scored at once by a reward model.
    piece = stage.prompts * stage.group_size // stage.pieces
    micro = (
        stage.prompts * stage.group_size // (stage.update.minibatches * stage.update.micro_batches)
    )
    return math.gcd(piece, micro), cfg.sampling.prompt_length + cfg.sampling.max_new_tokens


@contextlib.contextmanager
def _trainer(cfg: RunConfig, run: Run, start: Start) -> Iterator[Any]:
    """What trains and leaves a model behind; data is read, and workers live, from here on."""
    if isinstance(cfg, SFTRun):
        yield _sft(cfg, run, start)
    elif isinstance(cfg, DPORun | RewardModelRun):
        yield _pairs(cfg, run, start)
    else:
        with _judged(cfg, run, start) as online:
            yield online


def _sft(cfg: SFTRun, run: Run, start: Start):
    """Supervised fine-tuning on packed conversations."""
    path, skip, most = cfg.data.path, cfg.data.skip, cfg.sft.examples
    rows = conversations(path, skip=skip)
    if len(rows.items) > most:
        run.progress.message(
            f"{path}: the first {most:,} of {len(rows.items):,} conversations are learnt; "
            "raise sft.examples for more"
        )
    examples = conversation_examples(
        rows.items[:most],
        start.tokenizer,
        length=min(cfg.sft.length, start.cfg.max_position),
        skip=skip,
        places=rows.places,
    )
    _tell_skipped(run, path, [*rows.skipped, *examples.skipped])
    rows = [ids for ids, _ in examples.items]
    check_alike(path, rows)
    tell_unknown(run.progress, path, start.tokenizer, rows)
    ending = ending_of(start.model)
    packed = pack(examples.items, length=cfg.sft.length, pad_id=ending.pad_id)
    sft = cfg.sft
    if cfg.epochs:
        steps = max(1, round(cfg.epochs * packed.rows / sft.batch_size))
        sft = dataclasses.replace(sft, steps=steps)
    run.progress.message(f"{len(examples.items)} examples in {packed.rows} rows, {sft.steps} steps")

    def train() -> list[Record]:
        def go():
            return stages.supervised(
                run, "sft", start.state, packed, sft, model=start.cfg, seed=cfg.seed, log_every=1
            )

        state, record = _once(run, "sft", start.state, sft.steps, go)
        _leave(run, start, state)
        return [record]

    return train


def _pairs(cfg: DPORun | RewardModelRun, run: Run, start: Start):
    """DPO, or a reward model, on a file of answers."""
    is_reward = isinstance(cfg, RewardModelRun)
    pairs = cfg.pairs
    rows = _answers(cfg, cfg.data.path, run, start)
    heldout = _answers(cfg, cfg.data.heldout, run, start) if cfg.data.heldout else None
    state = start.state
    if is_reward:
        std = 1.0 / (start.cfg.hidden_size + 1) ** 0.5
        head = valued(trunk_of(start.model.module), jax.random.key(cfg.seed), std=std)
        state = state_of(head)

    def train() -> list[Record]:
        def go():
            return stages.pairs(
                run, cfg.trainer, state, rows, pairs, bias_speed=start.bias_speed, seed=cfg.seed
            )

        trained, record = _once(run, cfg.trainer, state, pairs.steps, go)
        if heldout is not None:
            reference = None if is_reward else start.state
            record["heldout_accuracy"] = pair_accuracy(trained, reference, heldout, pairs)
            run.progress.message(f"held-out accuracy {record['heldout_accuracy']:.1%}")
        _leave(run, start, trained, save_reward_model if is_reward else save_trained)
        return [record]

    return train


def _answers(cfg: DPORun | RewardModelRun, path: str, run: Run, start: Start) -> answers.Answers:
    """The rows of a file as arrays."""
    length, skip = cfg.pairs.length, cfg.data.skip
    if length > start.cfg.max_position:
        raise ValueError(
            f"pairs.length={length} exceeds the {start.cfg.max_position} positions of "
            f"{cfg.start.path}; lower it"
        )
    pointwise = cfg.pairs.loss == "pointwise"
    rows = (labelled if pointwise else preferences)(path, skip=skip)
    how = dict(length=length, skip=skip, places=rows.places)
    if pointwise:
        ids = encoded(
            rows.items,
            lambda item: [encode_labelled(item, start.tokenizer)],
            size=lambda item: len(item.prompt) + len(item.completion),
            **how,
        )
        made = answers.of_labelled(ids.items, length=length)
    else:
        ids = preference_examples(rows.items, start.tokenizer, **how)
        made = answers.of_pairs(ids.items, length=length)
    _tell_skipped(run, path, [*rows.skipped, *ids.skipped])
    run.progress.message(f"{path}: {len(ids.items):,} rows")
    texts = [part for item in ids.items for part in item if isinstance(part, list)]
    check_alike(path, texts)
    tell_unknown(run.progress, path, start.tokenizer, texts)
    return made


@contextlib.contextmanager
def _judged(cfg: GRPORun | PPORun, run: Run, start: Start) -> Iterator[Any]:
    """GRPO or PPO: questions, a sampler, a judge with its workers."""
    stage = cfg.grpo if isinstance(cfg, GRPORun) else cfg.ppo
    longest = cfg.sampling.prompt_length
    _fits(cfg, start)
    how = dict(longest=longest, progress=run.progress)
    questions = training_questions(
        cfg.data, start.tokenizer, seed=cfg.seed, general_from=stage.reward.model_from, **how
    )
    heldout = heldout_questions(cfg.data, start.tokenizer, cfg.measure.questions, **how)
    template = template_for(cfg.data.template, start)
    judges = open_judges(stage.reward, cfg.data, start.tokenizer) if stage.reward.model else None
    sampler = Sampler(cfg.sampling, ending_of(start.model))
    apart = Apart(cfg.mesh, cfg.sampler) if _apart(cfg) else None
    kinds = [*questions(0, 1, 0).answers, *heldout.answers[:1]]
    with verifier(kinds, template) as verify:
        judge = Rules(
            stage.reward, template, verify, max_length=cfg.sampling.max_new_tokens, score=judges
        )
        collector = Collector(stage, sampler, questions, judge, seed=cfg.seed)
        yield lambda: _online(cfg, run, start, collector, heldout, apart=apart)


def _online(cfg: GRPORun | PPORun, run: Run, start: Start, collector: Collector, heldout, *, apart):
    """Measures, trains, measures again."""
    stage, sampler = collector.cfg, collector.sampler
    if apart is not None:  # copies of experts are for the devices that sample
        own = dataclasses.replace(cfg.sampling, redundant_experts=0)
        sampler = Sampler(own, sampler.ending)

    def measured(name: str, state: TrainState, record: Record) -> Record:
        if not heldout.ids:
            return record
        run.progress.message(f"{name}: measuring {len(heldout.ids)} held-out questions")
        how = dict(samples=cfg.measure.samples, temperature=stage.temperature, seed=cfg.seed)
        figures = measure(state, sampler, heldout, collector.judge, **how)
        run.progress.message(f"{name}: held-out pass@1 {figures['pass_at_1']:.1%}")
        return record | figures

    if not heldout.ids:
        run.progress.message("nothing is measured: data.heldout names no file of questions")
    first = finished(run, "start")
    if first is None:
        first = measured("start", start.state, _record("start", start.state, 0, 0.0))
        finish(run, "start", {"step": np.int32(0)}, 0, first)

    def go():
        if isinstance(cfg, GRPORun):
            how = dict(bias_speed=start.bias_speed, apart=apart)
            return stages.grpo(run, "grpo", start.state, stage, collector, **how)
        return _ppo(cfg, run, start, collector)

    state, record = _once(
        run, cfg.trainer, start.state, stage.steps, go,
        measured=lambda state, record: measured(cfg.trainer, state, record),
    )  # fmt: skip
    _leave(run, start, state)
    return [first, record]


def _ppo(cfg: PPORun, run: Run, start: Start, collector: Collector):
    """PPO from the policy, with a critic whose trunk is a copy of it or the policy's own."""
    key = jax.random.key(cfg.seed)
    rules = dict(collector=collector, bias_speed=start.bias_speed)
    if cfg.ppo.critic == "shared":
        both = state_of(valued(start.model.module, key, std=0.0))
        state, seconds = stages.ppo(run, "ppo", both, None, cfg.ppo, **rules)
        return policy_of(state), seconds
    critic = state_of(valued(trunk_of(start.model.module), key, std=0.0))
    return stages.ppo(run, "ppo", start.state, critic, cfg.ppo, **rules)


def _once(run: Run, name: str, state: TrainState, steps: int, go, *, measured=lambda _, r: r):
    """(state, record) of a stage: run now, or as it was left when it was finished."""
    record = finished(run, name)
    if record is not None:
        return load(run, name, {"state": state.slim()})["state"], record
    state, seconds = go()
    record = measured(state.slim(), _record(name, state, steps, seconds))
    state = dataclasses.replace(state.slim(), load=None)  # what `load` above asks for
    finish(run, name, {"state": state}, steps, record)
    return state, record


def _record(name: str, state: TrainState, steps: int, seconds: float) -> Record:
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    return {"name": name, "parameters": parameters, "steps": steps, "seconds": round(seconds, 4)}


def _leave(run: Run, start: Start, state: TrainState, save=save_trained) -> None:
    """Writes OUT/model; one from before the last kill gives way."""
    folder = run.out / MODEL
    hosts.by_first(lambda: shutil.rmtree(folder, ignore_errors=True))
    save(folder, start, state)
    run.progress.message(f"the model is in {folder}")


def _fits(cfg: GRPORun | PPORun, start: Start) -> None:
    total = cfg.sampling.prompt_length + cfg.sampling.max_new_tokens
    if total > start.cfg.max_position:
        raise ValueError(
            f"sampling.prompt_length + max_new_tokens = {total} exceeds the "
            f"{start.cfg.max_position} positions of {cfg.start.path}; lower one of them"
        )


def template_for(name: str, start: Start) -> Template | None:
    """The tags of completions; the end of a text is the tokenizer's."""
    if name == "plain":
        return None
    eos = start.tokenizer.config["eos_token"] or R1.eos
    return dataclasses.replace({"r1": R1, "primer": PRIMER_RL}[name], eos=eos)


def _tell_skipped(run: Run, path: str, skipped: list) -> None:
    if skipped:
        run.progress.message(f"{path}: {len(skipped)} rows skipped, the first {skipped[0]}")
