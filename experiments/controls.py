# SPDX-License-Identifier: Apache-2.0
"""The controls of a finished quickstart run: how much of what RL brings is RL.

Arms, all from the run's own checkpoints and measured on its held-out problems:
`rl_1` with a *random reward*; *more cold-start SFT*, on as many tokens as RL trained on; RL after a
cold start *without any retry*; and for the Qwen2-shaped student *GRPO alone*, from its base model
and from its base model after the cold start, the whole costing as many floating-point operations as
its distillation: 6 N a trained token, 2 N a sampled or reference-scored one. A base model knows no
answer tags, so from it GRPO has no reward to start from: that arm shows just this.

    python experiments/controls.py runs/quickstart --out runs/controls
"""

import argparse
import dataclasses
import json
import math
import pathlib

import numpy as np

from r1jax.config import RecipeConfig, SFTConfig, from_config_dict, to_config_dict
from r1jax.eval.summary import read_summary
from r1jax.io import metrics, outdir
from r1jax.train.loop import Run, load
from r1jax.train.progress import Silent
from r1jax.train.recipe import Recipe, heldout

COLUMNS = ("pass_at_1", "greedy", "first_try_rate", "self_correction_rate", "reflection_rate")


def arm(cfg: RecipeConfig, out: pathlib.Path) -> Recipe:
    """A recipe with a folder of its own."""
    outdir.claim(out, to_config_dict(cfg).to_dict())
    return Recipe(cfg, out, Silent())


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


def main() -> None:
    """Runs the arms and prints one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=pathlib.Path, help="folder of a finished run")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    records = {r["name"]: r for r in read_summary(args.run)["stages"]}
    raw = json.loads((args.run / "run.json").read_text())["config"]
    cfg = from_config_dict(RecipeConfig, raw)
    source = Run(args.run, raw, Silent(), 1e9)
    rng, rl = np.random.default_rng(0), cfg.rl_1
    budget = trained_tokens(args.run, rl.prompts * rl.group_size)
    more = dataclasses.replace(cfg, seed=cfg.seed + 1)  # other traces, in another order
    blunt = dataclasses.replace(cfg.tasks, mix=dataclasses.replace(cfg.tasks.mix, retry=0.0))
    student = cfg.students.qwen2

    def start(name, changed, stage, model=cfg.model):
        """A recipe of its own, and the state that a stage of the run left."""
        recipe = arm(changed, args.out / name)
        fresh = recipe.fresh("pretrain", model).slim()
        return recipe, load(source, stage, {"state": fresh})["state"]

    def show(name, record):
        record = record | next(iter(record["by_task"].values()))
        shares = "".join(f"{100 * (record[c] or 0.0):12.1f}" for c in COLUMNS)
        print(f"{name:28}{shares}{record['steps']:8}", flush=True)

    def noise(problems, texts):
        return rng.random(len(texts)).astype(np.float32)

    print(f"{'':28}" + "".join(f"{c.split('_rate')[0]:>12.11}" for c in COLUMNS) + "   steps")
    for name in ("cold_start", "rl_1", "rl_2", "student_qwen2"):
        show(f"the run: {name}", records[name])
    recipe, state = start("random", cfg, "cold_start")
    recipe.stage("rl_1", state, recipe.reinforce("rl_1", rl, noise))
    show("rl_1, random reward", recipe.records[-1])
    recipe, state = start("more_sft", more, "cold_start")
    learnt = (
        recipe.cold_start_rows.mask_NT.mean() * cfg.cold_start.batch_size * cfg.cold_start.length
    )
    longer = dataclasses.replace(cfg.cold_start, steps=math.ceil(budget / learnt))
    recipe.cfg = dataclasses.replace(more, cold_start=longer)
    recipe.heldout = heldout(cfg, recipe.words)  # the run's own
    recipe.stage("cold_start", state, recipe.cold_start)
    show("cold start, then more SFT", recipe.records[-1])
    recipe, state = start("no_retry", dataclasses.replace(cfg, tasks=blunt), "pretrain")
    state = recipe.stage("cold_start", state, recipe.cold_start)
    show("cold start without retry", recipe.records[-1])
    recipe.stage("rl_1", state, recipe.reinforce("rl_1", rl))
    show("  and rl_1", recipe.records[-1])
    equal = dataclasses.replace(rl, steps=equal_steps(cfg, records, after_cold_start=False))
    recipe, base = start("student_alone", cfg, "base_qwen2", student)
    recipe.stage("rl_1", base, recipe.reinforce("rl_1", equal))
    show("student: GRPO alone", recipe.records[-1])
    recipe, base = start("student_cold", cfg, "base_qwen2", student)
    state = recipe.stage("cold_start", base, recipe.cold_start)
    show("student: cold start", recipe.records[-1])
    equal = dataclasses.replace(rl, steps=equal_steps(cfg, records, after_cold_start=True))
    recipe.stage("rl_1", state, recipe.reinforce("rl_1", equal))
    show("  and GRPO", recipe.records[-1])


if __name__ == "__main__":
    main()
