# SPDX-License-Identifier: Apache-2.0
"""Output head, log-probability of the target and entropy in one op, forward and backward."""

from pallas_kernels.softmax_xent.api import softmax_xent

__all__ = ["softmax_xent"]
