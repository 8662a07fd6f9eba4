# SPDX-License-Identifier: Apache-2.0
"""Objectives: golden values of Tunix's `grpo_loss_fn`, recorded by a script of `tests/golden`."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import rl

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "objectives_tunix.json").read_text()
)
# Both are float32; what the issue of these objectives asks.
CLOSE = 1e-6


def dual(logp_BT, old_logp_BT, ref_logp_BT, advantage_B, mask_BT):
    """GRPO with a dual clip of 1.5, said in its parts."""
    tokens = rl.policy_tokens(logp_BT, old_logp_BT, ref_logp_BT, advantage_B, mask_BT)
    log_ratio_BT = rl.token_log_ratio(tokens.logp_BT, tokens.old_logp_BT, tokens.mask_BT)
    surrogate = rl.clipped_surrogate(log_ratio_BT, tokens.advantage_BT, clip_low=0.2, clip_high=0.2)
    surrogate = rl.dual_clip(surrogate, tokens.advantage_BT, cap=1.5)
    return rl.policy_loss(tokens, surrogate, rl.token_weights_sequence_mean(mask_BT))


CASES = {
    "grpo": functools.partial(rl.grpo_loss, beta=0.04),
    "grpo_k1": functools.partial(rl.grpo_loss, beta=0.1, clip_high=0.28, kl=rl.k1),
    "grpo_k2": functools.partial(rl.grpo_loss, beta=0.1, clip_high=0.28, kl=rl.k2),
    "grpo_dual": dual,
    "dapo": rl.dapo_loss,
    "dr_grpo": rl.dr_grpo_loss,
    "gspo_token": functools.partial(rl.gspo_token_loss, clip_low=0.2, clip_high=0.2),
    "importance": functools.partial(rl.dapo_loss, beta=0.04),
}


def test_every_case_is_compared():
    assert CASES.keys() == GOLDEN["cases"].keys()


@pytest.mark.parametrize("case", CASES)
def test_golden_values_of_tunix(case):
    data = {name: np.asarray(x, np.float32) for name, x in GOLDEN["inputs"].items()}
    advantage = data["advantage"]
    if case == "importance":
        advantage = advantage[:, None] * data["importance"]
    rest = (data["old_logp"], data["ref_logp"], advantage, data["mask"])
    loss = lambda logp_BT: CASES[case](logp_BT, *rest)[0]  # noqa: E731
    value, slope = jax.value_and_grad(loss)(jnp.asarray(data["logp"]))
    expected = GOLDEN["cases"][case]
    np.testing.assert_allclose(value, expected["loss"], rtol=CLOSE, atol=CLOSE)
    np.testing.assert_allclose(slope, expected["gradient"], rtol=CLOSE, atol=CLOSE)
