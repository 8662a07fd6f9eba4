# SPDX-License-Identifier: Apache-2.0
"""Weights laid out for decoding inside the rollout: the same completions, nothing gathered."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import MeshConfig
from r1jax.infer.redundant import Copies
from r1jax.nn.param import as_used, leaves, specs
from r1jax.parallel.costs import Rules, measure
from r1jax.parallel.hlo import parse
from r1jax.rl.rollout import laid_out_rollout, rollout
from tests.nn import test_fp8
from tests.nn import tiny as models
from tests.nn.test_fp8 import linear_weight
from tests.parallel.test_training import AUTO, CFG, EXPLICIT, QWEN2, assert_same, on
from tests.train import tiny

NEW, PROMPTS = 6, 8
# Wide enough that one layer's weights are more than what all rows say to each other.
DENSE = dataclasses.replace(QWEN2, hidden_size=64, intermediate_size=128)
MIXTURE = dataclasses.replace(
    CFG, hidden_size=64, intermediate_size=128,
    moe=dataclasses.replace(CFG.moe, moe_intermediate_size=32),
)  # fmt: skip
CUT = MeshConfig(fsdp=2, tensor=2, context=2)
DEALT = MeshConfig(expert=4, fsdp=2)


def drawing(fn):
    """A rollout of `asked`."""

    def run(model, prompt_PS, valid_PS, key, temperature_B):
        rules = dict(max_new_tokens=NEW, eos_ids=(1,), pad_id=0)
        return fn(model, prompt_PS, valid_PS, key, temperature_B, **rules)

    return run


def asked(model, prompts=PROMPTS):
    """Two rows a prompt."""
    valid = np.ones((prompts, 4), bool)
    valid[-1, :2] = False
    prompt, temperature_B = models.tokens(0, prompts, 4), np.ones(2 * prompts, np.float32)
    return model, prompt % model.cfg.vocab_size, valid, jax.random.key(3), temperature_B


def compiled(fn, model, prompts=PROMPTS):
    """A rollout, compiled, and its arguments."""
    args = asked(model, prompts)
    return jax.jit(drawing(fn)).lower(*args).compile(), args


@functools.cache
def on_one_device(cfg, prompts=PROMPTS):
    run, args = compiled(rollout, tiny.state(cfg).model(), prompts)
    return jax.tree.map(np.asarray, run(*args))


def on_a_mesh(fn, cfg, mesh, kind=AUTO, prompts=PROMPTS):
    """(rollout, bytes that a device sends in decoding)."""
    state = tiny.state(cfg)
    with on(mesh, kind):
        run, args = compiled(fn, jax.device_put(state, specs(state)).model(), prompts)
        found = jax.tree.map(np.asarray, run(*args))
    rules = Rules(mesh.devices, lambda name, most: most or NEW)
    sent = measure(parse(run.as_text()), rules).collectives
    return found, sum(c.sent for c in sent if "decode/while" in c.op_name)


def check(cfg, mesh, kind=AUTO, prompts=PROMPTS, *, fn=laid_out_rollout):
    found, sent = on_a_mesh(fn, cfg, mesh, kind, prompts)
    np.testing.assert_array_equal(found.tokens_BT, on_one_device(cfg, prompts).tokens_BT)
    assert_same(found, on_one_device(cfg, prompts))
    return sent


def test_no_weight_is_gathered_at_a_token():
    """The training layout gathers them all, which shows that the count can see it."""
    sent = check(DENSE, CUT)
    _, trained = on_a_mesh(rollout, DENSE, CUT)
    layers = DENSE.num_layers * 3 * DENSE.hidden_size * DENSE.intermediate_size * 4
    assert sent < layers / CUT.tensor / 2 < trained


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [MIXTURE, DENSE], ids=["mixture", "dense"])
@pytest.mark.parametrize("mesh", [CUT, DEALT, MeshConfig(fsdp=8)], ids=["cut", "dealt", "fsdp"])
def test_every_mesh_draws_what_one_device_draws(cfg, mesh):
    sent = check(cfg, mesh)
    _, trained = on_a_mesh(rollout, cfg, mesh)
    assert sent < trained / 3
    check(cfg, mesh, EXPLICIT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cfg", "mesh", "kind", "redundant"),
    [
        (MIXTURE, DEALT, AUTO, 4),
        (MIXTURE, DEALT, EXPLICIT, 8),
        (MIXTURE, MeshConfig(expert=4, tensor=2), AUTO, 4),
        (MIXTURE, MeshConfig(expert=2, fsdp=2, context=2), AUTO, 2),
        (test_fp8.CFG, DEALT, AUTO, 4),
    ],
)
def test_redundant_experts_draw_the_same(cfg, mesh, kind, redundant):
    """Whatever the loads say: here that an expert deserves most of the copies."""
    load_LE = np.random.default_rng(0).integers(0, 9, (1, 8)).astype(np.float32)
    load_LE[0, 3] = 60
    fn = functools.partial(laid_out_rollout, copies=Copies(load_LE, redundant))
    check(cfg, mesh, kind, fn=fn)


@pytest.mark.parametrize(
    ("cfg", "mesh", "kind"),
    [
        (test_fp8.CFG, DEALT, AUTO),
        pytest.param(test_fp8.CFG, CUT, EXPLICIT, marks=pytest.mark.slow),
        pytest.param(
            test_fp8.CFG, MeshConfig(expert=2, fsdp=2, tensor=2), AUTO, marks=pytest.mark.slow
        ),
        pytest.param(test_fp8.QWEN2, CUT, AUTO, marks=pytest.mark.slow),
    ],
)
def test_in_fp8_the_loop_is_given_blocks(cfg, mesh, kind):
    """All of them: on these meshes no device's part of a weight ends inside a block. And XLA is to
    partition the head's product alone: it could not partition a kernel."""
    check(cfg, mesh, kind)
    state = tiny.state(cfg)
    with on(mesh, kind):
        model = jax.device_put(state, specs(state)).model()
        loop = loop_of(jax.make_jaxpr(drawing(laid_out_rollout))(*asked(model)).jaxpr)
    given = [v.aval for v in loop.invars]
    read = [path for path in leaves(model) if linear_weight(path) and not path.startswith("mtp.")]
    assert sum(x.dtype == "float8_e4m3fn" for x in given) == len(read)
    found = collections.Counter(names(loop.params["body_jaxpr"].jaxpr, but_in="shard_map"))
    assert found["shard_map"] == found["dot_general"] == 1


