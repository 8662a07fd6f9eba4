# SPDX-License-Identifier: Apache-2.0
"""Between the frozen dataclasses and the `ml_collections.ConfigDict` that a config file returns."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections


def to_config_dict(cfg: Any) -> ml_collections.ConfigDict:
    """A frozen config as the `ConfigDict` that a config file returns; None fields stay settable."""
    out = ml_collections.ConfigDict()
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        nested = dataclasses.is_dataclass(value)
        out[f.name] = to_config_dict(value) if nested else value
    return out


def from_config_dict(cls: type, values: Any, path: str = "") -> Any:
    """The frozen config of type `cls` that a `ConfigDict` or nested dict spells out, validated.

    Raises:
        ValueError: an unknown key (near names are listed), a value of the wrong type, or a value
            that the class refuses.
    """
    if not isinstance(values, Mapping | ml_collections.ConfigDict):
        raise ValueError(f"{path.rstrip('.')} must be a section of fields, got {values!r}")
    kinds = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    found = {}
    for key, value in dict(values).items():
        where = f"{path}{key}"
        if key not in names:
            raise ValueError(f"unknown config key {where}{_near(key, names)}")
        kind = kinds[key]
        if dataclasses.is_dataclass(kind):
            found[key] = from_config_dict(kind, value, f"{where}.")
        else:
            found[key] = _typed(value, kind, where)
    try:
        return cls(**found)
    except ValueError as error:
        # Checks name a field by its class; the reader knows it by its path.
        said, section = str(error).replace(f"{cls.__name__}.", path), path.rstrip(".")
        within = "" if section in said else f" (in {section})"
        raise ValueError(said + within) from error


def _near(key: str, names: set[str]) -> str:
    close = difflib.get_close_matches(key, sorted(names), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else f"; known: {sorted(names)}"


def _typed(value: Any, kind: Any, where: str) -> Any:
    """`value` as a field of type `kind`: int → float and list → tuple are the only conversions."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    origin = typing.get_origin(kind)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a tuple, got {value!r}")
        return tuple(_typed(v, typing.get_args(kind)[0], where) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be {kind.__name__}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{where} must be finite, got {value!r}")
    return value
