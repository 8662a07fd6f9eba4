# SPDX-License-Identifier: Apache-2.0
"""Writes objectives_tunix.json: losses and gradients of Tunix 0.1.7's `grpo_loss_fn`, float32.

    pip install google-tunix==0.1.7        # Python 3.12
    python tests/golden/objectives_from_tunix.py

The function runs its model itself; here its model gives log-probabilities that are set.
"""

import json
import pathlib
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.rl import algo_core, common

# name -> (loss, reduction, KL estimator, β, ε of the upper bound, cap of the dual clip)
CASES = {
    "grpo": ("grpo", "sequence-mean-token-mean", "low_var_kl", 0.04, 0.2, None),
    "grpo_k1": ("grpo", "sequence-mean-token-mean", "kl", 0.1, 0.28, None),
    "grpo_k2": ("grpo", "sequence-mean-token-mean", "mse_kl", 0.1, 0.28, None),
    "grpo_dual": ("grpo", "sequence-mean-token-mean", "low_var_kl", 0.0, 0.2, 1.5),
    "dapo": ("grpo", "token-mean", "low_var_kl", 0.0, 0.28, None),
    "dr_grpo": ("grpo", "sequence-mean-token-scale", "low_var_kl", 0.0, 0.2, None),
    "gspo_token": ("gspo-token", "sequence-mean-token-mean", "low_var_kl", 0.0, 0.2, None),
    "importance": ("grpo", "token-mean", "low_var_kl", 0.04, 0.28, None),
}


def draw() -> dict[str, np.ndarray]:
    """Log-probabilities of 8 completions of up to 6 tokens, policies 0.4 nats apart."""
    rng = np.random.default_rng(7)
    shape = rows, length = 8, 6
    logp = -rng.exponential(1, shape)
    data = {
        "logp": logp,
        "old_logp": logp + 0.4 * rng.normal(size=shape),
        "ref_logp": logp + 0.4 * rng.normal(size=shape),
        "advantage": rng.normal(size=rows),
        "mask": np.arange(length)[None] < rng.integers(2, length + 1, rows)[:, None],
        "importance": np.minimum(np.exp(0.5 * rng.normal(size=shape)), 2.0),
    }
    return {name: x.astype(np.float32) for name, x in data.items()}


def tunix_loss(data: dict[str, np.ndarray], case: str) -> dict[str, object]:
    """Loss and its gradient with respect to the policy's log-probabilities."""
    loss_algo, reduction, estimator, beta, high, cap = CASES[case]
    config = types.SimpleNamespace(
        beta=beta, epsilon=0.2, epsilon_high=high, epsilon_c=cap, loss_algo=loss_algo,
        loss_agg_mode=reduction, kl_loss_mode=estimator, kl_clamp_value=None, temperature=1.0,
        entropy_coef=None,
    )  # fmt: skip
    ids = jnp.ones(data["logp"].shape, jnp.int32)
    example = types.SimpleNamespace(
        prompt_ids=ids[:, :1], completion_ids=ids, completion_mask=data["mask"],
        advantages=data["advantage"], old_per_token_logps=data["old_logp"],
        ref_per_token_logps=data["ref_logp"],
        sampler_is_weights=data["importance"] if case == "importance" else None,
    )  # fmt: skip

    def loss(logp_BT):
        given = lambda *_, **__: (logp_BT, jnp.zeros((*logp_BT.shape, 2)))  # noqa: E731
        with mock.patch.object(common, "compute_per_token_logps", given):
            return algo_core.grpo_loss_fn(nnx.Dict(), example, config, 0, 1)[0]

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(data["logp"]))
    return {"loss": float(value), "gradient": np.asarray(gradient, np.float64).tolist()}


def main() -> None:
    """Writes every case."""
    data = draw()
    record = {
        "inputs": {name: x.tolist() for name, x in data.items()},
        "cases": {case: tunix_loss(data, case) for case in CASES},
    }
    path = pathlib.Path(__file__).with_name("objectives_tunix.json")
    path.write_text(json.dumps(record, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
