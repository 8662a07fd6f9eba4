# SPDX-License-Identifier: Apache-2.0
"""The DeepSeek-R1 system in JAX: architecture, training recipe and evaluation.

Imports point down only, and nothing is imported here: take what you need from its package, e.g.
`from r1jax.rl import grpo_loss, group_advantages`.

    r1jax.cli                                       the command
    r1jax.train  r1jax.eval                         programs: stages, steps, reports
    r1jax.rl  r1jax.infer  r1jax.data  r1jax.io  r1jax.optim    what programs are made of
    r1jax.nn                                        modules: parameters and their logical axes
    r1jax.ops                                       pure array functions
    r1jax.config  r1jax.sharding                    the schema; logical axes to mesh axes

The dimension key. An array's name ends in its axes, in order: `x_BTD` is [batch, time, model].

    B  batch, rows                        H  heads, of queries
    P  prompts                            J  heads, of keys and values (grouped-query attention)
    G  samples of one prompt, B = P · G   K  head size without rotation (qk_nope)
       (in a router: groups of experts)   R  head size with rotation (qk_rope)
    T  time: queries, tokens of a row     V  head size of values
    S  time: keys, tokens of a prompt     C  latent of keys and values (kv_lora_rank)
    L  layers                             Q  latent of queries (q_lora_rank)
    D  model width                        E  routed experts
    F  width of a feed-forward network    K  experts of one token, where there are no heads
    N  vocabulary

A digit is an axis of that size (`_B1`), a lower-case letter a part of the axis.
"""

__version__ = "0.1.0"
