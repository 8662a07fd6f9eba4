# SPDX-License-Identifier: Apache-2.0
"""Measuring a model on held-out problems, and what is written about it: summary and report."""
