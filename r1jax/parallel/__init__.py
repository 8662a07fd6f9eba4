# SPDX-License-Identifier: Apache-2.0
"""Many devices: meshes, the dispatch of tokens to experts, placement of experts."""
