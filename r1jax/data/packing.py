# SPDX-License-Identifier: Apache-2.0
"""Packing: several documents in one row of fixed length, kept apart by segment numbers."""

import dataclasses
from collections.abc import Sequence

import numpy as np

Example = tuple[Sequence[int], Sequence[float]]
"""(ids [T], loss weight of each id as a target [T]); the weight of the first id has no use."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """Packed rows, all arrays [N, length].

    Attributes:
      tokens_NT: int32 input ids, `pad_id` where empty.
      targets_NT: int32, the next id of the same document, `pad_id` at its last.
      positions_NT: int32, 0 at the first id of every document.
      segments_NT: int32, 1, 2, … for the documents of a row and 0 where empty.
      mask_NT: float32, loss weight of the target; 0 at the last id of a document.
    """

    tokens_NT: np.ndarray
    targets_NT: np.ndarray
    positions_NT: np.ndarray
    segments_NT: np.ndarray
    mask_NT: np.ndarray

    @property
    def rows(self) -> int:
        """N."""
        return self.tokens_NT.shape[0]


def example(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> Example:
    """A prompt with its completion, of which only the completion is learnt."""
    mask = [0.0] * len(prompt_ids) + [1.0] * len(completion_ids)
    return [*prompt_ids, *completion_ids], mask


def pack(examples: Sequence[Example], *, length: int, pad_id: int) -> Packed:
    """Packs examples into as few rows as best-fit-decreasing finds.

    Args:
      examples: the documents.
      length: ids in a row.
      pad_id: id of the empty places.

    Returns:
      The rows; the same input gives the same rows.

    Raises:
      ValueError: no example, an empty one, one longer than `length`, or ids and mask that differ
        in length.
    """
    _check(examples, length)
    rows = _assign([len(ids) for ids, _ in examples], length)
    shape = (len(rows), length)
    packed = Packed(
        tokens_NT=np.full(shape, pad_id, np.int32),
        targets_NT=np.full(shape, pad_id, np.int32),
        positions_NT=np.zeros(shape, np.int32),
        segments_NT=np.zeros(shape, np.int32),
        mask_NT=np.zeros(shape, np.float32),
    )
    count_up = np.arange(length, dtype=np.int32)
    for row, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members, start=1):
            ids, mask = examples[index]
            end = start + len(ids)
            packed.tokens_NT[row, start:end] = ids
            packed.targets_NT[row, start : end - 1] = ids[1:]
            packed.positions_NT[row, start:end] = count_up[: len(ids)]
            packed.segments_NT[row, start:end] = segment
            packed.mask_NT[row, start : end - 1] = mask[1:]
            start = end
    return packed


def _check(examples: Sequence[Example], length: int) -> None:
    if not examples:
        raise ValueError("pack needs at least one example, got none")
    for index, (ids, mask) in enumerate(examples):
        if len(ids) != len(mask):
            raise ValueError(f"example {index} has {len(ids)} ids but {len(mask)} mask values")
        if not 1 <= len(ids) <= length:
            raise ValueError(
                f"example {index} has {len(ids)} tokens, expected 1..{length=}; "
                f"set length to at least {max(len(ids), 1)} or make the examples shorter"
            )


def _assign(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Best-fit-decreasing: for each row, the indices of the examples it holds."""
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]
    # Bit r is set while some row has room r, so the tightest fit is one lowest-set-bit away.
    rooms = 0
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[index]
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(index)
        by_room[room - size].append(row)
        rooms |= 1 << (room - size)
    return rows
