# SPDX-License-Identifier: Apache-2.0
"""R1's first RL stage on a laptop: clip 10 and the language reward (arXiv 2501.12948, 2.3.2).

Command:   r1jax quickstart && r1jax train --config=configs/r1_stage1_laptop.py
Hardware:  2 CPU cores
Expected:  held-out pass@1 from about 40 % to 90 %
"""

from r1jax.config import RewardConfig, UpdateConfig, laptop, to_config_dict


def get_config():
    """GRPO from the quickstart's cold start with stage 1's settings."""
    return to_config_dict(
        laptop.grpo(
            update=UpdateConfig(clip_low=10.0, clip_high=10.0, beta=0.01),
            reward=RewardConfig(format=0.2, language=0.1),
        )
    )
