# SPDX-License-Identifier: Apache-2.0
"""What a run leaves on disk and finds again: checkpoints, metrics, the output folder."""
