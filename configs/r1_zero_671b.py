# SPDX-License-Identifier: Apache-2.0
"""R1-Zero at 671B (arXiv 2501.12948, section 2.2): GRPO from the base model alone.

Command:   r1jax train --config=configs/r1_zero_671b.py
Hardware:  a TPU pod or GPU cluster; not run by us at this size
Expected:  AIME 2024 pass@1 from 15.6 to 77.9 % after all 10,400 updates (the paper's figure)
Needs:     models/DeepSeek-V3-Base (r1jax import), data/reasoning.jsonl (`question`, `answer`)
Deviation: the paper's template (table 1) in words of ours, behind the question
"""

from r1jax.config import published, to_config_dict


def get_config():
    """R1-Zero up to update 8,200, completions of at most 32,768 tokens."""
    return to_config_dict(published.r1_zero())
