# SPDX-License-Identifier: Apache-2.0
"""Paged latent attention on GPU."""

from pallas_kernels.dispatch import Unsupported


def decode(*_, **__):
    """Raises Unsupported."""
    raise Unsupported("mla_decode has no Mosaic GPU kernel yet; use 'xla'")
