# SPDX-License-Identifier: Apache-2.0
"""Passes over rows of prompt and answer: what updates that learn from answers are made of.

Rows are dicts of int32: tokens, positions and segments [B, L]; those of a rollout, L = S + T, also
completion [B, T]. On a mesh a pass is one region of local code (`r1jax.sharding.local`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from r1jax.nn.head import score
from r1jax.nn.param import specs
from r1jax.sharding import gather, local, spec

Rows = dict[str, jax.Array]
WHOLE = ("tokens", "positions", "segments")
COMPLETED = (*WHOLE, "completion")


def completion_logp(model, rows: Rows, temperature: jax.Array | float):
    """Log-probabilities and entropies of completion tokens, and the expert loads of the pass.

    Args:
        temperature: the sampler's; 0 (greedy) is scored at 1.

    Returns:
        (logp_BT, entropy_BT, load_LE), float32, in nats and tokens.
    """
    return _pass(_scores, COMPLETED, 2, model, rows, temperature)


def completion_values(model, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """V of the state that each completion token was produced in [B, T], and the expert loads.

    Args:
        model: an `nn.value.Valued`.
    """
    return _pass(_values, COMPLETED, 1, model, rows)


def completion_both(model, rows: Rows, temperature: jax.Array | float):
    """(logp_BT, entropy_BT, value_BT, load_LE) of a policy with a value head, in one pass."""
    return _pass(_both, COMPLETED, 3, model, rows, temperature)


def row_logp(model, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the tokens of whole rows but the first [B, L - 1], and the loads."""
    ahead = jnp.pad(rows["tokens"][:, 1:], ((0, 0), (0, 1)))
    logp_BL, load_LE = _pass(_row_scores, (*WHOLE, "ahead"), 1, model, rows | {"ahead": ahead})
    return logp_BL[:, :-1], load_LE


def row_value(model, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """V at the last real token of each row [B], and the loads.

    Args:
        model: an `nn.value.Valued`.
    """
    value_B1, load_LE = _pass(_last_values, WHOLE, 1, model, rows)
    return value_B1[:, 0], load_LE


def last_token(segments_BL: jax.Array) -> jax.Array:
    """[B] int32 place of the last real token of each row, 0 where there is none."""
    place_L = jnp.arange(segments_BL.shape[1])
    return jnp.max(jnp.where(segments_BL > 0, place_L, 0), axis=1)


def _pass(fn: Callable, names: tuple[str, ...], n: int, model, rows: Rows, *rest):
    """`fn(model, inputs, *rest)` -> n arrays [B, …] and the loads, each device on its own rows."""
    inputs = {name: rows[name] for name in names}
    cut = lambda name: None if name == "completion" else "length"  # noqa: E731
    lies = {name: spec("batch", cut(name)) for name in names}
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
    return score(hidden_BTD, model.output_head(), inputs["completion"], temperature=temperature)


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


def _row_scores(model, inputs: Rows):
    out = model(*(inputs[name] for name in WHOLE))
    logp_BL, _ = score(out.hidden_BTD, model.output_head(), inputs["ahead"])
    return gather(logp_BL, "batch", "length", along="length"), out.stats.load


def _last_values(model, inputs: Rows):
    out = model(*(inputs[name] for name in WHOLE))
    hidden_BLD = gather(out.hidden_BTD, "batch", "length", None, along="length")
    segments_BL = gather(inputs["segments"], "batch", "length", along="length")
    last_B11 = last_token(segments_BL)[:, None, None]
    return model.values(jnp.take_along_axis(hidden_BLD, last_B11, axis=1)), out.stats.load