@pytest.mark.slow
def test_in_fp8_parts_that_end_inside_blocks_draw_the_same():
    """Six of twelve hidden values a device, in blocks of four."""
    odd = dataclasses.replace(test_fp8.QWEN2, intermediate_size=12)
    check(odd, MeshConfig(fsdp=4, tensor=2))


def loop_of(jaxpr):
    """The decoding loop inside a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "while":
            return eqn
        for inner in inside(eqn):
            if (found := loop_of(inner)) is not None:
                return found
    return None


def names(jaxpr, *, but_in):
    """Of all primitives in a program, but for those inside of one."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        if eqn.primitive.name != but_in:
            for inner in inside(eqn):
                yield from names(inner, but_in=but_in)


def inside(eqn):
    """The programs that a primitive calls."""
    for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
            yield inner


@pytest.mark.slow
def test_rows_that_the_devices_do_not_divide():
    check(MIXTURE, CUT, prompts=3)
    check(DENSE, MeshConfig(data=4, tensor=2), prompts=5)


@pytest.mark.parametrize(
    "cfg",
    [
        dataclasses.replace(tiny.DEEPSEEK, dtype="bfloat16"),
        pytest.param(dataclasses.replace(QWEN2, dtype="bfloat16"), marks=pytest.mark.slow),
    ],
    ids=["deepseek", "qwen2"],
)
def test_parameters_held_as_they_are_used_change_no_bit(cfg):
    """Half the bytes; routers and norms, which are used in float32, stay."""
    model = tiny.state(cfg).model()
    held = as_used(model)
    for name, value in leaves(held).items():
        exact = "norm" in name or "router" in name or ".b_" in name
        assert value[...].dtype == (jnp.float32 if exact else jnp.bfloat16), name
    draw, args = compiled(rollout, model)
    again, _ = compiled(rollout, held)
    for a, b in zip(draw(*args), again(held, *args[1:]), strict=True):
        np.testing.assert_array_equal(a, b)
    fp8 = dataclasses.replace(cfg.fp8, enabled=True)
    kept = as_used(tiny.state(dataclasses.replace(cfg, fp8=fp8)).model())
    assert {v[...].dtype for v in leaves(kept).values()} == {jnp.dtype("float32")}
