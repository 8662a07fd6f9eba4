# SPDX-License-Identifier: Apache-2.0
"""Batches in a shuffled order that every host agrees on, with a position that can be kept.

The stream of epochs, each shuffled anew, is cut into global batches; a host takes every
`process_count`-th item of each. So the global batches depend on the seed and the global batch size
alone: a run may go on with another number of hosts. Built on grain, which is imported when the
first pipeline is made.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from r1jax.data.packing import Packed

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which host this is: `jax.process_index()` of `jax.process_count()`."""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise ValueError(f"process index {self.index} must lie in 0..{self.count - 1}")


ALONE = Shard()


class Batches(Iterator[Any]):
    """The batches of one host, with `state()` and `restore()`.

    After `restore(state)` the next batch is the one that came after `state()` was taken, exactly.
    """

    def __init__(
        self,
        items: Sequence[Any],
        *,
        batch_size: int,
        seed: int,
        epochs: int | None = None,
        shard: Shard = ALONE,
        collate: Callable[[list[Any]], Any] | None = None,
    ):
        """Opens the stream at its start.

        Args:
          items: anything with a length and indices; read when needed.
          batch_size: items in a global batch, a multiple of the number of hosts.
          seed: of the shuffles; the same seed gives the same batches, everywhere.
          epochs: passes over the items, or None for no end. Items at the very end that fill no
            global batch are left out.
          shard: which host this is.
          collate: makes a batch of a list of items; None: arrays are stacked, leaf by leaf.

        Raises:
          ValueError: no item, or sizes that do not go together.
        """
        if not len(items):
            raise ValueError("a pipeline needs at least one item, got none")
        if batch_size < 1 or batch_size % shard.count:
            raise ValueError(
                f"{batch_size=} must be a positive multiple of the {shard.count} processes"
            )
        if epochs is not None and (epochs < 1 or epochs * len(items) < batch_size):
            raise ValueError(
                f"{epochs=} of {len(items)} items fill no batch of {batch_size=}; "
                "raise epochs or lower batch_size"
            )
        # What another number of hosts may not change.
        self._made_by = {
            "items": len(items),
            "batch_size": batch_size,
            "seed": seed,
            "epochs": epochs,
        }
        self._iterator = iter(_stream(items, self._made_by, shard, collate))

    def __next__(self) -> Any:
        return next(self._iterator)

    def state(self) -> State:
        """The position: a small dict that JSON can hold."""
        return {**self._made_by, "position": int(self._iterator.get_state()["next_index"])}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to a position that `state` told, of the same items, batch size and seed.

        Raises:
          ValueError: it is the position of another pipeline.
        """
        different = [
            f"{name}: saved {state.get(name)}, now {value}"
            for name, value in self._made_by.items()
            if state.get(name, ...) != value
        ]
        position = state.get("position")
        if not different and (type(position) is not int or position < 0):
            different = [f"position: saved {position}, expected a number of batches"]
        if different:
            raise ValueError(
                f"the data position belongs to another pipeline: {'; '.join(different)}"
            )
        self._iterator.set_state({"next_index": position})


def packed_batches(packed: Packed, *, batch_size: int, seed: int, **rules: Any) -> Batches:
    """Batches of a packed corpus, as dicts of arrays [rows of this host, length].

    Args:
      packed: from `pack`.
      batch_size: rows in a global batch.
      seed: of the shuffles.
      **rules: `epochs` and `shard` of `Batches`.

    Returns:
      `Batches` of tokens, targets, positions, segments (int32) and mask (float32).
    """
    return Batches(_PackedRows(packed), batch_size=batch_size, seed=seed, **rules)


class _PackedRows(Sequence):
    """A packed corpus row by row."""

    def __init__(self, packed: Packed):
        self._arrays = {
            "tokens": packed.tokens_NT,
            "targets": packed.targets_NT,
            "positions": packed.positions_NT,
            "segments": packed.segments_NT,
            "mask": packed.mask_NT,
        }

    def __len__(self) -> int:
        return len(self._arrays["tokens"])

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: array[row] for name, array in self._arrays.items()}


def _stream(items: Sequence[Any], made_by: State, shard: Shard, collate) -> Any:
    """The grain data set of one host's batches; its elements are read when asked for."""
    import grain

    stream = grain.MapDataset.source(items).shuffle(seed=made_by["seed"] % 2**32)
    stream = stream.repeat(made_by["epochs"])
    size = made_by["batch_size"]
    # Before the hosts part: all of them see the same number of batches. An endless stream is cut
    # too, since lengths near the largest integer overflow.
    stream = stream[: min(len(stream), 2**62) // size * size][shard.index :: shard.count]
    batches = stream.batch(size // shard.count, batch_fn=collate)
    # What is read lies in memory: threads that read ahead would only cost.
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


def shuffled(n: int, start: int, count: int, *, seed: int) -> list[int]:
    """Places start … start + count − 1 of the endless stream of epochs over `n` items.

    The stream that `Batches` cuts into batches, as a pure function of the position: a trainer that
    knows its step needs no state.
    """
    return [int(i) for i in _order(n, seed)[start : start + count]]


@functools.cache
def _order(n: int, seed: int):
    import grain

    return grain.MapDataset.source(range(n)).shuffle(seed=seed % 2**32).repeat()
