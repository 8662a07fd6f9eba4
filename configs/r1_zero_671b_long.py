# SPDX-License-Identifier: Apache-2.0
"""R1-Zero at 671B from update 8,200 on, with 65,536 tokens (arXiv 2501.12948, section 2.2).

Command:   r1jax train --config=configs/r1_zero_671b_long.py
Hardware:  a TPU pod or GPU cluster; not run by us at this size
Expected:  the paper's; we have not run it at this size
Needs:     runs/r1_zero_671b, data/reasoning.jsonl
"""

from r1jax.config import published, to_config_dict


def get_config():
    """The last 2,200 updates of R1-Zero. The optimizer starts anew, which the paper's did not."""
    return to_config_dict(published.r1_zero_long())
