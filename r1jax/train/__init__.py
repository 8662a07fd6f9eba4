# SPDX-License-Identifier: Apache-2.0
"""Programs: the compiled steps, the loops around them, resume, and the R1 recipe."""
