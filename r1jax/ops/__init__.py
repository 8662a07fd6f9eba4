# SPDX-License-Identifier: Apache-2.0
"""Pure array functions: no Flax, no config object, no mesh names. Import from the modules."""
