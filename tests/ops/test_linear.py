# SPDX-License-Identifier: Apache-2.0
"""Linear layers in FP8 against numpy in float64; without a recipe they are an einsum."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.ops import linear as module
from r1jax.ops.attention import LatentPart, causal_mask, mla_absorbed, mla_naive
from r1jax.ops.experts import fp8_experts
from r1jax.ops.linear import FP8, gradient_rounded, linear, rounded, seen, tiled, untiled
from r1jax.ops.quant import BlockScaled, Layout, quantise
from tests.ops import fp8_reference as reference

# Float32 sums of some ten products of order 1; the operands are the same E4M3 numbers.
FLOAT32 = 2e-6
# The scale is found twice, each time within an ulp.
ULP = 3e-7
BLOCK = 4  # 4 divides few of the sizes below
RECIPES = {"plain": FP8(BLOCK, False), "power_of_two": FP8(BLOCK, True)}
EQUATIONS = {
    "one_axis": ("btd,dc->btc", (2, 3, 6), (6, 5)),
    "to_heads": ("btd,dhk->bthk", (2, 3, 8), (8, 2, 3)),
    "from_heads": ("bthv,hvd->btd", (2, 3, 2, 5), (2, 5, 4)),
    "any_lead": ("...d,df->...f", (7, 9), (9, 8)),
}


def drawn(seed, *shapes):
    """Values of very different sizes, so that a scale in the wrong place shows."""
    rng = np.random.default_rng(seed)
    spread = lambda s: rng.normal(size=s) * 4.0 ** rng.integers(-3, 4, s)  # noqa: E731
    return [jnp.asarray(spread(s), jnp.float32) for s in shapes]


def close(found, wanted, tolerance=FLOAT32):
    wanted = np.asarray(wanted, np.float64)
    found = np.asarray(found, np.float64).reshape(wanted.shape)
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert error < tolerance, error


@pytest.mark.parametrize(
    ("name", "recipe"), [*((name, "plain") for name in EQUATIONS), ("one_axis", "power_of_two")]
)
def test_value_and_gradients_are_those_of_quantised_operands(name, recipe):
    equation, x_shape, w_shape = EQUATIONS[name]
    fp8 = RECIPES[recipe]
    y_shape = np.einsum(equation, np.zeros(x_shape), np.zeros(w_shape)).shape
    x, w, dy = drawn(3, x_shape, w_shape, y_shape)

    @jax.jit
    def both(x, w, dy):
        y, back = jax.vjp(lambda x, w: linear(equation, x, w, fp8), x, w)
        return y, *back(dy)

    axes = len(x_shape) + len(w_shape) - len(y_shape)
    k = int(np.prod(w_shape[: axes // 2]))
    flat = np.asarray(x).reshape(-1, k), np.asarray(w).reshape(k, -1)
    rule = reference.Rule(BLOCK, fp8.power_of_two)
    y, dx, dw = both(x, w, dy)
    assert y.shape == y_shape
    close(y, reference.product(*flat, rule))
    dy = np.asarray(dy).reshape(len(flat[0]), -1)
    for found, wanted in zip((dx, dw), reference.gradients(*flat, dy, rule), strict=True):
        close(found, wanted)
    unquantised = flat[0].astype(np.float64) @ flat[1]
    error = np.linalg.norm(np.asarray(y).reshape(unquantised.shape) - unquantised)
    assert 1e-3 < error / np.linalg.norm(unquantised) < 6e-2  # E4M3 it is, and no more is lost


@pytest.mark.parametrize(
    ("equation", "x_shape", "w_shape"),
    [
        ("btd,dhk->bthk", (2, 3, 6), (6, 2, 2)),
        ("bthv,hvd->btd", (2, 3, 2, 4), (2, 4, 5)),
        ("...d,df->...f", (3, 6), (6, 4)),
        ("btd,df->btf", (2, 0, 6), (6, 4)),
        ("btd,df->btf", (2, 3, 0), (0, 4)),
    ],
)
def test_without_a_recipe_it_is_an_einsum(equation, x_shape, w_shape, monkeypatch):
    """Where it is written as matrices, with its gradients; elsewhere it is one as it stands."""
    x, w = drawn(0, x_shape, w_shape)
    plain = lambda x, w: jnp.einsum(equation, x, w.astype(x.dtype))  # noqa: E731
    ours = lambda x, w: linear(equation, x, w, None)  # noqa: E731
    for dtype in (jnp.float32, jnp.bfloat16):
        want, back = jax.vjp(plain, x.astype(dtype), w)
        got, ours_back = jax.vjp(ours, x.astype(dtype), w)
        for a, b in zip((got, *ours_back(want)), (want, *back(want)), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(*(np.float32(v) for v in (a, b)), rtol=1e-2, atol=1e-5)
            if dtype == jnp.float32:
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(module, "present", lambda: ("tpu", "TPU v5"))
    assert str(jax.make_jaxpr(ours)(x, w)) == str(jax.make_jaxpr(plain)(x, w))


@pytest.mark.parametrize("in_force", [True, False])
@pytest.mark.parametrize("kinds", ["explicit", "auto", "mixed"])
def test_rows_that_a_mesh_cuts_stay_where_they_are(kinds, in_force):
    """No reshape puts an axis that is cut together with another."""
    explicit, auto = jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto
    types = {"explicit": (explicit,) * 2, "auto": (auto,) * 2, "mixed": (explicit, auto)}[kinds]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=types)
    x, w = drawn(1, (2, 8, 6), (6, 2, 4))
    cut = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "data")))
    run = jax.jit(lambda x: linear("btd,dhk->bthk", x, w, None))
    with jax.set_mesh(mesh) if in_force else contextlib.nullcontext():
        compiled = run.lower(cut).compile()
        out = compiled(cut)
    assert "all-gather" not in compiled.as_text()
    assert out.sharding.spec[1] == "data"
    np.testing.assert_allclose(out, jnp.einsum("btd,dhk->bthk", x, w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("equation", ["btd,cd->btc", "btd,dc->cbt", "dbt,dc->btc", "bt,c->btc"])
def test_other_equations_are_refused(equation):
    with pytest.raises(ValueError, match="last axes of x"):
        linear(equation, jnp.ones((2, 2, 2)), jnp.ones((2, 2)), RECIPES["plain"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_rounded_stays_as_it_is(recipe):
    fp8 = RECIPES[recipe]
    x, w, dy = drawn(1, (2, 5, 7), (7, 3), (2, 5, 7))
    once, back = jax.vjp(lambda x: rounded(x, fp8), x)
    close(once, reference.tiles(np.asarray(x).reshape(-1, 7), BLOCK, fp8.power_of_two), ULP)
    np.testing.assert_allclose(rounded(once, fp8), once, rtol=ULP)
    np.testing.assert_array_equal(back(dy)[0], dy)
    one, other = (linear("btd,dc->btc", a, w, fp8) for a in (once, x))
    close(one, other)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiles_hold_what_is_rounded(recipe, dtype):
    """Also of a last tile that is not full, and of rows of nothing."""
    fp8 = RECIPES[recipe]
    x = drawn(3, (2, 5, 7))[0].astype(dtype).at[0, 1].set(0)
    tiles = tiled(x, fp8)
    assert (tiles.values.shape, tiles.scale.shape) == (x.shape, (2, 5, -(-7 // BLOCK)))
    again = untiled(tiles, fp8, x.dtype)
    assert again.dtype == x.dtype
    np.testing.assert_array_equal(again, rounded(x, fp8))
    np.testing.assert_array_equal(again[0, 1], 0)
    assert rounded(x[:, :0], fp8).shape == (2, 0, 7)


def test_a_gradient_is_rounded_on_its_way_back():
    fp8 = RECIPES["plain"]
    y, given = drawn(4, (3, 7), (3, 7))
    out, back = jax.vjp(lambda y: gradient_rounded(y, fp8), y)
    np.testing.assert_array_equal(out, y)
    np.testing.assert_array_equal(back(given)[0], rounded(given, fp8))


def test_weights_as_their_products_see_them():
    (w,) = drawn(2, (6, 2, 3))
    flat = np.asarray(w).reshape(6, 6)
    close(seen(w, RECIPES["plain"]), reference.blocks(flat, BLOCK), ULP)
    flat = np.asarray(w).reshape(12, 3)
    close(seen(w, RECIPES["plain"], axes=2), reference.blocks(flat, BLOCK), ULP)
    assert seen(w, None) is w


def test_blocks_of_a_checkpoint_are_found_again():
    """Dequantised to float32 or bfloat16, a stored weight is quantised to the same E4M3 values."""
    (w_OI,) = drawn(5, (300, 200))
    values, scale = quantise(np.asarray(w_OI))
    stored = BlockScaled(jnp.asarray(values.T), jnp.asarray(scale), Layout((300, 200)))
    fp8, exact = FP8(128, False), np.asarray(stored.astype(jnp.float32))
    for dtype, tolerance in ((jnp.float32, ULP), (jnp.bfloat16, 2.0**-8)):
        again = np.asarray(seen(stored.astype(dtype).astype(jnp.float32), fp8))
        np.testing.assert_allclose(again, exact, rtol=tolerance)


# --------------------------------------------------------------------------------------- experts

D, F, EXPERTS = 6, 5, 4
CASES = {
    "spread": np.stack([np.random.default_rng(i).permutation(EXPERTS)[:2] for i in range(9)]),
    "all_to_one": np.tile([2, 0], (9, 1)),
    "some_elsewhere": np.array([[0, 4], [4, 4], [3, 1], [4, 3], [1, 4], [4, 4]]),
}


def by_rows(x, index, weight, weights, dy):
    """Value and gradients of the experts: sorted rows, each product quantised as numpy does it."""
    (t, k), rule = index.shape, reference.Rule(BLOCK)
    flat = index.reshape(-1)
    order = np.argsort(flat, kind="stable")
    sizes = np.bincount(flat, minlength=EXPERTS + 1)[:EXPERTS]
    rows, share = x[order // k], weight.reshape(-1)[order][:, None]
    gate_w, up_w, down_w = weights
    gate, up = (reference.grouped(rows, w, sizes, rule) for w in (gate_w, up_w))
    silu = gate / (1 + np.exp(-gate))
    h = silu * up * share
    y, out = np.zeros(x.shape), reference.grouped(h, down_w, sizes, rule)
    np.add.at(y, order // k, out)
    dh, d_down = reference.grouped_gradients(h, down_w, sizes, dy[order // k], rule)
    slope = 1 / (1 + np.exp(-gate))
    d_gate_rows = dh * share * up * slope * (1 + gate * (1 - slope))
    d_up_rows = dh * share * silu
    one, d_gate = reference.grouped_gradients(rows, gate_w, sizes, d_gate_rows, rule)
    two, d_up = reference.grouped_gradients(rows, up_w, sizes, d_up_rows, rule)
    dx = np.zeros(x.shape)
    np.add.at(dx, order // k, one + two)
    d_weight = np.zeros(t * k)
    d_weight[order] = (dh * silu * up).sum(1)
    return y, dx, d_weight.reshape(t, k), (d_gate, d_up, d_down)


@jax.jit
def experts_and_gradients(x, index, weight, weights, dy):
    run = lambda x, weight, w: fp8_experts(x, index, weight, w, fp8=RECIPES["plain"])  # noqa: E731
    y, back = jax.vjp(run, x, weight, weights)
    return y, *back(dy)


@pytest.mark.parametrize("case", CASES)
def test_experts_are_those_of_quantised_rows(case):
    index = CASES[case].astype(np.int32)
    t, k = index.shape
    e = EXPERTS
    x, weight, dy, *weights = drawn(7, (t, D), (t, k), (t, D), (e, D, F), (e, D, F), (e, F, D))
    x, weights = x / 8, [w / 8 for w in weights]  # SiLU is neither linear nor zero there
    found = experts_and_gradients(x, index, weight, tuple(weights), dy)
    arrays = [np.asarray(a, np.float64) for a in (x, weight, dy)]
    flat = [np.asarray(w, np.float64) for w in weights]
    wanted = by_rows(arrays[0], index, arrays[1], flat, arrays[2])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        close(a, b, 10 * FLOAT32)  # three products in a row


# ------------------------------------------------------------------------------------- attention


def test_absorbed_attention_sees_what_the_up_projections_see():
    """With rounded latents and the weights as their products see them, decoding is training."""
    fp8, (b, t, h) = RECIPES["plain"], (2, 5, 2)
    q, r, c, k, uk, uv = drawn(
        11, (b, t, h, 3), (b, t, h, 2), (b, t, 6), (b, t, 2), (6, h, 3), (6, h, 4)
    )
    q, r, k = q / 16, r / 16, k / 16  # logits of order 1
    mask = causal_mask(jnp.ones((b, t), jnp.int32))
    part = LatentPart(rounded(c / 4, fp8), k, mask)
    naive = mla_naive(q, r, part, uk, uv, scale=0.2, fp8=fp8)
    ups = (seen(uk, fp8), seen(uv, fp8))
    close(mla_absorbed(q, r, (part,), *ups, scale=0.2), naive, 1e-5)
    unlike = mla_absorbed(q, r, (part,), uk, uv, scale=0.2)
    assert np.abs(unlike - naive).max() / np.abs(naive).max() > 1e-3
