# SPDX-License-Identifier: Apache-2.0
"""Given answers as arrays: pairs for DPO and reward models, labelled ones for safety."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import PartitionSpec

from r1jax.data.datasets import LabelledIds, PreferenceIds
from r1jax.sharding import spec


class Answers(NamedTuple):
    """Rows of prompt and answer, padded on the right.

    Attributes:
        tokens: [N, n, L] int32; n = 2 answers, chosen first, or 1.
        lengths: [N, n, 2] int32, tokens of the prompt and of the whole.
        labels: [N] float32 of single answers, or None.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray | None

    def rows(self, places: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
        """The batch of some rows, as `train.pairs` wants it, without the axis of micro-batches."""
        place_L = np.arange(self.tokens.shape[2])
        prompt, end = (self.lengths[places, :, i, None] for i in (0, 1))
        real = place_L < end
        batch = {
            "tokens": self.tokens[places],
            "positions": (place_L * real).astype(np.int32),
            "segments": real.astype(np.int32),
            "mask": (real & (place_L >= prompt)).astype(np.float32),
            "weight": weight,
        }
        return batch if self.labels is None else batch | {"label": self.labels[places]}

    def batch(self, step: int, size: int, micro_batches: int, *, seed: int):
        """The batch of a step, [M, B / M, …]: a pure function of its arguments.

        Rows come in epochs, each shuffled anew; a batch may reach from one into the next.
        """
        from r1jax.data.datasets import shuffled

        places = shuffled(len(self.tokens), step * size, size, seed=seed)
        batch = self.rows(places, np.full(size, 1 / size, np.float32))
        return {k: v.reshape(micro_batches, -1, *v.shape[1:]) for k, v in batch.items()}


def answers_layout(batch: Mapping[str, np.ndarray]) -> dict[str, PartitionSpec]:
    """How [M, B, …] arrays of a step lie under the mesh in force; their last axis is L or B."""
    row, rows = spec(None, "batch"), spec(None, "batch", None, "length")
    return {name: rows if x.ndim == 4 else row for name, x in batch.items()}


def of_pairs(items: Sequence[PreferenceIds], *, length: int) -> Answers:
    """Pairs, none of them longer than `length`."""
    return _filled([[(i.prompt, i.chosen), (i.prompt, i.rejected)] for i in items], length, None)


def of_labelled(items: Sequence[LabelledIds], *, length: int) -> Answers:
    """Labelled answers, none of them longer than `length`."""
    labels = np.array([i.label for i in items], np.float32)
    return _filled([[(i.prompt, i.completion)] for i in items], length, labels)


def _filled(items, length: int, labels: np.ndarray | None) -> Answers:
    tokens = np.zeros((len(items), len(items[0]), length), np.int32)
    lengths = np.zeros((len(items), len(items[0]), 2), np.int32)
    for i, answers in enumerate(items):
        for k, (prompt, answer) in enumerate(answers):
            ids = [*prompt, *answer]
            tokens[i, k, : len(ids)] = ids
            lengths[i, k] = len(prompt), len(ids)
    return Answers(tokens, lengths, labels)
