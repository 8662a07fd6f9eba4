# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding against complex multiplication, and YaRN against numbers worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.ops import rope
from r1jax.ops.rope import (
    inverse_frequencies,
    llama3_frequencies,
    rotate_half,
    rotate_interleaved,
    rotation,
    yarn_frequencies,
    yarn_mscale,
)

# One float32 rotation of numbers of order 1.
FLOAT32 = 2e-6
# A float32 angle of up to 600 radians carries 3e-5 of rounding into its sine.
ANGLE = 1e-4
# The YaRN frequencies are made in float64 and rounded once.
ROUNDED = 1e-7
DIM = 8
V3 = dict(factor=40.0, original_max_position=4096, beta_fast=32.0, beta_slow=1.0)


def test_interleaved_is_complex_multiplication():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, DIM)).astype(np.float32)
    positions = np.array([[0, 1, 7], [3, 3, 90]])
    inv = inverse_frequencies(DIM, 10_000.0)
    out = np.asarray(rotate_interleaved(x, *rotation(positions, inv)))
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * positions[..., None] * inv)
    np.testing.assert_allclose(out[..., 0::2], z.real, atol=FLOAT32 * 10, rtol=FLOAT32)
    np.testing.assert_allclose(out[..., 1::2], z.imag, atol=FLOAT32 * 10, rtol=FLOAT32)


