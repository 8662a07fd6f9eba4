# SPDX-License-Identifier: Apache-2.0
"""Passes over rows of prompt and completion: what the updates of a rollout are made of.

Rows are dicts: tokens, positions, segments [B, S + T] and completion [B, T], all int32. On a mesh a
pass is one region of local code (`r1jax.sharding.local`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from r1jax.nn.head import score
from r1jax.nn.param import specs
from r1jax.sharding import gather, local, spec

Rows = dict[str, jax.Array]
INPUTS = ("tokens", "positions", "segments", "completion")


def completion_logp(model, rows: Rows, temperature: jax.Array | float):
    """Log-probabilities and entropies of completion tokens, and the expert loads of the pass.

    Args:
        temperature: the sampler's; 0 (greedy) is scored at 1.

    Returns:
        (logp_BT, entropy_BT, load_LE), float32, in nats and tokens.
    """
    return _pass(_scores, 2, model, rows, temperature)


def completion_values(model, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """V of the state that each completion token was produced in [B, T], and the expert loads.

    Args:
        model: an `nn.value.Valued`.
    """
    return _pass(_values, 1, model, rows)


def completion_both(model, rows: Rows, temperature: jax.Array | float):
    """(logp_BT, entropy_BT, value_BT, load_LE) of a policy with a value head, in one pass."""
    return _pass(_both, 3, model, rows, temperature)


def _pass(fn: Callable, n: int, model, rows: Rows, *rest):
    """`fn(model, inputs, *rest)` -> n arrays [B, T] and the loads, each device on its own rows."""
    inputs = {name: rows[name] for name in INPUTS}
    lies = {name: spec("batch", "length") for name in inputs} | {"completion": spec("batch", None)}
    out = (*(spec("batch", None),) * n, spec())
    return local(fn, (specs(model), lies, *(spec(),) * len(rest)), out)(model, inputs, *rest)


def _hidden(model, inputs: Rows):
    """Final hidden states that predict the completion's tokens [B, T, D], and the loads."""
    out = model(inputs["tokens"], inputs["positions"], inputs["segments"])
    length = inputs["completion"].shape[1]
    hidden_BTD = gather(out.hidden_BTD, "batch", "length", None, along="length")
    return hidden_BTD[:, -length - 1 : -1], out.stats.load  # t is predicted one place before it


def _logp(model, hidden_BTD: jax.Array, inputs: Rows, temperature):
    temperature = jnp.where(temperature > 0, temperature, 1.0)
    return score(hidden_BTD, model.head_DN(), inputs["completion"], temperature=temperature)


def _scores(model, inputs: Rows, temperature):
    hidden_BTD, load_LE = _hidden(model, inputs)
    return *_logp(model, hidden_BTD, inputs, temperature), load_LE


def _values(model, inputs: Rows):
    hidden_BTD, load_LE = _hidden(model, inputs)
    return model.values(hidden_BTD), load_LE


def _both(model, inputs: Rows, temperature):
    hidden_BTD, load_LE = _hidden(model, inputs)
    scores = _logp(model.decoder, hidden_BTD, inputs, temperature)
    return *scores, model.values(hidden_BTD), load_LE
