# SPDX-License-Identifier: Apache-2.0
"""GRPO, PPO and DPO beside each other: same model, same task, same start, as many samples.

Every finished quickstart run given is one seed: its cold start is the start. GRPO and PPO draw 128
samples a step; DPO is given as many samples of the start in all, as pairs of a right and a wrong
answer to one problem. Memory, operations and parameters are those of the compiled steps.

    python experiments/grpo_ppo_dpo.py runs/q0 runs/q1 runs/q2 --out runs/compare
"""

import argparse
import dataclasses
import pathlib

import jax
import numpy as np
from matplotlib.figure import Figure

from r1jax import optim
from r1jax.config import laptop
from r1jax.io import jsonl, metrics, outdir
from r1jax.nn.value import trunk_of, valued
from r1jax.train.asked import heldout_questions, training_questions
from r1jax.train.grpo import compile_grpo
from r1jax.train.judge import Rules, by_task
from r1jax.train.measure import measure
from r1jax.train.pairs import compile_dpo
from r1jax.train.ppo import ActorCritic, compile_ppo
from r1jax.train.progress import Silent
from r1jax.train.runs import run_trainer, template_for
from r1jax.train.sampler import Sampler
from r1jax.train.start import ending_of, open_start, state_of
from r1jax.train.state import Controls, restart

STEPS, PER_STEP, PER_PROBLEM = 30, 128, 16
NAMES = ("grpo", "ppo", "dpo")
ABOUT = {
    "grpo": ("none", "rules"),
    "ppo": ("a model of the policy's size", "rules"),
    "dpo": ("none", "pairs, ranked by rules"),
}


class Seed:
    """One start and the three runs from it."""

    def __init__(self, run: pathlib.Path, out: pathlib.Path, seed: int):
        self.out, self.seed = out / run.name, seed
        self.out.mkdir(parents=True, exist_ok=True)
        self.where = laptop.StartConfig(path=str(run / "cold_start"), remat=False)
        self.start = open_start(self.where)
        self.data = laptop.arithmetic()
        self.sampler = Sampler(laptop.sampling(), ending_of(self.start.model))
        template = template_for(self.data.template, self.start)
        self.judge = Rules(laptop.RewardConfig(), template, by_task(template), max_length=72)

    def configs(self):
        """The three runs."""
        pairs = self.out / "pairs.jsonl"
        if not pairs.exists():
            jsonl.write(pairs, self.pairs())
        runs = {"grpo": laptop.grpo(steps=STEPS), "ppo": laptop.ppo(steps=STEPS)}
        runs["dpo"] = laptop.dpo(str(pairs))
        return {
            name: dataclasses.replace(run, start=self.where, seed=self.seed)
            for name, run in runs.items()
        }

    def pairs(self) -> list[dict[str, str]]:
        """A right and a wrong answer to one problem, up to four pairs of each."""
        how = dict(longest=12, seed=self.seed, progress=Silent())
        questions = training_questions(self.data, self.start.tokenizer, **how)
        found, size = [], PER_STEP // PER_PROBLEM
        for step in range(STEPS):
            asked = questions(step, size, step)
            done = self.sampler(self.start.state, asked.ids, (self.seed, step), [1.0] * PER_PROBLEM)
            right_B = self.judge.verify(asked.repeated(PER_PROBLEM).answers, done.texts)()
            for p, question in enumerate(asked.prompts):
                rows = range(p * PER_PROBLEM, (p + 1) * PER_PROBLEM)
                good, bad = (
                    list(dict.fromkeys(done.texts[b] for b in rows if right_B[b] == want))
                    for want in (1.0, 0.0)
                )
                found += [
                    {"prompt": question, "chosen": a, "rejected": b}
                    for a, b in zip(good[:4], bad[:4], strict=False)
                ]
        return found

    def pass_at_1(self, folder: pathlib.Path | None) -> float:
        """Of a trained model, or of the start: 48 held-out problems, 16 samples each."""
        state = self.start.state
        if folder is not None:
            state = open_start(laptop.StartConfig(path=str(folder), remat=False)).state
        heldout = heldout_questions(
            self.data, self.start.tokenizer, 48, longest=12, progress=Silent()
        )
        how = dict(samples=16, temperature=1.0, seed=self.seed)
        return measure(state, self.sampler, heldout, self.judge, **how)["pass_at_1"]


