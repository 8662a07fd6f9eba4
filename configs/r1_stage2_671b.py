# SPDX-License-Identifier: Apache-2.0
"""R1's second RL stage at 671B (arXiv 2501.12948, section 2.3.4): T 0.7, preference rewards last.

Command:   r1jax train --config=configs/r1_stage2_671b.py
Hardware:  a TPU pod or GPU cluster; not run by us at this size
Expected:  the paper's; we have not run it at this size
Needs:     models/r1-sft-2, runs/reward_helpful_671b/model, runs/reward_safe_671b/model,
           data/reasoning.jsonl, data/general.jsonl
Silent:    the paper does not say how many of a step's prompts are general; half are here
"""

from r1jax.config import published, to_config_dict


def get_config():
    """1,700 updates; general prompts and their reward models in the last 400."""
    return to_config_dict(published.r1_stage2())
