# SPDX-License-Identifier: Apache-2.0
"""The controls of a finished quickstart run: how much of what RL brings is RL.

Arms, all from the run's own checkpoints and measured on its held-out problems:
`rl_1` with a *random reward*; *more cold-start SFT*, on as many tokens as RL trained on; RL after a
cold start *without any retry*; and for the Qwen2-shaped student *GRPO alone*, from its base model
and from its base model after the cold start, the whole costing as many floating-point operations as
its distillation: 6 N a trained token, 2 N a sampled or reference-scored one. A base model knows no
answer tags, so from it GRPO has no reward to start from: that arm shows just this.

    python experiments/controls.py runs/quickstart --out runs/controls
    python experiments/controls.py runs/countdown --out runs/controls_countdown \
        --arms the_run random_reward more_sft no_retry
"""

import argparse
import dataclasses
import json
import math
import pathlib

import numpy as np

from r1jax.config import GRPOConfig, RecipeConfig, SFTConfig, from_config_dict, to_config_dict
from r1jax.eval.summary import read_summary
from r1jax.io import metrics, outdir
from r1jax.train.loop import Run, load
from r1jax.train.progress import Silent
from r1jax.train.recipe import Recipe, heldout

COLUMNS = ("pass_at_1", "greedy", "first_try_rate", "self_correction_rate", "reflection_rate")
ARMS = ("the_run", "random_reward", "more_sft", "no_retry", "student_alone", "student_cold")


def trained_tokens(run: pathlib.Path, rows: int) -> int:
    """Completion tokens that `rl_1` of the run learnt from."""
    steps = [row for row in metrics.read(run / "metrics.jsonl") if row["stage"] == "rl_1"]
    return round(sum(row["mean_tokens"] for row in steps) * rows)


def equal_steps(cfg: RecipeConfig, records: dict[str, dict], *, after_cold_start: bool) -> int:
    """GRPO steps of the student that cost as much as its distillation, sampled traces included.

    All parameters count, though not all of the teacher's are active: that favours GRPO.
    """
    teacher, student = records["rl_2"], records["student_qwen2"]
    small, large, tokens = student["parameters"], teacher["parameters"], teacher["mean_tokens"]
    sampled = cfg.distill_data.problems * cfg.distill_data.samples * tokens
    budget = 6 * small * row_tokens(cfg.distill) + 2 * large * sampled
    if after_cold_start:
        budget -= 6 * small * row_tokens(cfg.cold_start)
    rows = cfg.rl_1.prompts * cfg.rl_1.group_size
    step = rows * small * (8 * (tokens + cfg.sampling.prompt_length) + 2 * tokens)
    return math.ceil(budget / step)


def row_tokens(cfg: SFTConfig) -> int:
    """Tokens of the rows that a supervised stage goes through."""
    return cfg.steps * cfg.batch_size * cfg.length


def show(name: str, record: dict) -> None:
    """Prints one line of figures, or one for each task of a mix."""
    for task, by_task in record["by_task"].items():
        label = name if len(record["by_task"]) == 1 else f"{name}: {task}"
        values = [(record | by_task)[column] for column in COLUMNS]  # None: no first try was wrong
        shares = "".join(f"{'–':>12}" if v is None else f"{100 * v:12.1f}" for v in values)
        print(f"{label:34}{shares}{record['steps']:8}", flush=True)


