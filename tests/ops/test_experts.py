# SPDX-License-Identifier: Apache-2.0
"""Three implementations of the routed experts and a loop: one result, and no token dropped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.ops import experts as module
from r1jax.ops.experts import FEW, LARGE, TILES, choose, experts, tile, tile_slots

# Sums of up to 24 float32 products of order 1, scatter-added in another order.
FLOAT32 = 5e-5
# bfloat16 keeps 8 bits; three roundings in a row on numbers up to the largest output.
BFLOAT16 = 4e-2
IMPLEMENTATIONS = ["ragged", "tiled", "looped", "dense"]
D, F = 3, 4
TILE = TILES[0]
TILED = [15 * TILE - 3, 4 * TILE + 1, 5, 10 * TILE]


# Assignments [T, K]; those of one shape share a compilation. T is no multiple of TILE.
CASES = {
    "spread": lambda rng: np.stack([rng.permutation(5)[:2] for _ in range(TILE + 3)]),
    "all_to_two": lambda rng: np.tile([4, 1], (TILE + 3, 1)),
    "one_left_out": lambda rng: np.stack([rng.permutation(4)[:2] for _ in range(TILE + 3)]) + 1,
    "one_token": lambda rng: np.array([[3, 0]]),
    # Tiles of each expert: 15, none, 5, 1 and 10, so that they go 8, 4, 2 and 1 at once.
    "blocks": lambda rng: rng.permutation(np.repeat([0, 2, 3, 4], TILED))[:, None],
}


def arguments(case, n_experts=5):
    rng = np.random.default_rng(sorted(CASES).index(case))
    index = CASES[case](rng).astype(np.int32)
    t, k = index.shape
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    e = n_experts
    return draw(t, D), index, draw(t, k), (draw(e, D, F), draw(e, D, F), draw(e, F, D))


def by_loop(x, index, weight, weights):
    x, weight, *w = (np.asarray(a, np.float64) for a in (x, weight, *weights))
    y = np.zeros_like(x)
    for t, k in np.ndindex(index.shape):
        gate, up, down = (m[index[t, k]] for m in w)
        g = x[t] @ gate
        y[t] += weight[t, k] * ((g / (1 + np.exp(-g)) * (x[t] @ up)) @ down)
    return y


def by_einsum(x, index, weight, weights):
    """The loop in jnp, for its gradients: every expert on every token, then a gather."""
    gate, up, down = weights
    h = jax.nn.silu(jnp.einsum("td,edf->tef", x, gate)) * jnp.einsum("td,edf->tef", x, up)
    every_TED = jnp.einsum("tef,efd->ted", h, down)
    return (jnp.take_along_axis(every_TED, index[..., None], axis=1) * weight[..., None]).sum(1)


@jax.jit
def values_and_gradients(x, index, weight, weights, cotangent):
    """(value, gradients) of the reference and of each implementation."""

    def one(f):
        out, back = jax.vjp(lambda x, weight, w: f(x, index, weight, w), x, weight, weights)
        return out, back(cotangent)

    return {"reference": one(by_einsum)} | {
        name: one(functools.partial(experts, implementation=name)) for name in IMPLEMENTATIONS
    }


@pytest.mark.parametrize("case", CASES)
def test_all_are_the_loop(case):
    x, index, weight, weights = arguments(case)
    cotangent = np.random.default_rng(9).normal(size=x.shape).astype(np.float32)
    found = values_and_gradients(x, index, weight, weights, cotangent)
    expected = by_loop(x, index, weight, weights)
    gradients = jax.tree.leaves(found["reference"][1])
    for name, (out, grads) in found.items():
        np.testing.assert_allclose(out, expected, rtol=FLOAT32, atol=FLOAT32, err_msg=name)
        for a, b in zip(jax.tree.leaves(grads), gradients, strict=True):
            np.testing.assert_allclose(a, b, rtol=FLOAT32, atol=FLOAT32, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_expert_that_is_not_here_adds_nothing(implementation):
    """Whatever it weighs: to the result, and to no gradient."""
    x, index, weight, weights = arguments("spread")
    here = np.random.default_rng(3).random(index.shape) < 0.7
    gone = np.where(here, index, 5).astype(np.int32)

    def run(weight, index):
        how = functools.partial(experts, implementation=implementation)
        out, back = jax.vjp(lambda *a: how(a[0], index, *a[1:]), x, weight, weights)
        return out, back(jnp.ones_like(out))

    got = jax.jit(run)(weight, gone)
    want = jax.jit(run)(jnp.where(here, weight, 0.0), index)
    d_weight = want[1][1] * here
    want = want[0], (want[1][0], d_weight, want[1][2])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=FLOAT32, atol=FLOAT32)


def test_dense_reads_weights_where_they_lie_on_a_gpu(monkeypatch):
    """The same as one wide matrix of them, gradients too, for more tokens than CPUs do it for."""
    t, e, d, f = 2 * FEW, 4, 128, LARGE // 128
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(t, d)), rng.random((t, 2))
    weights = [rng.normal(size=size) / 10 for size in ((e, d, f), (e, d, f), (e, f, d))]
    index = np.argsort(rng.random((t, e)), axis=1)[:, :2].astype(np.int32)
    x, weight, *weights = (np.float32(a) for a in (x, weight, *weights))

    def run(platform):
        monkeypatch.setattr(module.chips, "present", lambda: (platform, "any"))
        call = lambda *a: experts(a[0], index, *a[1:], implementation="dense")  # noqa: E731
        out, back = jax.vjp(call, x, weight, tuple(weights))
        return jax.tree.leaves((out, back(jnp.ones_like(out))))

    for a, b in zip(run("gpu"), run("cpu"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=FLOAT32 * float(np.abs(b).max()) * 10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dtype_follows_the_tokens(implementation):
    x, index, weight, weights = arguments("spread")
    run = jax.jit(functools.partial(experts, implementation=implementation))
    out = run(jnp.asarray(x, jnp.bfloat16), index, weight, weights)
    assert out.dtype == jnp.bfloat16
    expected = by_loop(x, index, weight, weights)
    np.testing.assert_allclose(
        out.astype(jnp.float32), expected, atol=BFLOAT16 * np.abs(expected).max()
    )


def test_choice_of_implementation():
    assert choose(2048, 2, 16, "tpu") == choose(1, 8, 256, "tpu") == "ragged"
    assert choose(1, 8, 256, "gpu") == "dense"
    assert choose(4096, 8, 256, "gpu", values=LARGE) == "tiled"  # a loop is a launch a round
    assert choose(64, 2, 8, "cpu") == "dense"  # few rows an expert
    assert choose(1, 8, 256, "cpu") == "dense"  # decoding: tiles would be empty
    assert choose(4096, 8, 256, "cpu") == "tiled"
    assert choose(4096, 8, 256, "cpu", values=LARGE - 1) == "tiled"
    assert choose(4096, 8, 256, "cpu", values=LARGE) == "looped"
    assert choose(4096, 8, 256, "tpu", values=LARGE) == "ragged"


def test_unknown_implementation():
    with pytest.raises(ValueError, match="implementation='fast'"):
        experts(*arguments("one_token"), implementation="fast")


slots_jit = jax.jit(tile_slots, static_argnums=2)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    rows=st.sampled_from([1, TILE + 1, 3 * TILE]),
    spread=st.sampled_from([0.05, 1.0]),
)
def test_tile_slots(seed, rows, spread):
    """Every row has a slot of its own, in a tile of its own expert, inside the buffer."""
    n_experts, rng = 6, np.random.default_rng(seed)
    share = rng.dirichlet(np.full(n_experts, spread))  # a small spread leaves experts empty
    expert = np.sort(rng.choice(n_experts, rows, p=share)).astype(np.int32)
    sizes = np.bincount(expert, minlength=n_experts).astype(np.int32)
    slot, of_tile = (np.asarray(a) for a in slots_jit(expert, sizes, TILE))
    assert len(set(slot.tolist())) == rows
    assert slot.min() >= 0
    assert slot.max() < len(of_tile) * TILE
    np.testing.assert_array_equal(of_tile[slot // TILE], expert)
    assert of_tile.min() >= 0
    assert of_tile.max() < n_experts


@pytest.mark.parametrize(
    ("rows_per_expert", "d", "f", "rows"),
    [(2688, 64, 32, 32), (256, 256, 128, 32), (512, 256, 128, 64), (4096, 256, 128, 128)],
)
def test_a_tile_grows_with_the_weights_it_copies_and_the_rows_there_are(
    rows_per_expert, d, f, rows
):
    assert tile(rows_per_expert, d, f) == rows


def test_large_tiles_are_the_dense_sum():
    """Weights of 256 × 128 and 600 rows an expert take tiles of 128 rows, `looped` of 64, eight and
    four at once; one expert gets none."""
    rng = np.random.default_rng(0)
    t, d, f, e = 1200, 256, 128, 4
    assert tile(t * 2 / e, d, f) == 128
    x = rng.normal(size=(t, d)).astype(np.float32)
    weights = tuple(
        jnp.asarray(rng.normal(size=s) / 16, jnp.float32) for s in ((e, d, f), (e, d, f), (e, f, d))
    )
    index = jnp.asarray([rng.permutation(3)[:2] for _ in range(t)], jnp.int32)
    share = jnp.asarray(rng.uniform(size=(t, 2)), jnp.float32)
    one, loop, other = (
        jax.jit(lambda x, how=how: experts(x, index, share, weights, implementation=how))(x)
        for how in ("tiled", "looped", "dense")
    )
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loop, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t", [1, FEW, FEW + 1])
def test_few_tokens_of_large_experts(t):
    """The weights are read where they lie up to `FEW` tokens; the result is the loop's."""
    rng = np.random.default_rng(t)
    d, f, e, k = 128, LARGE // 128, 5, 2
    draw = lambda *shape: (rng.normal(size=shape) / np.sqrt(shape[-2])).astype(np.float32)  # noqa: E731
    index = np.stack([rng.permutation(e)[:k] for _ in range(t)]).astype(np.int32)
    x, weight = rng.normal(size=(t, d)).astype(np.float32), rng.random((t, k), np.float32)
    weights = draw(e, d, f), draw(e, d, f), draw(e, f, d)
    run = functools.partial(experts, implementation="dense")
    np.testing.assert_allclose(
        jax.jit(run)(x, index, weight, weights),
        by_loop(x, index, weight, weights),
        rtol=FLOAT32,
        atol=FLOAT32,
    )

    def gradients(f):
        return jax.grad(lambda x, w: (f(x, index, weight, w) ** 2).sum(), argnums=(0, 1))(
            x, weights
        )

    got, want = gradients(run), gradients(by_einsum)
    for one, exact in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, exact, rtol=FLOAT32, atol=FLOAT32 * np.abs(exact).max())
