# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: bit-exact, whole, of this config and tree or refused, damaged ones passed over."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1jax.io import checkpoint

ROOT = Path(__file__).resolve().parents[2]


def make_tree(seed=0):
    """Every kind of leaf a training state has, with values that do not survive a cast."""
    key = jax.random.key(seed)
    params = {
        "w": jax.random.normal(key, (3, 5)),
        "half": jnp.asarray([1.0, jnp.nan, -0.0, 1e-30, jnp.inf], jnp.bfloat16),
        "layers": {"scale": jnp.float32(1 / 3)},
    }
    return {
        "params": params,
        "opt": optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(params),
        "rng": jax.random.key_data(key),
        "host": np.arange(4, dtype=np.uint32),
        "wide": np.int64(2**40 + seed),
        "count": 7,
        "ratio": 0.1,
        "flag": True,
        "nothing": None,
        "empty": {},
        "pair": (jnp.int32(3), [jnp.ones((2,), bool)]),
    }


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(x, jax.Array) == isinstance(y, jax.Array)
        assert np.asarray(x).dtype == np.asarray(y).dtype
        assert np.shape(x) == np.shape(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_round_trip_is_bit_exact(tmp_path):
    tree = make_tree()
    folder = checkpoint.save(tmp_path / "c", 12, tree, meta={"stage": "grpo", "lr": [1, 0.5]})
    assert folder == tmp_path / "c" / "00000012"
    assert_same(checkpoint.restore(tmp_path / "c", 12, make_tree(seed=1)), tree)
    assert checkpoint.read_meta(tmp_path / "c", 12) == {"stage": "grpo", "lr": [1, 0.5]}


def test_restores_from_shapes_alone(tmp_path):
    tree = {"params": make_tree()["params"]}
    checkpoint.save(tmp_path, 0, tree, meta={})
    assert_same(checkpoint.restore(tmp_path, 0, jax.eval_shape(lambda: tree)), tree)


def test_restored_arrays_can_be_donated(tmp_path):
    checkpoint.save(tmp_path, 0, {"w": jnp.arange(8.0)}, meta={})
    back = checkpoint.restore(tmp_path, 0, {"w": jnp.zeros(8)})
    out = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(back)
    np.testing.assert_array_equal(out["w"], np.arange(8.0) + 1)


@pytest.mark.parametrize(("save_sharded", "load_sharded"), [(1, 1), (1, 0), (0, 1)])
def test_sharding_follows_the_abstract_tree(tmp_path, save_sharded, load_sharded):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharded = jax.NamedSharding(mesh, jax.P("data"))
    single = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    x = jax.device_put(jnp.arange(16.0), sharded if save_sharded else single)
    checkpoint.save(tmp_path, 0, {"x": x}, meta={})
    wanted = sharded if load_sharded else single
    abstract = {"x": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=wanted)}
    back = checkpoint.restore(tmp_path, 0, abstract)["x"]
    assert back.sharding == wanted
    np.testing.assert_array_equal(np.asarray(back), np.arange(16.0))


W = jnp.ones((3, 2))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"w": jnp.ones((4, 2))}, "float32[3,2], asked for float32[4,2]"),
        ({"w": jnp.ones((3, 2), jnp.bfloat16)}, "asked for bfloat16[3,2]"),
        ({"w": 1.0}, "asked for float"),
        ({"v": W}, "['v']: saved nothing"),
        ({"w": W, "v": W}, "['v']: saved nothing"),
        ({}, "['w']"),
    ],
)
def test_another_tree_is_refused(tmp_path, asked, said):
    """Orbax alone would pad, crop, cast or drop."""
    checkpoint.save(tmp_path, 0, {"w": W}, meta={})
    for read in (
        lambda: checkpoint.restore(tmp_path, 0, asked),
        lambda: checkpoint.restore_latest(tmp_path, asked),
    ):
        with pytest.raises(ValueError, match="holds another tree") as error:
            read()
        assert said in str(error.value)


def test_another_config_is_refused_by_field(tmp_path):
    old = {"seed": 0, "model": {"hidden_size": 64, "dims": (1, 2)}, "stages": {}}
    checkpoint.save(tmp_path, 3, {"w": W}, meta={"config": old})
    assert checkpoint.restore_latest(tmp_path, {"w": W}, config=old).step == 3
    new = {"seed": 0, "model": {"hidden_size": 128, "dims": (1, 2)}, "stages": {}}
    with pytest.raises(ValueError, match=r"model\.hidden_size: saved 64, asked for 128") as error:
        checkpoint.restore_latest(tmp_path, {"w": W}, config=new)
    assert "seed" not in str(error.value)
    assert "dims" not in str(error.value)
    assert "\n" not in str(error.value)


def test_retention_and_latest(tmp_path):
    assert checkpoint.latest(tmp_path / "absent") is None
    assert checkpoint.steps(tmp_path / "absent") == []
    assert checkpoint.restore_latest(tmp_path / "absent", {"w": W}) is None
    for step in (2, 9, 10):
        checkpoint.save(tmp_path, step, {"w": W * step}, meta={"at": step})
    assert checkpoint.steps(tmp_path) == [9, 10]
    assert checkpoint.latest(tmp_path) == 10
    step, tree, meta = checkpoint.restore_latest(tmp_path, {"w": W})
    assert (step, float(tree["w"][0, 0]), meta) == (10, 10.0, {"at": 10})
    # Resumed from 9: what lay in the future of 9 goes, so that `latest` stays the newest of this
    # run.
    checkpoint.save(tmp_path, 9, {"w": W}, meta={"at": "again"})
    assert checkpoint.steps(tmp_path) == [9]
    assert checkpoint.read_meta(tmp_path, 9) == {"at": "again"}


