# SPDX-License-Identifier: Apache-2.0
"""R1's second RL stage on a laptop: temperature 0.7 (arXiv 2501.12948, section 2.3.4).

Command:   r1jax quickstart && r1jax train --config=configs/r1_stage2_laptop.py
Hardware:  2 CPU cores
Expected:  held-out pass@1 stays at about 90 %
"""

from r1jax.config import laptop, to_config_dict


def get_config():
    """GRPO from the quickstart's second SFT."""
    return to_config_dict(laptop.grpo("sft_2", temperature=0.7))
