# SPDX-License-Identifier: Apache-2.0
"""Block-scaled E4M3 matmuls: the three products of a linear layer, and the layer."""

from pallas_kernels.fp8_matmul.api import fp8_dgrad, fp8_fprop, fp8_linear, fp8_wgrad

__all__ = ["fp8_dgrad", "fp8_fprop", "fp8_linear", "fp8_wgrad"]
