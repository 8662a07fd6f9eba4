# SPDX-License-Identifier: Apache-2.0
"""Distillation of R1 into Qwen2.5-32B (arXiv 2501.12948, section 2.4).

Command:   r1jax train --config=configs/distill_qwen_32b.py
Hardware:  a TPU pod or GPU cluster; not run by us at this size
Expected:  AIME 2024 pass@1 72.6 % (the paper's figure)
Needs:     models/Qwen2.5-32B (r1jax import), runs/rejection_671b (rejection-sample)
"""

from r1jax.config import published, to_config_dict


def get_config():
    """SFT on R1's 800k samples: two epochs, cosine to a tenth, batch 64."""
    return to_config_dict(published.distill("qwen2.5_32b", "models/Qwen2.5-32B"))
