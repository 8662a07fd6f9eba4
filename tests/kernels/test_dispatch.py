# SPDX-License-Identifier: Apache-2.0
"""Choosing an implementation: an explicit one is never replaced, the device's own may be."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import Backend, Unsupported, chips, dispatch, tuning


def refuse_kernels(backend):
    if backend.name != "xla":
        raise Unsupported("no kernel")
    return backend


def test_on_cpu_the_reference_runs():
    assert dispatch.run(None, refuse_kernels) == Backend("xla", chip="cpu", explicit=False)


def test_the_devices_own_choice_falls_back_to_xla(monkeypatch):
    monkeypatch.setattr(chips, "present", lambda: ("tpu", "TPU v5 lite"))
    assert dispatch.resolve(None).name == "tpu"
    assert dispatch.run(None, refuse_kernels) == Backend("xla", chip="v5e")


@pytest.mark.parametrize(
    ("kind", "axes", "chosen"),
    [
        ("TPU v5", "manual", Backend("tpu", chip="v5p", explicit=False)),
        ("TPU v5", "auto", Backend("xla", chip="v5p", explicit=False)),
        ("cpu", "manual", Backend("xla", chip="cpu", explicit=False)),
    ],
)
def test_the_device_is_the_meshs_where_a_program_sees_its_own_piece(kind, axes, chosen):
    """A mesh of chips that are not there, as programs are planned for."""
    device = jax.sharding.AbstractDevice(
        device_kind=kind, num_cores=None, platform="cpu" if kind == "cpu" else "tpu"
    )
    types = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((4,), ("x",), axis_types=types, abstract_device=device)
    found = []

    def look(x):
        found.append(dispatch.resolve(None))
        return x

    with jax.sharding.use_abstract_mesh(mesh):
        spec = jax.P("x")
        call = look
        if axes == "manual":
            call = jax.shard_map(look, in_specs=spec, out_specs=spec)
        jax.eval_shape(call, jax.ShapeDtypeStruct((8,), jnp.float32))
    assert found[-1] == chosen


def test_the_chips_of_the_mesh_in_force_choose():
    """A program may be compiled for chips that are not there."""
    device = jax.sharding.AbstractDevice(device_kind="TPU7x", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("all",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert dispatch.resolve(None) == Backend("tpu", chip="tpu7x", explicit=False)
    assert dispatch.resolve(None).name == "xla"


def test_an_explicit_choice_does_not(monkeypatch):
    with pytest.raises(Unsupported, match="first device is 'cpu'"):
        dispatch.run("tpu", refuse_kernels)
    monkeypatch.setattr(chips, "present", lambda: ("tpu", "TPU7x"))
    with pytest.raises(Unsupported, match="no kernel"):
        dispatch.run("tpu", refuse_kernels)
    with pytest.raises(Unsupported, match="Hopper"):
        dispatch.resolve("gpu")


@pytest.mark.parametrize("wrong", ["cuda", "ref", 3])
def test_a_name_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="must be one of"):
        dispatch.resolve(wrong)


def test_a_backend_names_a_known_chip():
    with pytest.raises(ValueError, match="v5e"):
        Backend("tpu", chip="v9")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("cpu", "cpu"),
    ],
)
def test_chips_by_the_kind_jax_gives(kind, name):
    assert chips.named(kind).name == name


def test_an_unknown_chip_runs_the_reference(monkeypatch):
    monkeypatch.setattr(chips, "present", lambda: ("gpu", "NVIDIA A100"))
    assert dispatch.resolve(None).name == "xla"
    with pytest.raises(Unsupported, match="A100"):
        dispatch.resolve("gpu")


def test_tiles_explicit_then_table_then_heuristic(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    dims = {"m": 64, "k": 128}
    choose = lambda tiles=None: tuning.choose(  # noqa: E731
        "op", dims, Backend("tpu", "v5e", tiles=tiles), lambda: (1, 1)
    )
    assert choose() == (1, 1)
    tuning.write("v5e", "op", {"k": 128, "m": 64}, (2, 2))
    tuning.write("v5e", "other", dims, (9, 9))
    assert choose() == (2, 2)
    assert choose((3, 3)) == (3, 3)
    with pytest.raises(ValueError, match="op has 2 tiles"):
        choose((3, 3, 3))
