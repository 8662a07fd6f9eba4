# SPDX-License-Identifier: Apache-2.0
"""Many devices: meshes, dispatch of tokens to experts, placement of experts, costs of programs."""
