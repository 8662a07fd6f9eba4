# SPDX-License-Identifier: Apache-2.0
"""R1's cold-start SFT at 671B (arXiv 2501.12948, section 2.3.1).

Command:   r1jax train --config=configs/r1_cold_start_671b.py
Hardware:  a TPU pod or GPU cluster; not run by us at this size
Expected:  the paper's; we have not run it at this size
Needs:     models/DeepSeek-V3-Base, data/cold_start.jsonl (conversations)
"""

from r1jax.config import published, to_config_dict


def get_config():
    """SFT of the base model on a few thousand long chains of thought."""
    return to_config_dict(published.r1_cold_start())
