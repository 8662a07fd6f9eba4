# SPDX-License-Identifier: Apache-2.0
"""R1's second SFT at 671B (arXiv 2501.12948, section 2.3.3), from the base model.

Command:   r1jax train --config=configs/r1_sft2_671b.py
Hardware:  a TPU pod or GPU cluster; not run by us at this size
Expected:  the paper's; we have not run it at this size
Needs:     models/DeepSeek-V3-Base, runs/rejection_671b (r1jax rejection-sample)
"""

from r1jax.config import published, to_config_dict


def get_config():
    """SFT of the base model on rejection-sampled and other answers."""
    return to_config_dict(published.r1_sft2())