class Controls:
    """The arms of one finished run, each a method that runs what is not done yet and shows it."""

    def __init__(self, run: pathlib.Path, out: pathlib.Path):
        raw = json.loads((run / "run.json").read_text())["config"]
        self.out = out
        self.cfg = from_config_dict(RecipeConfig, raw)
        self.records = {r["name"]: r for r in read_summary(run)["stages"]}
        self.source = Run(run, raw, Silent(), 1e9)
        self.budget = trained_tokens(run, self.cfg.rl_1.prompts * self.cfg.rl_1.group_size)

    def start(self, name: str, cfg: RecipeConfig, stage: str, model=None):
        """A recipe in a folder of its own, and the state that a stage of the run left."""
        outdir.claim(self.out / name, to_config_dict(cfg).to_dict())
        recipe = Recipe(cfg, self.out / name, Silent())
        fresh = recipe.fresh("pretrain", model or cfg.model).slim()
        return recipe, load(self.source, stage, {"state": fresh})["state"]

    def the_run(self) -> None:
        """What the run itself reached."""
        for name in ("cold_start", "rl_1", "rl_2", "student_qwen2"):
            show(f"the run: {name}", self.records[name])

    def random_reward(self) -> None:
        """`rl_1` where every answer's reward is drawn from [0, 1)."""
        rng = np.random.default_rng(0)
        recipe, state = self.start("random", self.cfg, "cold_start")

        rules = recipe.judge(self.cfg.rl_1.reward)

        def noise(step, asked, done):
            found = rules(step, asked, done)()
            return lambda: found._replace(reward_B=rng.random(len(done.texts), np.float32))

        recipe.stage("rl_1", state, recipe.reinforce("rl_1", self.cfg.rl_1, noise))
        show("rl_1, random reward", recipe.records[-1])

    def more_sft(self) -> None:
        """The cold start goes on for as many tokens as `rl_1` learnt from."""
        cfg = dataclasses.replace(self.cfg, seed=self.cfg.seed + 1)  # other traces, other order
        recipe, state = self.start("more_sft", cfg, "cold_start")
        learnt = recipe.cold_start_rows.mask_NT.mean() * cfg.cold_start.batch_size
        steps = math.ceil(self.budget / (learnt * cfg.cold_start.length))
        longer = dataclasses.replace(cfg.cold_start, steps=steps)
        recipe.cfg = dataclasses.replace(cfg, cold_start=longer)
        recipe.heldout = heldout(self.cfg, recipe.words)  # the run's own
        recipe.stage("cold_start", state, recipe.cold_start)
        show("cold start, then more SFT", recipe.records[-1])

    def no_retry(self) -> None:
        """Cold start on traces without any retry, then `rl_1`."""
        mix = dataclasses.replace(self.cfg.tasks.mix, retry=0.0)
        cfg = dataclasses.replace(self.cfg, tasks=dataclasses.replace(self.cfg.tasks, mix=mix))
        recipe, state = self.start("no_retry", cfg, "pretrain")
        state = recipe.stage("cold_start", state, recipe.cold_start)
        show("cold start without retry", recipe.records[-1])
        recipe.stage("rl_1", state, recipe.reinforce("rl_1", cfg.rl_1))
        show("  and rl_1", recipe.records[-1])

    def student_alone(self) -> None:
        """GRPO on the student's base model."""
        recipe, base = self.start("student_alone", self.cfg, "base_qwen2", self.cfg.students.qwen2)
        rl = self.equal(after_cold_start=False)
        recipe.stage("rl_1", base, recipe.reinforce("rl_1", rl))
        show("student: GRPO alone", recipe.records[-1])

    def student_cold(self) -> None:
        """GRPO on the student's base model after the cold start."""
        recipe, base = self.start("student_cold", self.cfg, "base_qwen2", self.cfg.students.qwen2)
        state = recipe.stage("cold_start", base, recipe.cold_start)
        show("student: cold start", recipe.records[-1])
        rl = self.equal(after_cold_start=True)
        recipe.stage("rl_1", state, recipe.reinforce("rl_1", rl))
        show("  and GRPO", recipe.records[-1])

    def equal(self, *, after_cold_start: bool) -> GRPOConfig:
        """`rl_1`, as long as the student's distillation is dear."""
        steps = equal_steps(self.cfg, self.records, after_cold_start=after_cold_start)
        return dataclasses.replace(self.cfg.rl_1, steps=steps)


def main() -> None:
    """Runs the arms and prints one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=pathlib.Path, help="folder of a finished run")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="default: all")
    args = parser.parse_args()
    controls = Controls(args.run, args.out)
    print(f"{'':34}" + "".join(f"{c.split('_rate')[0]:>12.11}" for c in COLUMNS) + "   steps")
    for arm in args.arms:
        getattr(controls, arm)()


if __name__ == "__main__":
    main()
