# SPDX-License-Identifier: Apache-2.0
"""Block-scaled E4M3 matmuls of ragged groups, and the experts' FP8 linear layer."""

from pallas_kernels.fp8_grouped_matmul.api import (
    fp8_grouped_dgrad,
    fp8_grouped_fprop,
    fp8_grouped_linear,
    fp8_grouped_wgrad,
)

__all__ = ["fp8_grouped_dgrad", "fp8_grouped_fprop", "fp8_grouped_linear", "fp8_grouped_wgrad"]
