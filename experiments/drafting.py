# SPDX-License-Identifier: Apache-2.0
"""What drafts of the MTP module bring on a model of the quickstart, or on a random one.

Held-out prompts are answered by plain decoding and with drafts, each by both before the next one,
in one process, after a first time that compiles; prefill is in the figures. Speed is the median,
over turns, of plain decoding's time a token over drafting's of the same turn. With `--always` a
round takes as many plain passes as it brings tokens, divided by the speed (of several rows: a
little less, as the last one is waited for); beside it stands what `draft_costs` expects.

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
from r1jax.infer.generate import Counts, Generation, Sampling, draft_costs
from r1jax.io.hf_config import read_config
from r1jax.nn.build import build
from r1jax.nn.param import initialise
from r1jax.nn.transformer import Transformer
from r1jax.train.trained import config_of, open_run
from r1jax.train.words import Words, template_of


@dataclasses.dataclass
class Tally:
    """What a way of decoding has done in a turn."""

    seconds: float = 0.0
    counts: Counts = Counts()
    answers: list = dataclasses.field(default_factory=list)

    def answer(self, model, rows, how: Sampling) -> None:
        """Answers these prompts too."""
        began, generation = time.perf_counter(), Generation(model, rows, how)
        made = list(generation)
        self.seconds += time.perf_counter() - began
        self.counts = Counts(*map(sum, zip(self.counts, generation.counts, strict=True)))
        self.answers += [sum(parts, []) for parts in zip(*made, strict=True)]


def turn_of(model, prompts, batch: int, hows: list[Sampling], turn: int) -> list[Tally]:
    """All prompts, `batch` at a time, each batch in every way before the next one."""
    tallies = [Tally() for _ in hows]
    for n, i in enumerate(range(0, len(prompts), batch)):
        order = list(zip(tallies, hows, strict=True))
        for tally, how in order[:: 1 if (n + turn) % 2 else -1]:
            tally.answer(model, prompts[i : i + batch], how)
    return tallies


def row(model, prompts, batch: int, how: Sampling, turns: int) -> list[str]:
    """One line of the table."""
    hows = [dataclasses.replace(how, drafts=0, always=False), how]
    done = [turn_of(model, prompts, batch, hows, turn) for turn in range(turns + 1)][1:]  # compiled
    speed = [p.seconds / p.counts.tokens * d.counts.tokens / d.seconds for p, d in done]
    plain, drafted = done[-1]
    a_pass = drafted.counts.tokens_per_pass
    same = how.temperature > 0 or plain.answers == drafted.answers
    costs, took = draft_costs(model, batch), a_pass / statistics.median(speed)
    expected = 1 + costs.round + how.drafts * costs.draft
    return [
        f"{batch}", f"{how.temperature:g}", f"{how.drafts}",
        f"{drafted.counts.acceptance:.0%}", f"{a_pass:.2f}",
        f"{1e3 * statistics.median(p.seconds for p, _ in done):.0f} ms",
        f"{statistics.median(speed):.2f} ({min(speed):.2f} to {max(speed):.2f})",
        f"{took:.2f}, {expected:.2f}" if how.always else "",
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
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--drafts", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    args = parser.parse_args()
    model, eos_ids, ids = of_run(args.run, random=args.random) if args.run else of_bench()
    prompts = ids(args.prompts)
    heads = "rows", "T", "drafts", "accepted", "tokens a pass", "plain", "speed"
    print("| " + " | ".join((*heads, "a round, expected", "same greedy text")) + " |")
    print("|---" * (len(heads) + 2) + "|")
    for batch in args.batches:
        for temperature in (0.0, 1.0):
            for most in args.drafts:
                how = Sampling(temperature, None, None, 96, eos_ids, most, always=args.always)
                cells = row(model, prompts, batch, how, args.turns)
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
