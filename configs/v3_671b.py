# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V3 and R1, 671B (arXiv 2412.19437, section 4.2), and how it is planned for a pod.

Command:   r1jax info --config=configs/v3_671b.py
           r1jax plan --config=configs/v3_671b.py --topology=v5p-1024
           r1jax plan --config=configs/v3_671b.py --topology=v5p-1024 --what=grpo
Hardware:  any; nothing is allocated. plan needs libtpu and takes minutes
Expected:  671.0B parameters, 37.6B active, an MTP module of 11.6B, 70,272 bytes of cache a token

A training step is 4 rows of 4,096 tokens a device, packed, with node-limited groups, the bias
update and MTP, Adam's moments in bfloat16 (section 3.3.2); a GRPO step is R1-Zero's: 32 prompts of
16 samples each, up to 32,768 tokens.
"""

from r1jax.config import GRPOConfig, OptimConfig, PlanConfig, to_config_dict


def get_config():
    """The schema's default model is the 671B."""
    rl = OptimConfig(learning_rate=3e-6, weight_decay=0.0, moment_dtype="bfloat16")
    return to_config_dict(
        PlanConfig(optim=OptimConfig(moment_dtype="bfloat16"), grpo=GRPOConfig(optim=rl))
    )
