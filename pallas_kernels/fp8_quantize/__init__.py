# SPDX-License-Identifier: Apache-2.0
"""Online E4M3 quantisation in tiles 1 × b and blocks b × b."""

from pallas_kernels.fp8_quantize.api import (
    quantize_blocks,
    quantize_both,
    quantize_tiles,
    quantize_transposed,
)

__all__ = ["quantize_blocks", "quantize_both", "quantize_tiles", "quantize_transposed"]
