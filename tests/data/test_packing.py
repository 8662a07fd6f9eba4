# SPDX-License-Identifier: Apache-2.0
"""Packing: every document once and whole, nothing across documents, rows well filled."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.data import example, pack

PAD = 0
LENGTH = 16
DOCUMENTS = st.lists(
    st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=LENGTH
    ),
    min_size=1,
    max_size=30,
)


def unzip(documents):
    return [([t for t, _ in doc], [w for _, w in doc]) for doc in documents]


def unpack(packed):
    """The documents of all rows as (tokens, targets, positions, mask) lists."""
    for row in range(packed.rows):
        segments = packed.segments_NT[row]
        for segment in range(1, segments.max() + 1):
            at = segments == segment
            arrays = (packed.tokens_NT, packed.targets_NT, packed.positions_NT, packed.mask_NT)
            yield tuple(array[row][at].tolist() for array in arrays)


@given(DOCUMENTS)
def test_every_document_comes_back_once(documents):
    examples = unzip(documents)
    packed = pack(examples, length=LENGTH, pad_id=PAD)
    found = sorted(
        (tokens, targets, positions, mask) for tokens, targets, positions, mask in unpack(packed)
    )
    expected = sorted(
        (ids, [*ids[1:], PAD], list(range(len(ids))), [*mask[1:], 0.0]) for ids, mask in examples
    )
    assert found == expected


@given(DOCUMENTS)
def test_rows(documents):
    examples = unzip(documents)
    packed = pack(examples, length=LENGTH, pad_id=PAD)
    total = sum(len(ids) for ids, _ in examples)
    # Best-fit-decreasing needs at most 11/9 of the best number of rows, and one more.
    assert packed.rows <= 11 / 9 * min(len(examples), max(1, 2 * -(-total // LENGTH))) + 1
    for array in vars(packed).values():
        assert array.shape == (packed.rows, LENGTH)
    empty = packed.segments_NT == 0
    assert (packed.tokens_NT[empty] == PAD).all()
    assert (packed.targets_NT[empty] == PAD).all()
    assert not packed.mask_NT[empty].any()
    assert not packed.positions_NT[empty].any()
    # Segments count up from 1 without a gap, and padding comes last.
    for segments in packed.segments_NT:
        used = segments[segments > 0]
        assert (segments[: len(used)] == used).all()
        assert set(np.diff(used, prepend=0)) <= {0, 1}
    again = pack(examples, length=LENGTH, pad_id=PAD)
    assert all((vars(again)[k] == v).all() for k, v in vars(packed).items())


def test_by_hand():
    packed = pack([([5, 6, 7], [0, 0, 1]), ([8, 9], [1, 1])], length=6, pad_id=PAD)
    assert packed.tokens_NT.tolist() == [[5, 6, 7, 8, 9, 0]]
    assert packed.targets_NT.tolist() == [[6, 7, 0, 9, 0, 0]]
    assert packed.positions_NT.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert packed.segments_NT.tolist() == [[1, 1, 1, 2, 2, 0]]
    assert packed.mask_NT.tolist() == [[0, 1, 0, 1, 0, 0]]
    assert [a.dtype for a in vars(packed).values()] == [np.int32] * 4 + [np.float32]


def test_only_the_completion_is_learnt():
    packed = pack([example([1, 4, 5], [6, 7, 2])], length=8, pad_id=PAD)
    learnt = packed.targets_NT[packed.mask_NT > 0]
    assert learnt.tolist() == [6, 7, 2]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="example 1 has 5 tokens.*length"):
        pack([([1], [1]), ([1] * 5, [1] * 5)], length=4, pad_id=PAD)
    with pytest.raises(ValueError, match="example 0 has 0 tokens"):
        pack([([], [])], length=4, pad_id=PAD)
    with pytest.raises(ValueError, match="3 ids but 2 mask"):
        pack([([1, 2, 3], [1, 1])], length=4, pad_id=PAD)
    with pytest.raises(ValueError, match="at least one"):
        pack([], length=4, pad_id=PAD)


def test_twenty_thousand_examples_pack_fast_and_tight():
    sizes = np.random.default_rng(0).integers(5, 120, size=20_000).tolist()
    examples = [([7] * size, [1.0] * size) for size in sizes]
    began = time.perf_counter()
    packed = pack(examples, length=256, pad_id=PAD)
    assert time.perf_counter() - began < 5.0  # about 0.4 s on an idle core
    assert (packed.segments_NT > 0).mean() > 0.97
