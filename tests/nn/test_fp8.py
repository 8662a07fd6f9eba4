# SPDX-License-Identifier: Apache-2.0
"""A whole model in FP8: against numpy's products, what stays in high precision, how it is run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from r1jax.config import (
    FP8Config,
    MeshConfig,
    OptimConfig,
    RecipeConfig,
    from_config_dict,
    quickstart,
    to_config_dict,
)
from r1jax.infer.decode import empty_cache, prefill, step
from r1jax.nn import mla
from r1jax.nn.build import blank
from r1jax.nn.param import resident, specs
from r1jax.nn.stats import RouterStats
from r1jax.ops import experts, linear
from r1jax.ops.linear import FP8
from r1jax.optim import adamw
from r1jax.parallel import dispatch
from r1jax.parallel.mesh import make_mesh
from r1jax.sharding import local, spec
from r1jax.train.state import Controls
from r1jax.train.supervised import INPUTS, micro_batched, scores, supervised_step
from tests.nn import tiny as models
from tests.ops import fp8_reference as reference
from tests.train import tiny

# The same E4M3 operands and other sums; now and then a value at the border between two E4M3 numbers
# falls to the other side, and moves what hangs on it by parts of a thousandth.
FLOAT32 = 2e-3
# Other tiles: an error of E4M3, up to a sixteenth of a value, in some other place.
TILES = 0.1
BLOCK = 4
ON = FP8Config(enabled=True, block=BLOCK)
CONTROLS = Controls(np.float32(0.1), np.float32(0.01))

# Every size that is cut by a mesh below is a multiple of the block on each device.
CFG = models.model_config(
    num_layers=1,
    first_k_dense=0,
    vocab_size=14,
    mla=dataclasses.replace(
        models.model_config().mla, q_lora_rank=8, kv_lora_rank=12, v_head_dim=4
    ),
    moe=dataclasses.replace(
        models.model_config().moe, n_routed_experts=8, n_group=4, moe_intermediate_size=8
    ),
    fp8=ON,
)
QWEN2 = models.dense_config(qwen2=True, vocab_size=14, intermediate_size=16, fp8=ON)


def batch(micro_batches=1):
    return micro_batched(tiny.packed(rows=16, length=12), micro_batches)


def train_step():
    """A function that nothing has traced yet: (state, batch) → (state of gradients, metrics)."""
    run = functools.partial(supervised_step, optimizer=tiny.KEEP_GRADIENT, mtp_weight=0.3)
    return jax.jit(lambda state, batch: run(state, batch, CONTROLS))


one_step = train_step()


def start(cfg=CFG):
    """Weights a quarter as large as the tests' others: activations of order 1."""
    state = tiny.state(cfg)
    return dataclasses.replace(state, params=jax.tree.map(lambda x: x / 4, state.params))


@functools.cache
def on_one_device(cfg=CFG, micro_batches=1):
    return one_step(start(cfg), batch(micro_batches))


def differences(found, wanted):
    """{path: norm of the difference over the norm} of gradients."""
    pairs = zip(*(jax.tree_util.tree_flatten_with_path(x)[0] for x in (found, wanted)), strict=True)
    error = lambda a, b: np.linalg.norm(np.float64(a) - b) / max(np.linalg.norm(b), 1e-6)  # noqa: E731
    return {jax.tree_util.keystr(path): error(a, b) for (path, a), (_, b) in pairs}


def worst(found, wanted):
    return max(differences(found, wanted).items(), key=lambda item: item[1])


# ----------------------------------------------------------------------- the same model, by numpy


def by_numpy(shape, f, *args):
    call = lambda *args: np.asarray(f(*map(np.asarray, args)), np.float32)  # noqa: E731
    return jax.pure_callback(call, jax.ShapeDtypeStruct(shape, jnp.float32), *args)


