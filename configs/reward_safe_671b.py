# SPDX-License-Identifier: Apache-2.0
"""R1's safety reward model (arXiv 2501.12948, section 2.3.4): pointwise, 106k answers.

Command:   r1jax train --config=configs/reward_safe_671b.py
Hardware:  a TPU pod or GPU cluster; not run by us at this size
Expected:  the paper's; we have not run it at this size
Needs:     models/r1-sft-2, data/safe_labels.jsonl (`prompt`, `completion`, `label`)
"""

from r1jax.config import published, to_config_dict


def get_config():
    """One epoch over labelled answers."""
    return to_config_dict(published.reward_safe())
