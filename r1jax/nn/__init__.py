# SPDX-License-Identifier: Apache-2.0
"""Flax NNX modules: parameters with logical axes; each calls the pure functions of `r1jax.ops`."""