def numpy_linear(x, w, *, blocks, block, power_of_two):
    """`fp8_linear`, all three products made by the reference."""
    assert blocks is None
    rule = reference.Rule(block, power_of_two)

    @jax.custom_vjp
    def run(x, w):
        return by_numpy((len(x), w.shape[1]), lambda x, w: reference.product(x, w, rule), x, w)

    def back(kept, dy):
        both = lambda i: lambda *args: reference.gradients(*args, rule)[i]  # noqa: E731
        return tuple(by_numpy(kept[i].shape, both(i), *kept, dy) for i in (0, 1))

    run.defvjp(lambda x, w: (run(x, w), (x, w)), back)
    return run(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], -1)


def numpy_grouped(x, w, sizes, *, block, power_of_two, tail):
    """`fp8_grouped_linear` likewise."""
    del tail
    rule = reference.Rule(block, power_of_two)

    @jax.custom_vjp
    def run(x, w, sizes):
        value = lambda *args: reference.grouped(*args, rule)  # noqa: E731
        return by_numpy((len(x), w.shape[2]), value, x, w, sizes)

    def back(kept, dy):
        both = lambda i: lambda *args: reference.grouped_gradients(*args, rule)[i]  # noqa: E731
        grads = [by_numpy(kept[i].shape, both(i), *kept, dy) for i in (0, 1)]
        return *grads, np.zeros(kept[2].shape, jax.dtypes.float0)

    run.defvjp(lambda *args: (run(*args), args), back)
    return run(x, w, sizes)


def numpy_rounded(x, fp8):
    """`rounded` likewise."""
    value = lambda x: reference.tiles(x.reshape(-1, x.shape[-1]), fp8.block).reshape(x.shape)  # noqa: E731
    found = by_numpy(x.shape, value, jax.lax.stop_gradient(x))
    return x + jax.lax.stop_gradient(found - x)


def numpy_gradient_rounded(y, fp8):
    """`gradient_rounded` likewise."""
    run = jax.custom_vjp(lambda y: y)
    run.defvjp(lambda y: (y, None), lambda _, given: (numpy_rounded(given, fp8),))
    return run(y)


@pytest.mark.slow
def test_loss_and_gradients_are_those_of_numpys_products(monkeypatch):
    state, metrics = on_one_device()
    monkeypatch.setattr(linear, "fp8_linear", numpy_linear)
    monkeypatch.setattr(experts, "fp8_grouped_linear", numpy_grouped)
    for module in (mla, dispatch):
        monkeypatch.setattr(module, "rounded", numpy_rounded)
    monkeypatch.setattr(dispatch, "gradient_rounded", numpy_gradient_rounded)
    wanted, expected = train_step()(start(), batch())
    for name in ("loss", "mtp_loss"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)
    path, error = worst(state.opt, wanted.opt)
    assert error < FLOAT32, (path, error)


@pytest.mark.slow
def test_it_is_near_float32_and_not_float32():
    """Gradients are some percent off: E4M3 has three bits of fraction."""
    plain = dataclasses.replace(CFG, fp8=FP8Config())
    state, metrics = on_one_device()
    exact, expected = on_one_device(plain)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=2e-2)
    found = differences(state.opt, exact.opt)
    assert max(found.values()) < 0.4
    assert 0.01 < np.median(list(found.values())) < 0.1


# -------------------------------------------------------------------- what is quantised, what not


def linear_weight(path: str) -> bool:
    return ("w_" in path) or "proj" in path


def test_only_linear_weights_are_quantised():
    """A little more on one value: E4M3 does not see it, bit for bit, and float32 does."""
    state, (before, metrics) = start(), on_one_device()
    flat, treedef = jax.tree_util.tree_flatten_with_path(state.params)
    seen = {}
    for i, (path, weight) in enumerate(flat):
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            continue
        size = jnp.abs(weight)
        if "embed" in name:  # a token that is there
            size = jnp.zeros_like(size).at[3].set(size[3])
        # The smallest value is not the one that a scale is made of.
        at = jnp.argmin(size) if linear_weight(name) else jnp.argmax(size)
        moved = [w for _, w in flat]
        moved[i] = weight.at[jnp.unravel_index(at, size.shape)].multiply(1.0003)
        params = jax.tree.unflatten(treedef, moved)
        after, found = one_step(dataclasses.replace(state, params=params), batch())
        pairs = zip(*map(jax.tree.leaves, (before.opt, after.opt)), strict=True)
        same = [np.array_equal(a, b) for a, b in pairs]
        seen[name] = not (all(same) and found["loss"] == metrics["loss"])
    assert len(seen) > 20
    assert {name for name, changes in seen.items() if changes} == {
        name for name in seen if not linear_weight(name)
    }


