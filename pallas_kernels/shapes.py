# SPDX-License-Identifier: Apache-2.0
"""Real shapes by name, for tests, bench and tuner alike: DeepSeek-V3 671B, Qwen2.5-1.5B, tiny."""

from typing import NamedTuple


class Matmul(NamedTuple):
    """y[M, N] = x[M, K] w[K, N]."""

    m: int
    k: int
    n: int


class Grouped(NamedTuple):
    """M rows sorted by expert, each expert's rows times its own w[K, N]."""

    m: int
    k: int
    n: int
    experts: int


class Attention(NamedTuple):
    """Causal attention of `batch` rows of `length` tokens; `shared` heads have the same keys."""

    batch: int
    heads: int
    shared: int
    length: int
    key: int
    value: int


class Decode(NamedTuple):
    """Absorbed attention of `queries` tokens a row over a latent cache of `length` tokens a row."""

    batch: int
    queries: int
    heads: int
    length: int
    latent: int  # kv_lora_rank
    rope: int  # qk_rope_head_dim


class Head(NamedTuple):
    """Logits of M tokens over a vocabulary."""

    m: int
    k: int
    vocabulary: int


TOKENS = 4096  # of one micro-batch on one device

MATMUL = {
    "v3-dense-up": Matmul(TOKENS, 7168, 18432),
    "v3-dense-down": Matmul(TOKENS, 18432, 7168),
    "v3-q-up": Matmul(TOKENS, 1536, 24576),
    "v3-kv-down": Matmul(TOKENS, 7168, 576),
    "qwen-1.5b-up": Matmul(TOKENS, 1536, 8960),
    "square-8192": Matmul(8192, 8192, 8192),
    "tiny": Matmul(64, 256, 128),
}
GROUPED = {
    "v3-up": Grouped(8 * TOKENS, 7168, 2048, 256),
    "v3-up-of-32": Grouped(8 * TOKENS, 7168, 2048, 32),  # one of eight devices' experts
    "v3-down": Grouped(8 * TOKENS, 2048, 7168, 256),
    "v3-decode-up": Grouped(8 * 16, 7168, 2048, 256),
    "tiny": Grouped(96, 256, 128, 8),
}
ATTENTION = {
    "v3-4k": Attention(1, 128, 1, 4096, 192, 128),
    "v3-32k": Attention(1, 16, 1, 32_768, 192, 128),  # one of eight devices' heads
    "qwen-1.5b-4k": Attention(4, 12, 6, 4096, 128, 128),
    "tiny": Attention(2, 2, 1, 256, 192, 128),
}
MLA_DECODE = {
    "v3-4k": Decode(128, 1, 128, 4096, 512, 64),
    "v3-4k-verify": Decode(128, 4, 128, 4096, 512, 64),
    "tiny": Decode(2, 1, 4, 64, 16, 8),
}
HEAD = {
    "v3": Head(TOKENS, 7168, 129_280),
    "qwen-1.5b": Head(TOKENS, 1536, 151_936),
    "tiny": Head(32, 64, 512),
}
