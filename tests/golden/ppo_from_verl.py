# SPDX-License-Identifier: Apache-2.0
"""Writes ppo_verl.json: verl 0.9.1's advantages and critic loss, float64, rows of unequal length.

pip install torch==2.13.0 tensordict omegaconf hydra-core ray orjson codetiming
pip install --no-deps verl==0.9.1
python tests/golden/ppo_from_verl.py
"""

import json
import pathlib
import types

import numpy as np
import torch
from verl.trainer.ppo import core_algos

GROUP, GAMMA, LAM = 4, 0.97, 0.9
CLIPS = {"usual": 0.2, "wide": 1.0}


def draw() -> dict[str, np.ndarray]:
    """Two prompts of GROUP samples of up to 6 tokens; the mask of one row has a hole."""
    rng = np.random.default_rng(0)
    shape = rows, length = 2 * GROUP, 6
    mask = np.arange(length)[None] < rng.integers(1, length + 1, rows)[:, None]
    mask[0] = [1, 1, 0, 0, 1, 1]
    return {
        "mask": mask,
        "outcome": rng.normal(size=rows),
        "value": rng.normal(size=shape),
        "new_value": rng.normal(size=shape),
        "reward": rng.normal(size=shape) * mask,
    }


def verl_value_loss(tensor: dict[str, torch.Tensor], target: torch.Tensor, clip: float) -> dict:
    """The clipped loss of the critic, its gradient, and the fraction of clipped tokens."""
    value = tensor["new_value"].clone().requires_grad_()
    loss, clipped = core_algos.compute_value_loss(
        value, target, tensor["value"], tensor["mask"], clip
    )
    (gradient,) = torch.autograd.grad(loss, value)
    return {"loss": loss.item(), "gradient": gradient.tolist(), "clipped": clipped.item()}


def main() -> None:
    """Writes every case of one draw."""
    data = draw()
    tensor = {name: torch.tensor(x, dtype=torch.float64) for name, x in data.items()}
    mask, index = tensor["mask"], np.repeat([0, 1], GROUP)
    config = types.SimpleNamespace(gamma=GAMMA)

    def outcome() -> torch.Tensor:
        """The outcome's reward at the first token: these functions sum over the row in place."""
        reward = torch.zeros_like(mask)
        reward[:, 0] = tensor["outcome"]
        return reward

    advantage, target = core_algos.compute_gae_advantage_return(
        tensor["reward"], tensor["value"], mask, GAMMA, LAM
    )
    rloo, _ = core_algos.compute_rloo_outcome_advantage(outcome(), mask, index)
    plus, returns = core_algos.compute_reinforce_plus_plus_outcome_advantage(
        tensor["reward"], mask, config
    )
    baseline, _ = core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(
        outcome(), mask, index
    )
    record = {
        "inputs": {name: x.tolist() for name, x in data.items()},
        "gae": {"advantage": (advantage * mask).tolist(), "target": (target * mask).tolist()},
        "leave_one_out": rloo.tolist(),
        "returns": returns.tolist(),
        "reinforce_pp": plus.tolist(),
        "reinforce_pp_baseline": baseline.tolist(),
        "value": {case: verl_value_loss(tensor, target, clip) for case, clip in CLIPS.items()},
    }
    path = pathlib.Path(__file__).with_name("ppo_verl.json")
    path.write_text(json.dumps(record, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
