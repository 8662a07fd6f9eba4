# SPDX-License-Identifier: Apache-2.0
"""What it spares to decode with weights that stay in FP8 blocks, where every token made them.

The DeepSeek shape of `bench_models.py`, 11.7M random parameters, one row, by the recipe in float32
activations; both ways in turns in one process, after a first turn that compiles.

    python experiments/fp8_decoding.py [--turns 5] [--tokens 64]
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import jax

from r1jax.config import FP8Config
from r1jax.infer import generate
from r1jax.io.hf_config import read_config
from r1jax.nn.build import build
from r1jax.nn.param import initialise

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import models_work as work


def decoded(model, prompts, how) -> tuple[float, list]:
    """(milliseconds a token behind the first, what was said)."""
    rows = iter(generate.Generation(model, prompts, how))
    first, began = next(rows), time.perf_counter()
    rest = list(rows)
    took = time.perf_counter() - began
    return 1e3 * took / (how.max_tokens - 1), [first, *rest]


def main() -> None:
    """Reads the flags, decodes in turns and prints a line a turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    cfg = read_config(work.TINY)
    cfg = dataclasses.replace(cfg, dtype="float32", fp8=FP8Config(enabled=True))
    model = initialise(build(cfg), jax.random.key(0))
    held, prepared = generate.prepared(model), generate.prepared
    prompts = [list(map(int, row)) for row in work.rows(1, 40, cfg.vocab_size)]
    how = generate.Sampling(0.0, None, None, args.tokens, (), 0)
    ratios = []
    for turn in range(args.turns + 1):
        after, text = decoded(held, prompts, how)
        generate.prepared = lambda model: model  # as it was: each token quantises
        before, same = decoded(model, prompts, how)
        generate.prepared = prepared
        flat = [[sum(parts, []) for parts in zip(*said, strict=True)] for said in (text, same)]
        if turn:
            ratios.append(after / before)
            print(f"{before:.1f} -> {after:.1f} ms a token, same text: {flat[0] == flat[1]}")
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