def compiled(seed: Seed, runs) -> dict[str, dict[str, float]]:
    """Memory in MiB, operations and parameters held of each compiled step."""
    state, key = seed.start.state, jax.random.key(0)
    controls = Controls(np.float32(0), np.float32(0))
    reward, hot = np.zeros(PER_STEP, np.float32), np.float32(1)
    drawn = seed.sampler.ahead(state, 16, 8).shapes
    adam = {name: optim.adamw(r.optim) for name, r in stages_of(runs).items()}
    critic = state_of(valued(trunk_of(seed.start.model.module), key, std=0.0))
    own = optim.adamw(runs["ppo"].ppo.value_optim)
    both = ActorCritic(restart(state, adam["ppo"]), restart(critic, own))
    batch = jax.eval_shape(lambda: pair_batch(runs["dpo"].pairs))
    steps = {
        "grpo": (
            compile_grpo(runs["grpo"].grpo.update, adam["grpo"]),
            (restart(state, adam["grpo"]), state.params, drawn, reward, controls),
            dict(temperature=hot),
        ),
        "ppo": (
            compile_ppo(runs["ppo"].ppo.update, adam["ppo"], own),
            (both, state.params, drawn, reward, ActorCritic(controls, controls)),
            dict(temperature=hot),
        ),
        "dpo": (
            compile_dpo(runs["dpo"].pairs, adam["dpo"]),
            (restart(state, adam["dpo"]), state.params, batch, controls),
            {},
        ),
    }
    found = {}
    for name, (step, args, kwargs) in steps.items():
        program = step.lower(*args, **kwargs).compile()
        memory, held = program.memory_analysis(), jax.tree.leaves(args[:2])
        found[name] = {
            "memory_mib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20,
            "gflop": program.cost_analysis()["flops"] / 1e9,
            "held": sum(x.size for x in held),
        }
    return found


def pair_batch(cfg):
    """The shapes of a batch of pairs."""
    shape = (cfg.micro_batches, cfg.batch_size // cfg.micro_batches, 2, cfg.length)
    ints = {k: np.zeros(shape, np.int32) for k in ("tokens", "positions", "segments")}
    return ints | {
        "mask": np.zeros(shape, np.float32),
        "weight": np.zeros(shape[:2], np.float32),
    }


def stages_of(runs):
    """The section of each run that its trainer reads."""
    return {"grpo": runs["grpo"].grpo, "ppo": runs["ppo"].ppo, "dpo": runs["dpo"].pairs}


def picture(path: pathlib.Path, results, curves) -> None:
    """Held-out pass@1 by trainer, a dot a seed; and the accuracy of the samples on the way."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    for x, name in enumerate(("start", *NAMES)):
        y = [100 * r[name] for r in results]
        left.bar(x, np.mean(y), color="#c9d6f5" if x else "#dfe3ea")
        left.plot([x] * len(y), y, "o", color="#2a5bd7", markersize=5)
    left.set_xticks(range(4), ["start", "GRPO", "PPO", "DPO"])
    left.set_title("Held-out pass@1, percent; a dot a seed", loc="left", fontsize=10)
    for name, colour in zip(("grpo", "ppo"), ("#2a5bd7", "#d9622b"), strict=True):
        rows = np.array([[100 * v for v in c[name]] for c in curves])
        steps = np.arange(1, rows.shape[1] + 1)
        right.plot(steps, rows.T, color=colour, alpha=0.25, linewidth=1)
        right.plot(steps, rows.mean(0), color=colour, label=name.upper())
    right.set_title("Accuracy of the samples, percent, by step", loc="left", fontsize=10)
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(0, 100)
    figure.savefig(path, dpi=140)


def table(results, cost, seconds) -> str:
    """The primer's comparison with measured columns."""
    head = (
        "trainer",
        "critic",
        "reward",
        "MiB",
        "GFLOP/step",
        "held",
        "s/step",
        "pass@1",
        "spread",
    )
    lines = [head]
    for name in NAMES:
        y = [100 * r[name] for r in results]
        c = cost[name]
        lines.append(
            (
                name.upper(), *ABOUT[name], f"{c['memory_mib']:.0f}", f"{c['gflop']:.1f}",
                f"{c['held'] / 1e6:.2f}M", f"{np.median(seconds[name]):.2f}",
                f"{np.mean(y):.1f}", f"{min(y):.1f}–{max(y):.1f}",
            )
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines
    )


def main() -> None:
    """Runs what is not done, then prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=pathlib.Path, nargs="+", help="finished quickstart runs")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    results, curves, seconds = [], [], {name: [] for name in NAMES}
    for number, run in enumerate(args.runs):
        seed = Seed(run, args.out, number)
        runs = seed.configs()
        found, curve = {"start": seed.pass_at_1(None)}, {}
        for name, cfg in runs.items():
            folder = seed.out / name
            run_trainer(cfg, folder)
            rows = metrics.read(folder / "metrics.jsonl")
            times = np.diff([r["seconds"] for r in rows])
            seconds[name] += times[len(times) // 4 :].tolist()  # compilation left out
            curve[name] = [r["accuracy"] for r in rows]
            found[name] = seed.pass_at_1(folder / "model")
            print(f"{run}: {name} {100 * found[name]:.1f} % from {100 * found['start']:.1f}")
        results.append(found)
        curves.append(curve)
    cost = compiled(seed, runs)
    text = table(results, cost, seconds)
    outdir.write_json(args.out / "results.json", {"results": results, "cost": cost})
    (args.out / "table.txt").write_text(text + "\n")
    picture(args.out / "grpo_ppo_dpo.png", results, curves)
    print(text)


if __name__ == "__main__":
    main()
