# SPDX-License-Identifier: Apache-2.0
"""The command `r1jax`: flags become a config, a config becomes one call of a program."""

from r1jax.cli.command import console, main

__all__ = ["console", "main"]
