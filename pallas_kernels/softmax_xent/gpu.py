# SPDX-License-Identifier: Apache-2.0
"""The loss head on GPU: refused, because the plain form runs at the speed of its products there."""

from pallas_kernels.dispatch import Unsupported

REASON = (
    "softmax_xent has no Mosaic GPU kernel: at D = 1536 to 7168 a tile's softmax is under a tenth "
    "of its product's time, which cuBLAS runs; use 'xla', which keeps no [T, N] array either"
)


def forward(*_, **__):
    """Raises Unsupported."""
    raise Unsupported(REASON)


backward = forward
