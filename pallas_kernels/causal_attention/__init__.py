# SPDX-License-Identifier: Apache-2.0
"""Exact causal attention within the documents of packed rows: for training and prefill."""

from pallas_kernels.causal_attention.api import causal_attention
from pallas_kernels.causal_attention.ref import causal_mask

__all__ = ["causal_attention", "causal_mask"]
