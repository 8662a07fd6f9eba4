# SPDX-License-Identifier: Apache-2.0
"""R1's first RL stage at 671B (arXiv 2501.12948, section 2.3.2): language reward, clip 10.

Command:   r1jax train --config=configs/r1_stage1_671b.py
Hardware:  a TPU pod or GPU cluster; not run by us at this size
Expected:  the paper's; we have not run it at this size
Needs:     models/r1-cold-start (the model of configs/r1_cold_start_671b.py), data/reasoning.jsonl
Silent:    the weight of the language reward and the number of updates; 1 and R1-Zero's here
"""

from r1jax.config import published, to_config_dict


def get_config():
    """GRPO from the cold start, with the language-consistency reward."""
    return to_config_dict(published.r1_stage1())
