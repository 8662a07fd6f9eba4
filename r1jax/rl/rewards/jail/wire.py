# SPDX-License-Identifier: Apache-2.0
"""Plain values as bytes: the only thing that passes between a program and its checker.

`decode` builds exact built-in types and nothing else, so that whatever a program returns (an object
equal to everything, a subclass with its own operators) arrives as a plain value or not at all.
"""

import builtins
import collections
import datetime
import decimal
import fractions
import os

DEEPEST = 200
LONGEST = 1 << 26

_MARKS = {list: b"l", tuple: b"t", set: b"S", frozenset: b"Z", collections.deque: b"q"}
_MAKERS = {b"l": list, b"t": tuple, b"S": set, b"Z": frozenset, b"q": collections.deque}
_CONSTANTS = {b"N": None, b"T": True, b"F": False}
# Values that their own text makes again.
_TEXTS = {
    decimal.Decimal: (b"D", str, decimal.Decimal),
    fractions.Fraction: (b"Q", str, fractions.Fraction),
    datetime.datetime: (b"W", datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    datetime.date: (b"Y", datetime.date.isoformat, datetime.date.fromisoformat),
    datetime.time: (b"H", datetime.time.isoformat, datetime.time.fromisoformat),
    complex: (b"c", repr, complex),
    float: (b"f", float.__repr__, float),
    int: (b"i", "{:x}".format, lambda text: int(text, 16)),
    str: (b"s", str.__str__, str),
}
_FROM_TEXT = {mark: parse for mark, _, parse in _TEXTS.values()}


class Ref:
    """A name that the program's side looks up: what the checker cannot hold, and never compares."""

    def __init__(self, name):
        """Args: name: a global of the program, or the number of one of its objects."""
        self.name = name

    def _refuse(self, *_):
        raise TypeError("the program returned no plain value")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __len__ = _refuse
    __hash__ = object.__hash__


def encode(value) -> bytes:
    """The bytes of a plain value.

    Raises:
      TypeError: the value, or one inside it, is no plain value.
      ValueError: nested deeper than DEEPEST.
    """
    out = []
    _encode(value, out, 0)
    return b"".join(out)


def _encode(value, out, depth):
    if depth > DEEPEST:
        raise ValueError(f"nested deeper than {DEEPEST}")
    kind = type(value)
    if value is None:
        out.append(b"N")
    elif kind is bool:
        out.append(b"T" if value else b"F")
    elif isinstance(value, Ref):
        _sized(b"r", value.name.encode(), out)
    elif kind is type and getattr(builtins, value.__name__, None) is value:
        _sized(b"k", value.__name__.encode(), out)
    elif isinstance(value, (bytes, bytearray)):
        _sized(b"b" if isinstance(value, bytes) else b"a", bytes(value), out)
    elif isinstance(value, dict):
        out.append(b"d%d;" % len(value))
        for key, item in value.items():
            _encode(key, out, depth + 1)
            _encode(item, out, depth + 1)
    elif isinstance(value, range):
        out.append(b"R")
        _encode((value.start, value.stop, value.step), out, depth + 1)
    else:
        for base, mark in _MARKS.items():
            if isinstance(value, base):
                out.append(mark + b"%d;" % len(value))
                for item in value:
                    _encode(item, out, depth + 1)
                return
        for base, (mark, text, _) in _TEXTS.items():
            if isinstance(value, base):
                _sized(mark, text(value).encode("utf-8", "surrogatepass"), out)
                return
        raise TypeError(f"{kind.__name__} is no plain value")


def _sized(mark, data, out):
    out += (mark, b"%d;" % len(data), data)


def decode(data: bytes, look_up=None):
    """The value of `encode`'s bytes.

    Args:
      data: the bytes.
      look_up: what a name stands for; None: no names are accepted.

    Raises:
      ValueError: malformed bytes; TypeError: an unhashable member of a set or key.
    """
    value, end = _decode(data, 0, 0, look_up)
    if end != len(data):
        raise ValueError("bytes left over")
    return value


def _decode(data, at, depth, look_up):
    if depth > DEEPEST + 2:
        raise ValueError(f"nested deeper than {DEEPEST}")
    mark, at = data[at : at + 1], at + 1
    if mark in _CONSTANTS:
        return _CONSTANTS[mark], at
    if mark == b"R":
        parts, at = _decode(data, at, depth + 1, look_up)
        return range(*parts), at
    stop = data.index(b";", at, at + 20)
    size, at = int(data[at:stop]), stop + 1
    if not 0 <= size <= len(data) - at:
        raise ValueError("a size beyond the data")
    if mark == b"d":
        made = {}
        for _ in range(size):
            key, at = _decode(data, at, depth + 1, look_up)
            made[key], at = _decode(data, at, depth + 1, look_up)
        return made, at
    if mark in _MAKERS:
        items = []
        for _ in range(size):
            item, at = _decode(data, at, depth + 1, look_up)
            items.append(item)
        return _MAKERS[mark](items), at
    raw, at = data[at : at + size], at + size
    if mark in b"ab" and mark:
        return (bytes if mark == b"b" else bytearray)(raw), at
    text = raw.decode("utf-8", "surrogatepass")
    if mark == b"r" and look_up:
        return look_up(text), at
    if mark == b"k" and type(made := getattr(builtins, text, None)) is type:
        return made, at
    if mark not in _FROM_TEXT:
        raise ValueError(f"unknown mark {mark!r}")
    return _FROM_TEXT[mark](text), at


def read_exactly(fd: int, size: int) -> bytes:
    """`size` bytes of a pipe, none more; raises EOFError where it ends before."""
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError("the pipe ended")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def write_all(fd: int, data: bytes) -> None:
    """Writes all of `data`, however long the pipe takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def send(fd: int, data: bytes) -> None:
    """One frame: eight bytes of length, then the data."""
    write_all(fd, len(data).to_bytes(8, "little") + data)


def receive(fd: int) -> bytes:
    """The next frame; raises EOFError at the end, ValueError on a frame over LONGEST."""
    size = int.from_bytes(read_exactly(fd, 8), "little")
    if size > LONGEST:
        raise ValueError(f"a frame of {size} bytes")
    return read_exactly(fd, size)
