# SPDX-License-Identifier: Apache-2.0
"""r1jax on the work of `models_work.py`: the supervised step and `Generation`."""

import dataclasses
import time

import jax
import models_work as work
import numpy as np

import r1jax
from r1jax.config import OptimConfig
from r1jax.infer.generate import Generation, Sampling
from r1jax.io.hf_config import read_config
from r1jax.io.model import open_model
from r1jax.nn.build import build
from r1jax.nn.param import initialise
from r1jax.optim import adamw
from r1jax.train.state import Controls, create
from r1jax.train.supervised import compile_supervised, micro_batched


def train(cfg) -> float:
    """Seconds of one training step."""
    optimizer = adamw(OptimConfig(learning_rate=work.LEARNING_RATE))
    state = create(lambda: build(cfg), optimizer, jax.random.key(0))
    tokens = np.array(work.rows(work.ROWS, work.LENGTH, cfg.vocab_size), np.int32)
    ones = np.ones_like(tokens)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "positions": np.cumsum(ones, 1, dtype=np.int32) - 1,
        "segments": ones,
        "mask": ones.astype(np.float32),
    }
    batch = micro_batched(batch, 1)
    step = compile_supervised(optimizer, mtp_weight=0.0)
    controls = Controls(np.float32(work.LEARNING_RATE), np.float32(0.0))
    seconds = []
    for _ in range(work.STEPS):
        began = time.perf_counter()
        state, metrics = step(state, batch, controls)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - began)
    return work.steady(seconds)


def generation(model, batch: int, length: int, new: int, *, runs: int = 2) -> list[float]:
    """[seconds to the first token, seconds of each further step] of the last run."""
    prompts = work.rows(batch, length, model.cfg.vocab_size)
    sampling = Sampling(temperature=0.0, max_tokens=new)
    for _ in range(runs):
        began = time.perf_counter()
        stamps, made = [], 0
        for tokens in Generation(model, prompts, sampling):
            made += len(tokens[0])
            stamps.append((time.perf_counter(), made))
        assert made == new
    (first, one), (end, n) = stamps[0], stamps[-1]
    return [first - began, (end - first) / max(n - one, 1)]


def prefill(model, batch: int) -> float:
    """Seconds to the first token, once compiled."""
    runs = [generation(model, batch, work.READ, 1, runs=1)[0] for _ in range(1 + work.REPEATS)]
    return min(runs[1:])


def decode(model, batch: int, context: int) -> float:
    """Seconds of a step."""
    return generation(model, batch, context, work.NEW)[1]


def main() -> None:
    """Times what was asked for."""
    args, seconds = work.arguments(), {}
    cfg = read_config(work.TINY, where="models_work.py")
    cfg = dataclasses.replace(cfg, remat=False, scan_unroll=cfg.num_layers)

    def timed(name: str, measure, *how) -> None:
        if args.only in name:
            seconds[name] = measure(*how)

    timed("tiny train", train, cfg)
    model = jax.jit(lambda key: initialise(build(cfg), key))(jax.random.key(0))
    for context in work.CONTEXTS:
        timed(f"tiny decode {context}", decode, model, 8, context)
    if args.smollm2:
        smol = open_model(args.smollm2, dtype="float32").module
        for batch in work.BATCHES:
            timed(f"smol prefill {batch}", prefill, smol, batch)
            timed(f"smol decode {batch}", decode, smol, batch, work.AFTER)
    work.report(f"r1jax {r1jax.__version__}", seconds)


if __name__ == "__main__":
    main()
