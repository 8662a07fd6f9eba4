# SPDX-License-Identifier: Apache-2.0
"""Pallas kernels of DeepSeek's FP8 recipe and sparse experts: usable alone, without r1jax.

Each op is a folder: `api` checks the arguments, chooses the implementation and defines the custom
VJP; `ref` is plain jnp, differentiable, and what CPUs run; `tpu` (Mosaic) and `gpu` (Mosaic GPU)
are the kernels. `python -m pallas_kernels.bench` measures them.
"""

from pallas_kernels.dispatch import Backend, Implementation, Unsupported

__all__ = ["Backend", "Implementation", "Unsupported"]