def conversions(jaxpr) -> int:
    """Conversions to a float8 dtype in a program and all programs inside it."""
    own = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "convert_element_type":
            own += "float8" in str(eqn.params["new_dtype"])
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = inner if hasattr(inner, "eqns") else getattr(inner, "jaxpr", None)
            own += conversions(getattr(inner, "jaxpr", inner)) if hasattr(inner, "eqns") else 0
    return own


def test_nothing_else_is_quantised():
    """Two operands of every product, the latents and what goes to the experts once more: norms,
    router, head have none."""
    attention, swiglu, sent, mtp = 2 * 7 + 1, 2 * 3, 1, 2
    tokens = models.whole_rows(models.tokens(1, 2, 7))

    def both(model):
        out = model(*tokens)
        return out, model.predict_second(out.hidden_BTD, *tokens), model.head_DN()

    program = jax.make_jaxpr(both)(models.model(CFG))
    assert conversions(program.jaxpr) == 2 * (attention + 2 * swiglu + sent) + mtp
    plain = dataclasses.replace(CFG, fp8=FP8Config())
    program = jax.make_jaxpr(both)(models.model(plain))
    assert conversions(program.jaxpr) == 0
    # Of weights that stay in blocks there is nothing left to quantise.
    program = jax.make_jaxpr(both)(resident(models.model(CFG)))
    products = (7 + 3 * 2) * 2 + 1
    assert conversions(program.jaxpr) == products + 2 * (1 + sent)


# ------------------------------------------------------------------------------------ how it runs


@pytest.mark.slow
@pytest.mark.parametrize(
    "cfg", [QWEN2, dataclasses.replace(CFG, num_layers=2)], ids=["qwen2", "deepseek"]
)
def test_scanned_unrolled_and_computed_again_it_is_the_same(cfg):
    plain = on_one_device(cfg)[0]
    how = dataclasses.replace(cfg, remat=True, scan_unroll=2)
    path, error = worst(one_step(start(how), batch())[0].opt, plain.opt)
    assert error < FLOAT32, (path, error)


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [QWEN2, CFG], ids=["qwen2", "deepseek"])
def test_micro_batches_are_one_batch(cfg):
    """Tiles along the tokens are the same, but of the experts' rows, which are sorted anew."""
    (one, a), (more, b) = on_one_device(cfg), on_one_device(cfg, 2)
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    found = differences(more.opt, one.opt)
    routed = {path for path in found if "feed_forward']['w_" in path and cfg is CFG}
    assert max(found[path] for path in routed) < TILES if routed else True
    assert max(error for path, error in found.items() if path not in routed) < FLOAT32


def check_mesh(mesh, cfg, tolerance, kind=AxisType.Auto):
    expected, metrics = on_one_device(cfg, 2)
    with jax.set_mesh(make_mesh(mesh, axis_type=kind)):
        state = start(cfg)
        state = jax.device_put(state, specs(state))
        rows = jax.device_put(batch(2), spec(None, "batch", "length"))
        found, reported = one_step(state, rows)
    np.testing.assert_allclose(reported["loss"], metrics["loss"], rtol=1e-4)
    path, error = worst(found.opt, expected.opt)
    assert error < tolerance, (path, error)


def log_probabilities(cfg):
    """[16, 12] of the targets, each device on its own pieces if there is a mesh."""
    rows = {k: v for k, v in tiny.packed(rows=16, length=12).items() if k in INPUTS}
    lies = {name: spec("batch", "length") for name in rows}
    out = spec("batch", "length"), RouterStats(spec(), spec(None, "batch"), spec())
    model = start(cfg).model()
    run = jax.jit(lambda model, rows: local(scores, (specs(model), lies), out)(model, rows)[0][0])
    return np.asarray(run(model, rows))


