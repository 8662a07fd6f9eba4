# SPDX-License-Identifier: Apache-2.0
"""How far counts may be from what is expected."""

import numpy as np

# χ² with d degrees of freedom has mean d and deviation sqrt(2d): 5 deviations of a fixed seed.
DEVIATIONS = 5.0


def chi_square_bound(cells):
    return cells - 1 + DEVIATIONS * np.sqrt(2 * (cells - 1))
