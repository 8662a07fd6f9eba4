# SPDX-License-Identifier: Apache-2.0
"""Dropless matmul of ragged groups of rows, each with its own matrix."""

from pallas_kernels.grouped_matmul.api import grouped_matmul, grouped_outer

__all__ = ["grouped_matmul", "grouped_outer"]
