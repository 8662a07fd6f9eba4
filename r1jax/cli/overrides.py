# SPDX-License-Identifier: Apache-2.0
"""A config file and `--config.path.to.field=value`: loaded and typed, or refused."""

import ast
import difflib
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_collections

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def load(path: str | Path) -> ml_collections.ConfigDict:
    """Runs a config file and returns what its `get_config()` returns.

    Raises:
      ValueError: no such file, it fails, or it has no `get_config()` that returns a ConfigDict.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--config={path}: no such file{_near_files(path)}")
    spec = importlib.util.spec_from_file_location(f"r1jax_config_{path.stem}", path)
    if spec is None:
        raise ValueError(f"--config={path}: not a Python file (expected a name ending in .py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # the file is the user's: whatever it raises is his to read
        raise ValueError(f"--config={path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(
            f"--config={path}: get_config() returned {type(config).__name__}, expected an "
            "ml_collections.ConfigDict (r1jax.config.to_config_dict makes one)"
        )
    return config


def apply(config: ml_collections.ConfigDict, overrides: Iterable[tuple[str, str]]) -> None:
    """Sets fields of `config` in place.

    Args:
      config: nested config; its present values decide how text is read.
      overrides: (`path.to.field`, text) in order; the last one wins. `None` clears an optional
        field;
        a tuple is written `a,b,c`, or `()` for none.

    Raises:
      ValueError: an unknown field (near names are listed), a group of fields, or text of another
        type.
    """
    for path, text in overrides:
        fields = dict(fields_of(config))
        if path not in fields:
            raise ValueError(_unknown(path, list(fields)))
        *parents, name = path.split(".")
        owner = config
        for parent in parents:
            owner = owner[parent]
        with config.ignore_type():  # None to a number and back; the schema checks what it allows
            owner[name] = read_value(text, like=fields[path], path=path)


def fields_of(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(`path.to.field`, value) of every leaf, in order."""
    for name, value in config.items():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(value, ml_collections.ConfigDict):
            yield from fields_of(value, path)
        else:
            yield path, value


def shown(config: ml_collections.ConfigDict) -> list[tuple[str, str]]:
    """(`path.to.field`, value as it would be typed) of every leaf, in order of the names."""
    return [(path, _shown(value)) for path, value in fields_of(config)]


def read_value(text: str, *, like: Any, path: str) -> Any:
    """Reads `text` as a value of the type of `like`; a field that is None takes any plain value.

    Raises:
      ValueError: it is not one (field, text and expected type are named).
    """
    if text.lower() == "none":
        return None
    try:
        if isinstance(like, bool):
            return _boolean(text)
        if isinstance(like, int):
            return int(text)
        if isinstance(like, float):
            return float(text)
        if isinstance(like, tuple | list):
            return tuple(
                read_value(part, like=like[0] if like else None, path=path) for part in _parts(text)
            )
        return _literal(text) if like is None else text
    except ValueError as error:
        kind = type(like).__name__
        if isinstance(like, tuple | list) and like:
            kind += f" of {type(like[0]).__name__}"
        raise ValueError(
            f"config field {path}={text!r} is not of type {kind}, as in {path}={_shown(like)}"
        ) from error


def _boolean(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError(text)
    return text.lower() in _TRUE


def _parts(text: str) -> list[str]:
    inner = text.strip()
    if inner[:1] + inner[-1:] in ("()", "[]"):
        inner = inner[1:-1]
    return [part.strip().strip("'\"") for part in inner.split(",") if part.strip()]


def _literal(text: str) -> Any:
    """A number, truth value, tuple or quoted text as Python writes it; else plain text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _unknown(path: str, fields: list[str]) -> str:
    inside = [field for field in fields if field.startswith(f"{path}.")]
    if inside:
        return f"config field {path} is a group; set one of its fields: {', '.join(inside)}"
    near = difflib.get_close_matches(path, fields, n=3, cutoff=0.6)
    last = path.split(".")[-1]
    names = {field: field.split(".")[-1] for field in fields}
    similar = difflib.get_close_matches(last, set(names.values()), n=2, cutoff=0.7)
    near += [field for word in similar for field, name in names.items() if name == word]
    if near:
        return f"no config field {path}; near: {', '.join(list(dict.fromkeys(near))[:6])}"
    top = dict.fromkeys(field.split(".")[0] for field in fields)
    return f"no config field {path}, nor one like it; the first level is: {', '.join(top)}"


def _near_files(path: Path) -> str:
    folder = path.parent
    names = [p.name for p in folder.glob("*.py")] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
    return f"; near: {', '.join(str(folder / name) for name in near)}" if near else ""
