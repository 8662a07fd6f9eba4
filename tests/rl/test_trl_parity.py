# SPDX-License-Identifier: Apache-2.0
"""Objectives beside a live TRL, on other draws than the golden ones. Needs the extra `parity`:

pytest tests/rl/test_trl_parity.py -m ""
"""

import jax
import numpy as np
import pytest

from r1jax.rl import pairwise_reward_loss
from tests.rl import test_objectives as objectives
from tests.rl import test_preference as preference

pytest.importorskip("torch", reason="pip install 'r1jax[parity]': torch is missing")
pytest.importorskip("trl", reason="pip install 'r1jax[parity]': trl is missing")

pytestmark = pytest.mark.slow
# What the issue of these objectives asks; what is found is 1e-12.
CLOSE = 1e-6


def tensors(data):
    import torch

    return {name: torch.tensor(x, dtype=torch.float64) for name, x in data.items()}


@pytest.mark.parametrize("seed", [11, 12, 13])
@pytest.mark.parametrize("case", objectives.CASES)
def test_the_grpo_family(case, seed):
    from tests.golden import objectives_from_trl as theirs

    data = theirs.draw(seed, 0.2 * (seed - 10))
    expected = theirs.trl_loss(data, case)
    inputs = {name: np.asarray(x, np.float64) for name, x in data.items()}
    with jax.enable_x64(True):
        loss, gradient_BT = objectives.loss_and_gradient(case, inputs, np.float64)
    np.testing.assert_allclose(loss, expected["loss"], rtol=CLOSE, atol=CLOSE)
    np.testing.assert_allclose(gradient_BT, expected["gradient"], rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("seed", [11, 12, 13])
@pytest.mark.parametrize("case", preference.CASES)
def test_preferences(case, seed):
    from tests.golden import preferences_from_trl as theirs

    data = theirs.draw(seed)
    expected = theirs.dpo_record(tensors(data), case)
    loss, per_answer = preference.CASES[case]

    def ours(logp_BT, ref_logp_BT, mask_BT):
        split = (jax.numpy.split(per_answer(x, mask_BT), 2) for x in (logp_BT, ref_logp_BT))
        return loss(*(half for pair in split for half in pair))[0]

    with jax.enable_x64(True):
        arguments = (np.asarray(data[k], np.float64) for k in ("logp", "ref_logp", "mask"))
        value, slope = jax.jit(jax.value_and_grad(ours))(*arguments)
    np.testing.assert_allclose(value, expected["loss"], rtol=CLOSE, atol=CLOSE)
    np.testing.assert_allclose(slope, expected["gradient"], rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("with_margin", [False, True])
def test_reward_models(with_margin):
    from tests.golden import preferences_from_trl as theirs

    data = theirs.draw(11)
    expected = theirs.reward_record(tensors(data), with_margin)

    def ours(score):
        chosen, rejected = jax.numpy.split(score, 2)
        margin = data["margin"] if with_margin else None
        return pairwise_reward_loss(chosen, rejected, margin_B=margin)[0]

    with jax.enable_x64(True):
        value, slope = jax.value_and_grad(ours)(np.asarray(data["score"], np.float64))
    np.testing.assert_allclose(value, expected["loss"], rtol=CLOSE)
    np.testing.assert_allclose(slope, expected["gradient"], rtol=CLOSE, atol=CLOSE)
