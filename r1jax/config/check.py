# SPDX-License-Identifier: Apache-2.0
"""Checks that the dataclasses share: each raises ValueError with the field's name."""

import difflib
from typing import Any


def positive(owner: Any, *names: str) -> None:
    """Every named field of `owner` is greater than 0."""
    for name in names:
        value = getattr(owner, name)
        if value <= 0:
            raise ValueError(f"{type(owner).__name__}.{name} must be positive, got {value}")


def fraction(owner: Any, *names: str) -> None:
    """Every named field of `owner` lies in 0..1."""
    for name in names:
        value = getattr(owner, name)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{type(owner).__name__}.{name} must lie in [0, 1], got {value}")


def activations(name: str, path: str) -> None:
    """`name` is a dtype that activations may have; `path` is the field that holds it."""
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"{path} must be 'float32' or 'bfloat16', got {name!r}")


def one_of(owner: Any, name: str, known: tuple[str, ...]) -> None:
    """The field holds one of the known names; the near ones are listed otherwise."""
    value = getattr(owner, name)
    if value not in known:
        close = difflib.get_close_matches(value, known, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(
            f"{type(owner).__name__}.{name} must be one of {', '.join(known)}, got {value!r}{hint}"
        )


def divides(whole: int, whole_name: str, part: int, part_name: str) -> None:
    """`whole` is a multiple of `part`."""
    if whole % part:
        raise ValueError(f"{whole_name}={whole} must be divisible by {part_name}={part}")
