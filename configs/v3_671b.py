# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V3 and R1, 671B (arXiv 2412.19437, section 4.2): the architecture alone.

Command:   r1jax info --config=configs/v3_671b.py
Hardware:  any; nothing is allocated
Expected:  671.0B parameters, 37.6B active, an MTP module of 11.6B, 70,272 bytes of cache a token
"""

from r1jax.config import ModelConfig, to_config_dict


def get_config():
    """The schema's defaults are the 671B."""
    return to_config_dict(ModelConfig())
