# SPDX-License-Identifier: Apache-2.0
"""PPO with a critic of its own on the task of the quickstart (arXiv 1707.06347).

Command:   r1jax quickstart && r1jax train --config=configs/ppo_laptop.py
Hardware:  2 CPU cores
Expected:  see experiments/log/014_trainers.md
"""

from r1jax.config import laptop, to_config_dict


def get_config():
    """PPO from the quickstart's cold start, with as many samples as GRPO."""
    return to_config_dict(laptop.ppo())
