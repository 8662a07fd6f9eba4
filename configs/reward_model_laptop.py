# SPDX-License-Identifier: Apache-2.0
"""A pairwise reward model on a laptop (DeepSeek-R1, 2501.12948, section 2.3.4).

Command:   r1jax quickstart && r1jax rejection-sample runs/quickstart/cold_start \
               --dataset task:arithmetic --out runs/pairs && \
           r1jax train --config=configs/reward_model_laptop.py
Hardware:  2 CPU cores
Expected:  a reward for GRPO: --config.grpo.reward.model=1.0
           --config.grpo.reward.model_path=runs/reward_model_laptop
"""

from r1jax.config import laptop, to_config_dict


def get_config():
    """Bradley-Terry on pairs of a right and a wrong answer."""
    return to_config_dict(laptop.reward_model("runs/pairs/pairs.jsonl"))
