# SPDX-License-Identifier: Apache-2.0
"""What drafts of the MTP module bring on a model of the quickstart, or on a random one.

Held-out prompts are answered by plain decoding and with drafts in turns, in one process, after a
first time that compiles; prefill is in the figures. Speed is the median, over turns, of plain
decoding's time over drafting's of the same turn.

    python experiments/drafting.py RUN                     # the quickstart's folder: its last stage
    python experiments/drafting.py RUN --random            # its shape, weights as they are drawn
    python experiments/drafting.py RUN --always            # drafts also where they should not pay
    python experiments/drafting.py                         # 11.7M parameters, as they are drawn
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np

from r1jax.data.tokenizer import task_tokenizer
from r1jax.infer.generate import Generation, Sampling
from r1jax.io.hf_config import read_config
from r1jax.nn.build import build
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
        dataclasses.replace(how, drafts=n, always=how.always and n > 0) for n in (0, most)
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


def of_run(path: Path, *, random: bool):
    """(model, tokenizer's ends, a function that makes so many prompts) of a run's last stage."""
    cfg, model = config_of(path), open_run(path).module
    if random:
        model = initialise(Transformer(model.cfg), jax.random.key(0))
    words = Words(cfg.tasks, task_tokenizer(), template_of(cfg.tasks))
    asked = lambda n: words.asked(words.problems(n, 1, "heldout")).ids  # noqa: E731
    ids = lambda n: [[int(t) for t in np.asarray(row)] for row in asked(n)]  # noqa: E731
    return model, words.ending().eos_ids, ids


def of_bench():
    """The same of the DeepSeek shape of `bench_models.py`, with an MTP module."""
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    import models_work as work

    cfg = read_config(work.TINY | {"num_nextn_predict_layers": 1})
    model = initialise(build(dataclasses.replace(cfg, dtype="float32")), jax.random.key(0))
    return model, (), lambda n: [list(row) for row in work.rows(n, 40, cfg.vocab_size)]


def main() -> None:
    """Reads the flags, answers in turns and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    about = "of the recipe, as r1jax quickstart leaves it; none: 11.7M random parameters"
    parser.add_argument("run", type=Path, nargs="?", help=about)
    parser.add_argument("--random", action="store_true", help="the shape with random weights")
    parser.add_argument("--always", action="store_true", help="draft where it should not pay too")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--drafts", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    args = parser.parse_args()
    model, eos_ids, ids = of_run(args.run, random=args.random) if args.run else of_bench()
    prompts = ids(args.prompts)
    print("| rows | T | drafts | accepted | tokens a pass | plain | speed | same greedy text |")
    print("|---|---|---|---|---|---|---|---|")
    for batch in args.batches:
        for temperature in (0.0, 1.0):
            for most in args.drafts:
                how = Sampling(temperature, None, None, 96, eos_ids, most, always=args.always)
                cells = row(model, prompts, batch, how, most=most, turns=args.turns)
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
