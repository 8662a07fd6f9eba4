# SPDX-License-Identifier: Apache-2.0
"""Absorbed latent attention of a few query tokens over a paged cache: for decoding."""

from pallas_kernels.mla_decode.api import mla_decode
from pallas_kernels.mla_decode.ref import PagedLatents, merge

__all__ = ["PagedLatents", "merge", "mla_decode"]
