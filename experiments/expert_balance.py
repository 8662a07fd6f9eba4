# SPDX-License-Identifier: Apache-2.0
"""How even the loads of devices that share experts are, by the answers of a run's model.

Copies are placed by what answers to training's questions asked for, as sampling does it; for
comparison by what the prompts at hand ask for, and by what their own answers turn out to ask for.
Nothing is distributed: loads are counted, then dealt out.

    python experiments/expert_balance.py RUN [--prompts 64] [--samples 8]
"""

import argparse
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from r1jax.data.tokenizer import task_tokenizer
from r1jax.infer.decode import positions_of
from r1jax.nn.param import RouterBias
from r1jax.parallel.eplb import spread_out
from r1jax.rl.rollout import rows_of
from r1jax.train.rebalance import fullest
from r1jax.train.sampler import Sampler
from r1jax.train.state import TrainState
from r1jax.train.trained import config_of, open_run
from r1jax.train.words import Words, template_of


def loads(model, tokens_BT, valid_BT) -> np.ndarray:
    """[L, E] tokens of each expert."""
    run = jax.jit(lambda t, v: model(t, positions_of(v), v.astype(np.int32)).stats.load)
    return np.asarray(run(tokens_BT, valid_BT))


def placed(load_LE: np.ndarray, by_LE: np.ndarray, slots: int, devices: int) -> float:
    """What the fullest device gets of the mean when experts lie as `by_LE` says."""
    found = [spread_out(by_E, slots=slots, devices=devices) for by_E in by_LE]
    pairs = zip(load_LE, found, strict=True)
    return fullest(np.stack([p.device_loads(load_E, devices) for load_E, p in pairs]), devices)


def main() -> None:
    """Draws, counts, places and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="of the recipe, as r1jax quickstart leaves it")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    args = parser.parse_args()
    cfg, model = config_of(args.run), open_run(args.run).module
    words = Words(cfg.tasks, task_tokenizer(), template_of(cfg.tasks))
    sampler = Sampler(cfg.sampling, words.ending())
    graphdef, params, router = nnx.split(model, nnx.Param, RouterBias)
    state = TrainState(np.int32(0), params, router, (), graphdef)

    def drawn(split: str) -> tuple[np.ndarray, np.ndarray]:
        """Loads of prompts and of answers."""
        asked = words.asked(words.problems(args.prompts, 1, split))
        r = sampler.draw(state, asked.ids, (0, 0), [1.0] * args.samples)
        rows = rows_of(r)
        prompts_LE = loads(model, r.prompt_PS, r.prompt_valid_PS)
        both_LE = loads(model, rows.tokens_BL, rows.segments_BL > 0)
        return prompts_LE, both_LE - args.samples * prompts_LE

    (_, before_LE), (prompts_LE, answers_LE) = drawn("train"), drawn("heldout")
    experts = answers_LE.shape[1]
    print("| devices | slots | in order | by training | by prompts | by the answers themselves |")
    print("|---|---|---|---|---|---|")
    for devices in (n for n in (2, 4, 8, 16) if experts % n == 0):
        for slots in (experts, experts + devices, experts + 2 * devices):
            known = (before_LE, prompts_LE, answers_LE)
            by = (placed(answers_LE, by_LE, slots, devices) for by_LE in known)
            cells = (devices, slots, *(f"{x:.2f}" for x in (fullest(answers_LE, devices), *by)))
            print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
