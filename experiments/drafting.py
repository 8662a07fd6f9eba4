# SPDX-License-Identifier: Apache-2.0
"""What drafts of the MTP module bring on a model of the quickstart, or on a random one.

Held-out prompts are answered by plain decoding and with drafts in turns, in one process, after a
first time that compiles; prefill is in the figures. Speed is the median, over turns, of plain
decoding's time over drafting's of the same turn.

    python experiments/drafting.py RUN                     # the quickstart's folder: its last stage
    python experiments/drafting.py RUN --random            # its shape, weights as they are drawn
"""

import argparse
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from r1jax.data.tokenizer import task_tokenizer
from r1jax.infer.generate import Generation, Sampling
from r1jax.nn.param import initialise
from r1jax.nn.transformer import Transformer
from r1jax.train.trained import config_of, open_run
from r1jax.train.words import Words, template_of


def answered(model, prompts, batch: int, how: Sampling) -> tuple[float, list, list]:
    """(seconds, the answers, counts) of all prompts, `batch` at a time."""
    began, answers, counts = time.perf_counter(), [], []
    for i in range(0, len(prompts), batch):
        rows = prompts[i : i + batch]
        generation = Generation(model, rows, how)
        made = [[] for _ in rows]
        for new in generation:
            for row, tokens in zip(made, new, strict=True):
                row += tokens
        answers += made
        counts.append(generation.counts)
    return time.perf_counter() - began, answers, counts


def row(model, prompts, batch: int, how: Sampling, *, most: int, turns: int) -> list[str]:
    """One line of the table."""
    plain, drafted = (
        Sampling(how.temperature, None, None, how.max_tokens, how.eos_ids, drafts=n)
        for n in (0, most)
    )
    runs = {n: [] for n in (0, most)}
    for turn in range(turns + 1):  # the first compiles
        for n in (0, most) if turn % 2 else (most, 0):
            runs[n].append(answered(model, prompts, batch, drafted if n else plain))
    speed = [p[0] / d[0] for p, d in zip(runs[0][1:], runs[most][1:], strict=True)]
    counts = runs[most][-1][2]
    drafts, accepted = (sum(getattr(c, n) for c in counts) for n in ("drafted", "accepted"))
    tokens, passes = (sum(getattr(c, n) for c in counts) for n in ("tokens", "passes"))
    same = how.temperature > 0 or runs[0][-1][1] == runs[most][-1][1]
    return [
        f"{batch}", f"{how.temperature:g}", f"{most}", f"{accepted / max(drafts, 1):.0%}",
        f"{tokens / passes:.2f}", f"{1e3 * statistics.median(r[0] for r in runs[0][1:]):.0f} ms",
        f"{statistics.median(speed):.2f} ({min(speed):.2f} to {max(speed):.2f})",
        "" if how.temperature else "yes" if same else "NO",
    ]  # fmt: skip


def main() -> None:
    """Reads the flags, answers in turns and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="of the recipe, as r1jax quickstart leaves it")
    parser.add_argument("--random", action="store_true", help="the shape with random weights")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--drafts", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    args = parser.parse_args()
    cfg, model = config_of(args.run), open_run(args.run).module
    if args.random:
        model = initialise(Transformer(model.cfg), jax.random.key(0))
    words = Words(cfg.tasks, task_tokenizer(), template_of(cfg.tasks))
    asked = words.asked(words.problems(args.prompts, 1, "heldout"))
    prompts = [[int(t) for t in np.asarray(ids)] for ids in asked.ids]
    print("| rows | T | drafts | accepted | tokens a pass | plain | speed | same greedy text |")
    print("|---|---|---|---|---|---|---|---|")
    for batch in args.batches:
        for temperature in (0.0, 1.0):
            for most in args.drafts:
                how = Sampling(temperature, None, None, 96, words.ending().eos_ids)
                cells = row(model, prompts, batch, how, most=most, turns=args.turns)
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
