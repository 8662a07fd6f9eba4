# SPDX-License-Identifier: Apache-2.0
"""r1jax on the work of `work.py`: rollout, reward on the host, one compiled GRPO step."""

import jax
import numpy as np
import optax
import programs
import work

import r1jax
from r1jax.config import DenseConfig, GRPOConfig, OptimConfig, RopeConfig, UpdateConfig
from r1jax.nn.dense import DenseTransformer
from r1jax.optim import adamw
from r1jax.rl.rollout import rollout
from r1jax.train.grpo import compile_grpo
from r1jax.train.program import Ahead, program
from r1jax.train.state import Controls, create, restart

MODEL = DenseConfig(
    vocab_size=work.VOCAB, num_layers=work.LAYERS, hidden_size=work.EMBED,
    intermediate_size=work.MLP, num_heads=work.HEADS, num_kv_heads=work.KV_HEADS,
    head_dim=work.HEAD_DIM, qkv_bias=True, tie_embeddings=False, max_position=64,
    dtype="float32", remat=False, scan_unroll=work.LAYERS, rope=RopeConfig(theta=10_000.0),
)  # fmt: skip
GRPO = GRPOConfig(
    prompts=len(work.PROMPTS), group_size=work.SAMPLES,
    update=UpdateConfig(beta=work.KL_COEF, clip_low=work.CLIP, clip_high=work.CLIP),
    optim=OptimConfig(learning_rate=work.LEARNING_RATE, weight_decay=0.0),
)  # fmt: skip


def main() -> None:
    """Times the iterations and reports them."""
    compiled = programs.watch_compilations()
    optimizer = adamw(GRPO.optim)
    state = create(lambda: DenseTransformer(MODEL), optax.identity(), jax.random.key(0))
    state = restart(state, optimizer)
    reference = jax.tree.map(lambda x: x.copy(), state.params)
    prompt_PS = np.array([[work.SYMBOLS.index(c) for c in p] for p in work.PROMPTS], np.int32)
    valid_PS = np.ones(prompt_PS.shape, bool)
    temperature_B = np.ones(len(prompt_PS) * work.SAMPLES, np.float32)

    def sample(state, step):
        key = jax.random.fold_in(jax.random.key(0), step)
        return rollout(
            state.model(), prompt_PS, valid_PS, key, temperature_B,
            max_new_tokens=work.NEW_TOKENS, eos_ids=(), pad_id=work.PAD,
        )  # fmt: skip

    sample = program(sample)
    update = compile_grpo(GRPO.update, optimizer)
    controls = Controls(np.float32(work.LEARNING_RATE), np.float32(0.0))
    jax.block_until_ready(reference)
    for step in programs.measured_steps(f"r1jax {r1jax.__version__}", compiled):
        if step == 0:  # as `train.stages.grpo`: the programs compile side by side
            sampling = Ahead(sample, state.slim(), np.uint32(step)).start()
            reward = np.empty(temperature_B.shape, np.float32)
            updating = Ahead(
                update, state, reference, sampling.shapes, reward, controls,
                temperature=np.float32(1.0),
            ).start()  # fmt: skip
            sampling.join()
        done = sample(state.slim(), np.uint32(step))
        texts = ["".join(work.SYMBOLS[i] for i in row) for row in np.asarray(done.tokens_BT)]
        reward_B = np.array(work.reward(texts), np.float32)
        updating.join()
        state, metrics = update(
            state, reference, done, reward_B, controls, temperature=np.float32(1.0)
        )
        jax.block_until_ready(metrics)


if __name__ == "__main__":
    main()