def test_the_two_layouts_differ_by_a_permutation():
    """Putting the even places first turns the interleaved layout into the layout of halves."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(5, DIM)).astype(np.float32)
    turn = rotation(jnp.arange(5), inverse_frequencies(DIM, 10_000.0))
    evens_first = np.r_[0:DIM:2, 1:DIM:2]
    a = np.asarray(rotate_interleaved(x, *turn))[:, evens_first]
    b = np.asarray(rotate_half(x[:, evens_first], *turn))
    np.testing.assert_allclose(a, b, atol=FLOAT32)
    assert np.abs(a - np.asarray(rotate_half(x, *turn))[:, evens_first]).max() > 0.1


@pytest.mark.parametrize("rotate", [rotate_interleaved, rotate_half])
@given(q_at=st.integers(0, 300), k_at=st.integers(0, 300), shift=st.integers(1, 300))
def test_scores_depend_on_the_distance_only(rotate, q_at, k_at, shift):
    rng = np.random.default_rng(2)
    q, k = rng.normal(size=(2, DIM)).astype(np.float32)
    inv = inverse_frequencies(DIM, 10_000.0)

    def score(m, n):
        turn = rotation(np.array([m, n]), inv)
        both = np.asarray(rotate(np.stack([q, k]), *turn))
        return both[0] @ both[1]

    assert abs(score(q_at, k_at) - score(q_at + shift, k_at + shift)) < ANGLE * DIM
    np.testing.assert_allclose(score(q_at, q_at), q @ k, atol=ANGLE)


@pytest.mark.parametrize("rotate", [rotate_interleaved, rotate_half])
def test_a_rotation_keeps_lengths_and_position_zero(rotate):
    x = np.random.default_rng(3).normal(size=(4, DIM)).astype(np.float32)
    out = np.asarray(
        rotate(x, *rotation(jnp.array([0, 1, 10, 100]), inverse_frequencies(DIM, 100.0)))
    )
    np.testing.assert_array_equal(out[0], x[0])
    np.testing.assert_allclose((out**2).sum(-1), (x**2).sum(-1), rtol=FLOAT32)
    assert np.abs(out[1:] - x[1:]).max() > 0.1


def test_rotation_keeps_the_dtype_and_turns_in_float32():
    x = jnp.ones((1, DIM), jnp.bfloat16)
    cos, sin = rotation(jnp.array([4097]), inverse_frequencies(DIM, 10_000.0), scale=2.0)
    assert cos.dtype == sin.dtype == jnp.float32  # 4097 is no bfloat16 number
    np.testing.assert_allclose(cos**2 + sin**2, 4.0, rtol=FLOAT32)
    np.testing.assert_allclose(cos[0, 0], 2.0 * math.cos(4097.0), atol=ANGLE)
    assert rotate_interleaved(x, cos, sin).dtype == jnp.bfloat16


def test_plain_frequencies_by_hand():
    np.testing.assert_allclose(
        inverse_frequencies(8, 10_000.0), [1.0, 0.1, 0.01, 0.001], rtol=ROUNDED
    )


def test_yarn_of_deepseek_v3_by_hand():
    """dim 64, theta 1e4: 32 turns in 4096 fall at pair 10.47, one turn at 22.51, so the pairs up to
    ⌊10.47⌋ = 10 are kept, those from ⌈22.51⌉ = 23 on are slowed 40 times, linearly between."""
    plain = inverse_frequencies(64, 10_000.0)
    ratio = yarn_frequencies(64, 10_000.0, **V3) / plain
    np.testing.assert_allclose(ratio[:11], 1.0, rtol=ROUNDED)
    np.testing.assert_allclose(ratio[23:], 1 / 40, rtol=2 * ROUNDED)
    between = 1 - (np.arange(11, 23) - 10) / 13 * (1 - 1 / 40)
    np.testing.assert_allclose(ratio[11:23], between, rtol=3 * ROUNDED)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones():
    """The definition, in turns: λ = 2π/θ, a pair turns L/λ times within the original context."""
    length = V3["original_max_position"]
    for dim, theta in ((64, 10_000.0), (128, 1e6), (32, 500.0)):
        plain = inverse_frequencies(dim, theta)
        ratio = yarn_frequencies(dim, theta, **V3) / plain
        turns = length * plain / (2 * math.pi)
        assert np.all(ratio[turns > V3["beta_fast"]] > 1 - 1 / 4)  # at most one pair of rounding
        np.testing.assert_allclose(ratio[turns > 2 * V3["beta_fast"]], 1.0, rtol=ROUNDED)
        np.testing.assert_allclose(ratio[turns < 0.5 * V3["beta_slow"]], 1 / 40, rtol=3 * ROUNDED)
        assert np.all(np.diff(ratio) <= ROUNDED)


def test_yarn_with_equal_betas_is_finite():
    same = yarn_frequencies(
        8, 10_000.0, factor=4.0, original_max_position=4096, beta_fast=1.0, beta_slow=1.0
    )
    assert np.all(np.isfinite(same))


def test_llama3_by_hand():
    """Context 2π·64: a pair of frequency θ turns 64·θ times; 16 and 4 turns bound the blend."""
    inv = inverse_frequencies(8, 10_000.0)  # 1, 0.1, 0.01, 0.001: 64, 6.4, 0.64 and 0.064 turns
    kept = dict(original_max_position=2 * math.pi * 64, low_freq_factor=4.0, high_freq_factor=16.0)
    out = llama3_frequencies(8, 10_000.0, factor=8.0, **kept)
    blend = (6.4 - 4) / (16 - 4)
    ratio = [1.0, blend + (1 - blend) / 8, 1 / 8, 1 / 8]
    np.testing.assert_allclose(out / inv, ratio, rtol=ROUNDED)


def test_mscale():
    assert yarn_mscale(40.0, 1.0) == pytest.approx(0.1 * math.log(40) + 1)
    assert yarn_mscale(40.0, 1.0) == pytest.approx(1.3688879454)
    assert yarn_mscale(40.0, 0.707) == pytest.approx(1.2608037774, abs=1e-9)
    assert yarn_mscale(1.0, 1.0) == 1.0


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 3, 8)])
def test_halves_turn_alike_on_every_platform(shape, monkeypatch):
    x, angle = (jax.random.normal(jax.random.key(i), n) for i, n in enumerate((shape, (5, 4))))
    angle = angle if len(shape) == 2 else angle[:, None]
    got = []
    for platform in ("cpu", "tpu"):
        monkeypatch.setattr(rope, "present", lambda platform=platform: (platform, "any"))
        got.append(rotate_half(x, jnp.cos(angle), jnp.sin(angle)))
    np.testing.assert_allclose(*got, rtol=FLOAT32, atol=FLOAT32)
