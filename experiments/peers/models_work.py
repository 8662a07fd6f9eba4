# SPDX-License-Identifier: Apache-2.0
"""The work that every system in `bench_models.py` is timed on, in float32.

A DeepSeek-V3 of 11.7M parameters learns 8 rows of 256 tokens and decodes 8 rows after contexts of
128 and 2,048 tokens; SmolLM2-135M (a Llama) reads 512 tokens and decodes after 128, 1 and 8 rows at
a time. This module imports nothing beyond the standard library.
"""

import argparse
import json
import random
import statistics

TINY = dict(
    model_type="deepseek_v3", vocab_size=2048, hidden_size=256, intermediate_size=512,
    moe_intermediate_size=128, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8,
    n_shared_experts=1, n_routed_experts=16, routed_scaling_factor=2.5, kv_lora_rank=64,
    q_lora_rank=96, qk_rope_head_dim=32, v_head_dim=64, qk_nope_head_dim=64, n_group=4,
    topk_group=2, num_experts_per_tok=4, first_k_dense_replace=1, max_position_embeddings=4096,
    rope_theta=10_000.0, rope_scaling=None,
)  # fmt: skip
ROWS, LENGTH, STEPS = 8, 256, 8  # of training
LEARNING_RATE = 1e-4
CONTEXTS = (128, 2048)  # of the tiny model's decoding
NEW = 32  # tokens decoded a row
READ, AFTER = 512, 128  # tokens SmolLM2 prefills, and decodes after
BATCHES = (1, 8)  # of SmolLM2
REPEATS = 5  # of a prefill


def arguments() -> argparse.Namespace:
    """The flags of every system's script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--smollm2", help="SmolLM2-135M as a .gguf file; left out without it")
    parser.add_argument("--only", default="", help="a part of the names of what is timed")
    return parser.parse_args()


def rows(batch: int, length: int, vocab: int) -> list[list[int]]:
    """The same random token ids for every system."""
    draw = random.Random(0)
    return [[draw.randrange(3, vocab) for _ in range(length)] for _ in range(batch)]


def steady(seconds: list[float]) -> float:
    """The median of the second half: what comes after warming up."""
    return statistics.median(seconds[len(seconds) // 2 :])


def report(system: str, seconds: dict[str, float]) -> None:
    """Prints the result as one line of JSON, the last line of standard output."""
    print(json.dumps({"system": system, "seconds": seconds}), flush=True)
