# SPDX-License-Identifier: Apache-2.0
"""Tokens' rows summed up: the same on a CPU, where they are not written first, and elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.ops import deal


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("t", "k", "n", "size"), [(7, 2, 5, 14), (7, 3, 4, 9), (4, 0, 2, 5), (1, 2, 3, 4)]
)
def test_sums_of_a_tokens_rows(t, k, n, size, dtype, platform, monkeypatch):
    """Rows that found no room, and tokens without a bin, add nothing."""
    monkeypatch.setattr(deal, "present", lambda: (platform, "any"))
    rng = np.random.default_rng(t + k)
    where = deal.slots(jnp.asarray(rng.integers(0, n + 1, (t, k)), jnp.int32), n, size)
    x = jnp.asarray(rng.normal(size=(size, 3)), dtype)
    got, back = jax.vjp(lambda x: deal.summed(x, where), x)
    want = np.zeros((t, 3), np.float32)
    for i, j in np.ndindex(t, k):
        if where.slot_TK[i, j] < size:
            want[i] += np.float32(x[where.slot_TK[i, j]])
    assert got.dtype == dtype
    np.testing.assert_allclose(np.float32(got), np.float32(want.astype(dtype)), rtol=1e-6)
    given = np.arange(3.0 * t).reshape(t, 3)
    used = np.asarray(where.token_S)
    rows = [given[token] if token < t else np.zeros(3) for token in used]
    np.testing.assert_array_equal(np.float32(back(jnp.asarray(given, dtype))[0]), rows)
