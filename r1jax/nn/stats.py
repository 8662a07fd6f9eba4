# SPDX-License-Identifier: Apache-2.0
"""What a router reports beside its output."""

from typing import NamedTuple

import jax


class RouterStats(NamedTuple):
    """Loads and balance loss of one router, or of a stack of them with a leading layer axis.

    Attributes:
        load: [..., E] float32 count of valid tokens sent to each expert; E = 0 in a dense layer.
        balance: [..., B] float32 sequence-wise balance loss of each row, without its α.
        overflow: [...] float32, how often a buffer of the sparse dispatch would have overflown, so
            that tokens were sent in several rounds.
    """

    load: jax.Array
    balance: jax.Array
    overflow: jax.Array
