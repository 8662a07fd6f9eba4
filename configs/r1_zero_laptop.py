# SPDX-License-Identifier: Apache-2.0
"""R1-Zero on a laptop: GRPO with accuracy and format rewards alone (arXiv 2501.12948, section 2.2).

Command:   r1jax quickstart && r1jax train --config=configs/r1_zero_laptop.py
Hardware:  2 CPU cores; about a minute
Expected:  held-out pass@1 from about 40 % to 90 %
Deviation: the paper starts from a base model whose prompt explains the tags. A base model of the
           quickstart has never seen an instruction, so its cold start stands for that prompt.
"""

from r1jax.config import laptop, to_config_dict


def get_config():
    """GRPO from the quickstart's cold start."""
    return to_config_dict(laptop.grpo())