def test_a_step_is_replaced_without_a_moment_without_it(tmp_path, monkeypatch):
    tree = {"w": W}
    checkpoint.save(tmp_path, 3, tree, meta={"at": "first"}, keep=1)
    with (
        monkeypatch.context() as patch
    ):  # dies when the new one is complete, before the old one goes
        patch.setattr(checkpoint, "_prune", lambda *_: None)
        checkpoint.save(tmp_path, 3, {"w": 2 * W}, meta={"at": "second"}, keep=1)
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoint.steps(tmp_path) == [3]
    assert checkpoint.restore_latest(tmp_path, tree).meta == {"at": "second"}
    np.testing.assert_array_equal(checkpoint.restore(tmp_path, 3, tree)["w"], 2 * W)
    checkpoint.save(tmp_path, 3, {"w": 3 * W}, meta={"at": "third"}, keep=1)
    assert len(list(tmp_path.iterdir())) == 1
    np.testing.assert_array_equal(checkpoint.restore(tmp_path, 3, tree)["w"], 3 * W)


def newest_data_file(folder):
    return max(
        (p for p in (folder / "tree").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )


def truncate(folder):
    file = newest_data_file(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit_of_the_data(folder):
    """In the middle of the arrays, where no reader notices but a checksum."""
    wanted = np.ones(500, np.float32).tobytes()
    file = next(p for p in (folder / "tree").rglob("*") if p.is_file() and wanted in p.read_bytes())
    data = bytearray(file.read_bytes())
    data[data.index(wanted) + 1002] ^= 1
    file.write_bytes(bytes(data))


def lose_meta(folder):
    (folder / "meta" / "metadata").unlink()


def garble_meta(folder):
    (folder / "meta" / "metadata").write_text('{"meta": {')


def lose_data(folder):
    newest_data_file(folder).unlink()


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_bit_of_the_data, lose_meta, garble_meta, lose_data]
)
def test_a_damaged_checkpoint_is_passed_over_loudly(tmp_path, caplog, damage):
    tree = {"w": jnp.ones((50, 20))}
    for step in (1, 2):
        checkpoint.save(tmp_path, step, tree, meta={"at": step})
    damage(tmp_path / "00000002")
    with caplog.at_level(logging.WARNING, logger="r1jax"):
        found = checkpoint.restore_latest(tmp_path, tree)
    assert found.step == 1
    assert_same(found.tree, tree)
    assert "00000002 cannot be read" in caplog.text
    damage(tmp_path / "00000001")
    with pytest.raises(ValueError, match="none of the checkpoints"):
        checkpoint.restore_latest(tmp_path, tree)


@pytest.mark.parametrize("asked", ["meta", "tree"])
def test_what_another_process_cannot_read_none_takes(tmp_path, monkeypatch, asked):
    """Else they would go on from different steps."""
    tree = {"w": jnp.arange(3.0)}
    for step in (1, 2):
        checkpoint.save(tmp_path, step, tree, meta={}, keep=2)
    calls = []

    def said(why):
        calls.append(why)  # meta and tree of step 2, then of step 1
        torn = len(calls) == (1 if asked == "meta" else 2)
        return [why, "its disk says no" if torn else ""]

    monkeypatch.setattr(checkpoint.hosts, "exchanged", said)
    assert checkpoint.restore_latest(tmp_path, tree).step == 1
    assert len(calls) == (3 if asked == "meta" else 4)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep"):
        checkpoint.save(tmp_path, 0, {"w": W}, meta={}, keep=0)
    with pytest.raises(ValueError, match="no checkpoint of step 4"):
        checkpoint.restore(tmp_path, 4, {"w": W})
    with pytest.raises((TypeError, ValueError)):
        checkpoint.save(tmp_path, 0, {"w": W}, meta={"x": object()})
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.save(tmp_path, 0, {"w": W}, meta={"x": float("nan")})
    assert checkpoint.steps(tmp_path) == []


def test_saving_a_megabyte_is_quick(tmp_path):
    tree = {f"layer_{i}": np.ones(2_000, np.float32) for i in range(120)}
    times = []
    for step in range(4):
        began = time.perf_counter()
        checkpoint.save(tmp_path, step, tree, meta={})
        times.append(time.perf_counter() - began)
    # About 0.1 s on one idle core; the bound leaves room for a busy machine, not for a slow path.
    assert min(times) < 1.0


KILLED = """
import sys
import numpy as np
from r1jax.io import checkpoint
step = (checkpoint.latest(sys.argv[1]) or 0) + 1
print("ready", flush=True)
while True:
    checkpoint.save(sys.argv[1], step, {"w": np.full(50_000, step, np.int64)}, meta={"at": step})
    step += 1
"""


def save_until_killed(path, after_seconds):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as run:
        assert run.stdout.readline() == b"ready\n"
        while checkpoint.latest(path) is None:
            time.sleep(0.01)
        time.sleep(after_seconds)
        run.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_kill_9_leaves_a_whole_checkpoint(tmp_path, kills):
    """Killed while it saves without pause: the latest is whole and says which step it is."""
    for kill in range(kills):
        save_until_killed(tmp_path, after_seconds=0.1 + 0.037 * kill)
        step, tree, meta = checkpoint.restore_latest(tmp_path, {"w": np.zeros(50_000, np.int64)})
        assert meta == {"at": step}
        assert (tree["w"] == step).all()
    checkpoint.save(tmp_path, step + 1, {"w": W}, meta={})
    assert all(p.name.isdecimal() for p in tmp_path.iterdir()), "leftovers of the killed writers"
