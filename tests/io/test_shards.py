# SPDX-License-Identifier: Apache-2.0
"""Safetensors folders: what is wrong is named, whatever is wrong, and nothing half is left."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from r1jax.io.shards import MODEL, MTP, Draft, Shards, index_name, single_name, write_shards

SINGLE, INDEX = single_name(MODEL), index_name(MODEL)
TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(jnp.bfloat16),
    "c": np.arange(8).astype(jnp.float8_e4m3fn).reshape(4, 2),
    "d": np.float16([[1.5]]),
}


def folder_of(tmp_path, **how):
    (tmp_path / "config.json").write_text("{}")
    write_shards(tmp_path, TENSORS.items(), **how)
    return tmp_path


@pytest.mark.parametrize("shard_bytes", [1, 20, 1 << 20])
def test_round_trip(tmp_path, shard_bytes):
    shards = Shards(folder_of(tmp_path, shard_bytes=shard_bytes))
    assert set(shards.shapes()) == set(TENSORS)
    for name, array in TENSORS.items():
        found = shards.read(name)
        assert found.dtype == array.dtype
        assert found.shape == array.shape == shards.shapes()[name][1]
        assert found.tobytes() == array.tobytes()
    # 24, 8, 8 and 2 bytes
    files = {1: 4, 20: 2, 1 << 20: 1}[shard_bytes]
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    assert (tmp_path / INDEX).exists() == (shard_bytes < 1 << 20)


@pytest.mark.parametrize("shard_bytes", [1, 1 << 20])
def test_files_of_a_second_stem_are_read_too(tmp_path, shard_bytes):
    folder_of(tmp_path)
    more = {"e": np.float32([1]), "f": np.float32([2])}
    write_shards(tmp_path, more.items(), stem=MTP, shard_bytes=shard_bytes)
    assert set(Shards(tmp_path).shapes()) == {*TENSORS, *more}
    write_shards(tmp_path, [("a", TENSORS["a"])], stem=MTP)
    (tmp_path / index_name(MTP)).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"a is in .* too"):
        Shards(tmp_path)


def test_a_truncated_shard(tmp_path):
    path = folder_of(tmp_path) / SINGLE
    whole = path.read_bytes()
    for n in range(0, len(whole), 7):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=SINGLE):
            Shards(tmp_path)


def test_a_missing_shard_and_a_lying_index(tmp_path):
    folder_of(tmp_path, shard_bytes=1)
    index = json.loads((tmp_path / INDEX).read_text())
    first = index["weight_map"]["a"]
    saved = (tmp_path / first).read_bytes()
    (tmp_path / first).unlink()
    with pytest.raises(ValueError, match=f"{first}.*missing"):
        Shards(tmp_path)
    (tmp_path / first).write_bytes(saved)
    index["weight_map"]["ghost"] = first
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lacks ghost"):
        Shards(tmp_path)
    index["weight_map"]["ghost"] = "../elsewhere"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no file name"):
        Shards(tmp_path)
    for text in ("", "[]", "{}", '{"weight_map": 3}', "[" * 100_000):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(ValueError, match=INDEX):
            Shards(tmp_path)


def test_an_unknown_dtype_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"counts": np.arange(3)}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match="counts has the dtype I64"):
        Shards(tmp_path)


numbers = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**62, 2**64, -(2**63), 1.5]))
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F64", "BF16", "F8_E4M3", "U8", "", None, 3]),
        "shape": st.one_of(st.lists(numbers, max_size=3), st.none()),
        "data_offsets": st.one_of(st.lists(numbers, min_size=1, max_size=3), st.just([0, 8])),
    }
)
headers = st.one_of(
    st.dictionaries(st.text(max_size=4), entries, max_size=3).map(
        lambda h: json.dumps(h).encode("utf-8", "surrogatepass")
    ),
    st.binary(max_size=60),
)


@given(
    header=headers,
    claimed=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    data=st.binary(max_size=24),
)
def test_a_header_of_lies(tmp_path_factory, header, claimed, data):
    """Huge lengths, overlapping offsets, no JSON: refused, or read as what it soundly says."""
    folder = tmp_path_factory.mktemp("lies")
    (folder / "config.json").write_text("{}")
    length = len(header) if claimed is None else claimed
    (folder / SINGLE).write_bytes(struct.pack("<Q", length) + header + data)
    try:
        shards = Shards(folder)
    except ValueError as error:
        assert str(folder / SINGLE) in str(error)  # noqa: PT017  (either outcome is right)
        return
    total = sum(shards.read(name).nbytes for name in shards.shapes())
    assert total == len(data)


def test_a_draft_appears_whole_or_not_at_all(tmp_path):

    def fail():
        with Draft(tmp_path / "x") as folder:
            (folder / "half").write_text("1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with Draft(tmp_path / "x") as folder:
        (folder / "whole").write_text("1")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    with pytest.raises(ValueError, match="exists already"), Draft(tmp_path / "x"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="exists already"), Draft(tmp_path / "file"):
        pass
