# SPDX-License-Identifier: Apache-2.0
"""DPO on a laptop: right answers of the cold start preferred to its wrong ones (2305.18290).

Command:   r1jax quickstart && r1jax rejection-sample runs/quickstart/cold_start \
               --dataset task:arithmetic --out runs/pairs && \
           r1jax train --config=configs/dpo_laptop.py
Hardware:  2 CPU cores
Expected:  see experiments/log/014_trainers.md
"""

from r1jax.config import laptop, to_config_dict


def get_config():
    """DPO from the quickstart's cold start."""
    return to_config_dict(laptop.dpo("runs/pairs/pairs.jsonl"))
