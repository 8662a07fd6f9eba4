# SPDX-License-Identifier: Apache-2.0
"""Writes ppo_rlax.json: rlax's GAE and clipped surrogate, with gradients, in float64.

    pip install rlax==0.1.9 jax==0.10.2
    python tests/golden/ppo_from_rlax.py

rlax takes one sequence without padding, so every row is given to it at its own length.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import rlax

GAE_CASES = {
    "usual": {"gamma": 1.0, "lam": 0.95},
    "discounted": {"gamma": 0.9, "lam": 0.7},
    "one_step": {"gamma": 0.99, "lam": 0.0},
    "monte_carlo": {"gamma": 1.0, "lam": 1.0},
}
CLIPS = {"usual": 0.2, "tight": 0.05}


def draw() -> dict[str, np.ndarray]:
    """5 rows of up to 7 tokens: rewards, values with one more behind the end, discounts, ratios."""
    rng = np.random.default_rng(0)
    rows, length = 5, 7
    return {
        "reward": rng.normal(size=(rows, length)),
        "value": rng.normal(size=(rows, length)),
        "bootstrap": rng.normal(size=rows),
        "discount": rng.uniform(0.5, 1.0, (rows, length)),
        "length": np.array([7, 1, 4, 2, 6]),
        "log_ratio": 0.4 * rng.normal(size=(rows, length)),
        "advantage": rng.normal(size=(rows, length)),
    }


def rlax_gae(data: dict[str, np.ndarray], gamma: float | None, lam: float) -> list[list[float]]:
    """Advantages of each row at its own length; gamma None takes the discounts of the draw."""
    advantages = []
    for i, n in enumerate(data["length"]):
        value = np.append(data["value"][i, :n], data["bootstrap"][i])
        discount = data["discount"][i, :n] if gamma is None else np.full(n, gamma)
        reward = data["reward"][i, :n]
        advantage = rlax.truncated_generalized_advantage_estimation(
            *(jnp.asarray(x) for x in (reward, discount)), lam, jnp.asarray(value)
        )
        advantages.append(advantage.tolist())
    return advantages


def rlax_clip(data: dict[str, np.ndarray], epsilon: float) -> dict[str, object]:
    """Mean clipped surrogate over all tokens, and its gradient to the log-ratios."""
    mask = np.arange(data["reward"].shape[1]) < data["length"][:, None]
    log_ratio, advantage = (jnp.asarray(data[name][mask]) for name in ("log_ratio", "advantage"))

    def loss(log_ratio):
        return rlax.clipped_surrogate_pg_loss(jnp.exp(log_ratio), advantage, epsilon)

    value, slope = jax.value_and_grad(loss)(log_ratio)
    gradient = np.zeros(mask.shape)
    gradient[mask] = slope
    return {"loss": float(value), "gradient": gradient.tolist()}


def main() -> None:
    """Writes every case of one draw."""
    jax.config.update("jax_enable_x64", True)
    data = draw()
    record = {
        "inputs": {name: x.tolist() for name, x in data.items()},
        "gae": {case: rlax_gae(data, **options) for case, options in GAE_CASES.items()}
        | {"discounts_by_token": rlax_gae(data, None, 0.9)},
        "clip": {case: rlax_clip(data, epsilon) for case, epsilon in CLIPS.items()},
    }
    path = pathlib.Path(__file__).with_name("ppo_rlax.json")
    path.write_text(json.dumps(record, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
