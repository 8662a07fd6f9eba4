# SPDX-License-Identifier: Apache-2.0
"""Distillation on a laptop: the Qwen2-shaped student on the quickstart's traces.

Command:   r1jax quickstart && r1jax train --config=configs/distill_laptop.py
Hardware:  2 CPU cores
Expected:  a model that writes the teacher's chains of thought; the quickstart measures it
"""

from r1jax.config import laptop, to_config_dict


def get_config():
    """SFT of the student's base model."""
    return to_config_dict(laptop.distill("runs/quickstart/traces/distill.jsonl"))
