# SPDX-License-Identifier: Apache-2.0
"""Decoding: the cache, the sampler and one cached step, for any decoder made of stacks."""
