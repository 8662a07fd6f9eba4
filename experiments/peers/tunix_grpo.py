# SPDX-License-Identifier: Apache-2.0
"""Tunix GRPO on the work of `work.py`; needs google-tunix 0.1.7 and prints one line of JSON.

A step is the time between two pulls of the data iterator: rollout, reference log-probs, reward,
advantages, update. Its vanilla sampler draws with the same key in every step.
"""

import importlib.metadata

import jax
import numpy as np
import optax
import programs
import work
from flax import nnx
from tunix.models.qwen2 import model as qwen2
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig


class Tokenizer:
    """One symbol a token, and no begin-of-sequence token."""

    def encode(self, text: str, **_: object) -> list[int]:
        return [work.SYMBOLS.index(c) for c in text]

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(work.SYMBOLS[i] for i in ids)

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return work.EOS

    def pad_id(self) -> int:
        return work.PAD


def learner() -> GRPOLearner:
    """Builds the policy, its reference, the sampler and the trainer on one device."""
    config = qwen2.ModelConfig(
        num_layers=work.LAYERS, vocab_size=work.VOCAB, embed_dim=work.EMBED, hidden_dim=work.MLP,
        num_heads=work.HEADS, num_kv_heads=work.KV_HEADS, head_dim=work.HEAD_DIM,
        rope_theta=10_000, norm_eps=1e-6,
    )  # fmt: skip
    # Its embedding lookup does not say where the result lies, which Explicit axes would ask for.
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        actor, reference = (qwen2.Qwen2(config, rngs=nnx.Rngs(0)) for _ in range(2))
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(work.LEARNING_RATE, weight_decay=0.0),
        eval_every_n_steps=1_000, max_steps=1_000,  # the end of the data ends the run
    )  # fmt: skip
    rollout = RolloutConfig(
        max_prompt_length=work.PROMPT_TOKENS, max_tokens_to_generate=work.NEW_TOKENS,
        kv_cache_size=work.PROMPT_TOKENS + work.NEW_TOKENS, temperature=1.0, top_p=1.0,
    )  # fmt: skip
    cluster_config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(roles, mesh), rollout_engine="vanilla",
        training_config=training, rollout_config=rollout,
    )  # fmt: skip
    cluster = rl_cluster.RLCluster(
        actor=actor, reference=reference, tokenizer=Tokenizer(), cluster_config=cluster_config
    )
    grpo = GRPOConfig(
        num_generations=work.SAMPLES, num_iterations=1, beta=work.KL_COEF,
        kl_loss_mode="low_var_kl", epsilon=work.CLIP,
    )  # fmt: skip
    return GRPOLearner(rl_cluster=cluster, algo_config=grpo, reward_fns=work.reward)


def main() -> None:
    """Times the steps; the last one prints the result."""
    compiled = programs.watch_compilations()
    trainer, prompts = learner(), np.array(work.PROMPTS)
    system = f"Tunix {importlib.metadata.version('google-tunix')}"
    trainer.train({"prompts": prompts} for _ in programs.measured_steps(system, compiled))


if __name__ == "__main__":
    main()
