# SPDX-License-Identifier: Apache-2.0
"""A 16B model of DeepSeek-V2-Lite's shape with V3's router (arXiv 2405.04434, appendix B).

V2-Lite projects full queries (`q_lora_rank=None`) and has no groups; its router is a softmax, ours
V3's sigmoid with balance biases, so its weights cannot be imported.

Command:   r1jax info --config=configs/v2_lite.py
Hardware:  any; nothing is allocated
Expected:  15.7B parameters, 2.7B active
"""

from r1jax.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig, to_config_dict


def get_config():
    """27 layers, 64 experts of which 6 a token, two shared."""
    return to_config_dict(
        ModelConfig(
            vocab_size=102_400,
            num_layers=27,
            first_k_dense=1,
            hidden_size=2048,
            intermediate_size=10_944,
            mtp_depth=0,
            rope=RopeConfig(factor=40.0, mscale=0.707, mscale_all_dim=0.707),
            mla=MLAConfig(
                num_heads=16,
                q_lora_rank=None,
                kv_lora_rank=512,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
            ),
            moe=MoEConfig(
                n_routed_experts=64,
                n_shared_experts=2,
                num_experts_per_tok=6,
                n_group=1,
                topk_group=1,
                routed_scaling_factor=1.0,
                moe_intermediate_size=1408,
            ),
        )
    )
