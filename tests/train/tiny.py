# SPDX-License-Identifier: Apache-2.0
"""States of the smallest models that still have every part, for tests of the trainers."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from r1jax.config import (
    DenseConfig,
    Difficulty,
    EvalConfig,
    GRPOConfig,
    ModelConfig,
    OptimConfig,
    RecipeConfig,
    RejectionConfig,
    SamplingConfig,
    SFTConfig,
    StudentsConfig,
    TaskConfig,
    TraceMix,
    UpdateConfig,
)
from r1jax.data.tokenizer import task_tokenizer
from r1jax.nn.param import RouterBias
from r1jax.train.state import TrainState
from r1jax.train.words import Words, template_of
from tests.nn import tiny

# One mixture-of-experts layer, and the MTP module with a router of its own.
DEEPSEEK = tiny.model_config(num_layers=1, first_k_dense=0)
QWEN2 = tiny.dense_config(qwen2=True)

# Room for every token of the tasks.
VOCAB = 336

# Its state is the gradient and its update is the gradient: one step shows both.
KEEP_GRADIENT = optax.trace(decay=0.0)


def state(
    cfg: ModelConfig | DenseConfig = DEEPSEEK,
    *,
    optimizer: optax.GradientTransformation = KEEP_GRADIENT,
    seed: int = 0,
) -> TrainState:
    """A filled model and a fresh optimizer. Arrays are copies: a step may be given them to keep."""
    graphdef, params, router = nnx.split(tiny.model(cfg, seed), nnx.Param, RouterBias)
    params, router = nnx.clone(params), nnx.clone(router)
    return TrainState(jnp.int32(0), params, router, optimizer.init(params), graphdef)


def recipe() -> RecipeConfig:
    """The whole recipe on one task, a step or two a stage; all samplers draw 2 × 4 rows."""
    sft = SFTConfig(
        steps=2,
        examples=24,
        batch_size=2,
        length=64,
        optim=OptimConfig(learning_rate=0.01, warmup_steps=1, final_fraction=0.1),
    )
    rl = GRPOConfig(
        steps=2,
        prompts=2,
        group_size=4,
        reference_every=2,
        update=UpdateConfig(beta=0.04),
        optim=OptimConfig(learning_rate=0.01, weight_decay=0.0),
    )
    kept = RejectionConfig(problems=2, samples=4, keep=2)
    return RecipeConfig(
        tasks=TaskConfig(
            names=("arithmetic",),
            weights=(1.0,),
            difficulty=Difficulty(arithmetic_operations=(1,)),
            mix=TraceMix(max_tries=2),
        ),
        model=tiny.model_config(num_layers=1, first_k_dense=0, vocab_size=VOCAB),
        students=StudentsConfig(
            tiny.dense_config(qwen2=True, vocab_size=VOCAB, num_layers=1),
            tiny.dense_config(qwen2=False, vocab_size=VOCAB, num_layers=1),
        ),
        sampling=SamplingConfig(prompt_length=8, max_new_tokens=8),
        evaluation=EvalConfig(problems=2, samples=3, shown=1),
        pretrain=sft,
        cold_start=dataclasses.replace(sft, steps=1),
        rl_1=rl,
        rejection=kept,
        sft_2=dataclasses.replace(sft, steps=1),
        rl_2=dataclasses.replace(rl, steps=1),
        distill_data=kept,
        student_pretrain=dataclasses.replace(sft, steps=1),
        distill=sft,
    )


def words(cfg: RecipeConfig) -> Words:
    """The language of a recipe."""
    return Words(cfg.tasks, task_tokenizer(), template_of(cfg.tasks))


def traced_once(fn: Callable) -> Callable:
    """`fn`, to be jitted: a second trace for arguments of the same shapes, on the same mesh, fails.

    `chex.assert_max_traces` would do for one program; this one allows a trace for each.
    """
    seen = set()

    @functools.wraps(fn)
    def traced(*args, **kwargs):
        leaves, treedef = jax.tree.flatten((args, kwargs))
        program = treedef, tuple(x.shape for x in leaves), jax.sharding.get_abstract_mesh()
        assert program not in seen, f"{fn.__name__} is traced again"
        seen.add(program)
        return fn(*args, **kwargs)

    return traced


def packed(seed: int = 0, rows: int = 4, length: int = 10) -> dict[str, np.ndarray]:
    """Rows of one to three documents and some padding, with weights that differ from row to row."""
    rng = np.random.default_rng(seed)
    shape = (rows, length)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "positions")}
    batch |= {"segments": np.zeros(shape, np.int32), "mask": np.zeros(shape, np.float32)}
    for row in range(rows):
        start = 0
        for segment in range(1, 2 + row % 3):
            end = start + int(rng.integers(2, 4 + row))
            if end > length:
                break
            ids = tiny.tokens(int(rng.integers(1 << 30)), end - start)
            here = (row, slice(start, end))
            batch["tokens"][here] = ids
            batch["targets"][row, start : end - 1] = ids[1:]
            batch["positions"][here] = np.arange(end - start)
            batch["segments"][here] = segment
            batch["mask"][row, start : end - 1] = rng.random(end - start - 1) < 0.8
            start = end
    return batch
