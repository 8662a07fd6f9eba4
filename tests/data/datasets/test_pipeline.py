# SPDX-License-Identifier: Apache-2.0
"""Batches: every item once an epoch, hosts that share a batch, positions that are kept exactly."""

import ast
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.data import datasets
from r1jax.data.datasets import Batches, Shard, packed_batches, shuffled
from r1jax.data.packing import example, pack


def ints(batches, n=None):
    return [[int(x) for x in batch] for batch in itertools.islice(batches, n)]


def pipeline(n=10, batch_size=4, seed=0, **rules):
    return Batches(list(range(n)), batch_size=batch_size, seed=seed, **rules)


def test_every_item_comes_once_an_epoch_and_every_epoch_in_another_order():
    stream = sum(ints(pipeline(epochs=4)), [])
    epochs = [stream[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert sum(ints(pipeline(batch_size=1), 12), []) == stream[:12]
    assert sum(ints(pipeline(seed=1), 3), []) != stream[:12]


def test_what_fills_no_batch_at_the_very_end_is_left_out():
    assert len(ints(pipeline(n=10, batch_size=4, epochs=1))) == 2
    assert len(ints(pipeline(n=10, batch_size=4, epochs=2))) == 5


# grain shuffles few items slowly (it walks a cycle of 2^16 places): few and short examples.
FEW = settings(max_examples=8)


@FEW
@given(
    n=st.integers(8, 40),
    hosts=st.sampled_from([1, 2, 4]),
    seed=st.integers(-5, 2**40),
    epochs=st.sampled_from([None, 3]),
)
def test_hosts_share_each_global_batch_whatever_their_number(n, hosts, seed, epochs):
    """So a run goes on with other hosts; and none sees more batches than another."""
    whole = ints(pipeline(n, 8, seed, epochs=epochs), 4)
    parts = [
        ints(pipeline(n, 8, seed, epochs=epochs, shard=Shard(i, hosts)), 4) for i in range(hosts)
    ]
    assert {len(part) for part in parts} == {len(whole)}
    for batch, *shares in zip(whole, *parts, strict=True):
        assert sorted(sum(shares, [])) == sorted(batch)
        assert [x for xs in zip(*shares, strict=True) for x in xs] == batch


@FEW
@given(st.integers(8, 20), st.integers(0, 12), st.sampled_from([1, 2]), st.sampled_from([None, 4]))
def test_a_restored_pipeline_goes_on_as_if_it_had_not_stopped(n, k, hosts, epochs):
    """Also in the middle of a later epoch; the state is JSON."""
    rules = dict(n=n, batch_size=4, seed=7, epochs=epochs, shard=Shard(hosts - 1, hosts))
    one = pipeline(**rules)
    ints(one, k)
    state = json.loads(json.dumps(one.state()))
    rest = ints(one, 4)
    other = pipeline(**rules)
    ints(other, 1)  # wherever it stands
    other.restore(state)
    assert ints(other, 4) == rest
    assert other.state() == one.state()


def test_another_number_of_hosts_goes_on_at_the_same_global_batch():
    one = pipeline()
    ints(one, 6)
    state = one.state()
    parts = [pipeline(shard=Shard(i, 2)) for i in range(2)]
    for part in parts:
        part.restore(state)
    assert sorted(sum((ints(p, 1)[0] for p in parts), [])) == sorted(ints(one, 1)[0])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"seed": 1}, "seed: saved 0, now 1"),
        ({"n": 11}, "items: saved 10, now 11"),
        ({"batch_size": 2}, "batch_size"),
        ({"epochs": 5}, "epochs"),
    ],
)
def test_a_position_of_another_pipeline_is_refused(change, word):
    state = pipeline().state()
    with pytest.raises(ValueError, match=word):
        pipeline(**change).restore(state)


@pytest.mark.parametrize("position", [None, -1, "3", 1.5, True])
def test_a_position_that_is_none_is_refused(position):
    with pytest.raises(ValueError, match="position"):
        pipeline().restore({**pipeline().state(), "position": position})


@pytest.mark.parametrize(
    ("rules", "word"),
    [
        ({"n": 0}, "at least one item"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 3, "shard": Shard(0, 2)}, "multiple of the 2 processes"),
        ({"n": 3, "epochs": 1}, "fill no batch"),
        ({"epochs": 0}, "epochs=0"),
    ],
)
def test_what_cannot_be_is_refused(rules, word):
    with pytest.raises(ValueError, match=word):
        pipeline(**rules)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
        Shard(2, 2)


def test_places_of_the_stream_are_those_of_the_batches():
    whole = sum(ints(pipeline(seed=5), 6), [])
    assert shuffled(10, 0, 24, seed=5) == whole
    assert shuffled(10, 7, 9, seed=5) == whole[7:16]


def test_packed_rows_and_collated_items():
    examples = [example([i] * 3, [i] * (1 + i % 4)) for i in range(1, 20)]
    packed = pack(examples, length=16, pad_id=0)
    batches = packed_batches(packed, batch_size=2, seed=3, epochs=1)
    seen = [next(batches) for _ in range(packed.rows // 2)]
    rows = np.concatenate([batch["tokens"] for batch in seen])
    assert rows.dtype == np.int32
    assert len({row.tobytes() for row in rows}) == len(rows)
    where = [np.flatnonzero((packed.tokens_NT == row).all(1))[0] for row in rows]
    for name in ("targets", "positions", "segments", "mask"):
        column = np.concatenate([batch[name] for batch in seen])
        np.testing.assert_array_equal(column, getattr(packed, f"{name}_NT")[where])
    lists = Batches([[1], [2, 3]], batch_size=2, seed=0, collate=lambda rows: sorted(rows, key=len))
    assert next(lists) == [[1], [2, 3]]


def test_what_is_heavy_is_imported_where_it_is_used():
    """Importing a reader costs neither grain nor pyarrow."""
    for path in Path(datasets.__file__).parent.glob("*.py"):
        top = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import)]
        assert {alias.name for n in top for alias in n.names}.isdisjoint({"grain", "pyarrow"})