@pytest.mark.slow
def test_on_eight_devices():
    """Where blocks divide the pieces, a mesh changes nothing about a pass."""
    cfg = dataclasses.replace(CFG, mtp_depth=0)
    alone = log_probabilities(cfg)
    with jax.set_mesh(make_mesh(MeshConfig(expert=2, fsdp=2, tensor=2), axis_type=AxisType.Auto)):
        np.testing.assert_allclose(log_probabilities(cfg), alone, atol=FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(fsdp=8),
        MeshConfig(expert=2, fsdp=2, tensor=2),
        MeshConfig(expert=2, context=2, tensor=2),
        MeshConfig(data=2, fsdp=2, tensor=2),
    ],
    ids=str,
)
def test_on_every_kind_of_mesh(mesh, kind):
    check_mesh(mesh, CFG, TILES, kind)


@pytest.mark.slow
def test_where_blocks_divide_the_pieces_a_mesh_changes_nothing():
    check_mesh(MeshConfig(data=2, fsdp=2, tensor=2), QWEN2, FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cfg", [CFG, QWEN2], ids=["deepseek", "qwen2"])
def test_the_sampler_sees_what_the_trainer_sees(cfg, dtype):
    """Cached steps with absorbed attention are the full pass, up to roundings that fall apart."""
    cfg = dataclasses.replace(cfg, dtype=dtype)
    model = jax.tree.map(lambda x: x / 2, models.model(cfg))
    tokens, positions, segments = models.whole_rows(models.tokens(4, 2, 9) % 14)

    @jax.jit
    def cached(model):
        prompt = prefill(model, tokens[:, :5], jnp.ones((2, 5), bool))
        own, rows = empty_cache(model, prompt, 2, 4), []
        for i in range(4):
            hidden, own = step(model, tokens[:, 5 + i], prompt, own, jnp.int32(i))
            rows.append(hidden)
        return jnp.stack(rows, 1)

    full = jax.jit(lambda m: m(tokens, positions, segments).hidden_BTD)(model)[:, 5:]
    found = cached(model)
    error = jnp.linalg.norm((found - full).astype(jnp.float32)) / jnp.linalg.norm(full)
    assert error < (1e-3 if dtype == "float32" else 3e-2), error


@pytest.mark.slow
def test_it_learns_and_moments_may_be_bfloat16():
    """The recipe with its optimizer: a batch is learnt by heart as in float32."""
    optimizer = adamw(OptimConfig(moment_dtype="bfloat16", weight_decay=0.0))
    run = functools.partial(supervised_step, optimizer=optimizer, mtp_weight=0.3)
    step_jit = jax.jit(lambda state, rows: run(state, rows, Controls(np.float32(0.01), 0.0)))
    last = []
    for cfg in (CFG, dataclasses.replace(CFG, fp8=FP8Config())):
        state = start(cfg)
        state, losses = dataclasses.replace(state, opt=optimizer.init(state.params)), []
        for _ in range(60):
            state, metrics = step_jit(state, batch())
            losses.append(float(metrics["loss"]))
        last.append(losses[-1])
        assert losses[-1] < 0.5 * losses[0]
    assert abs(last[0] / last[1] - 1) < 0.2


def test_one_field_turns_it_on():
    tree = to_config_dict(quickstart())
    tree.model.fp8.enabled = True
    on = blank(from_config_dict(RecipeConfig, tree).model)
    layers = on.moe_layers, on.mtp.block
    parts = [on.mtp, on.dense_layers.feed_forward, on.dense_layers.attention]
    parts += [part for x in layers for part in (x.attention, x.feed_forward, x.feed_forward.shared)]
    assert {part.fp8 for part in parts} == {FP8(128, False)}
    off = blank(quickstart().model)
    assert off.mtp.fp8 is off.moe_layers.feed_forward.fp8 is None


def test_bad_blocks_are_refused():
    with pytest.raises(ValueError, match="block must be positive, got 0"):
        FP8Config(enabled=True, block=0)
