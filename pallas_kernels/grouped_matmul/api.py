# SPDX-License-Identifier: Apache-2.0
"""Dropless matmul of ragged groups: the experts' products without capacity or padding.

Rows sorted by expert, group_sizes[e] of them for expert e, any number and none:

    y_m = x_m w_{e(m)}          dx_m = dy_m w_{e(m)}ᵀ          dw_e = Σ_{m of e} x_mᵀ dy_m

With few rows, as in decoding, only the experts that have rows are read.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch, groups
from pallas_kernels.dispatch import Backend, Implementation
from pallas_kernels.grouped_matmul import ref

DTYPES = ("bfloat16", "float32")


def grouped_matmul(
    x_MK: jax.Array,
    w_EKN: jax.Array,
    group_sizes_E: jax.Array,
    *,
    tail: bool = False,
    implementation: Implementation = None,
) -> jax.Array:
    """y_m = x_m w of its group.

    Args:
        x_MK: [M, K] bfloat16 or float32, rows sorted by group.
        w_EKN: [E, K, N] of the same dtype.
        group_sizes_E: [E] integers.
        tail: rows after the last group may be left over. They give zeros and no gradient, whatever
            stands there. Under jit the sizes are not known and not checked.
        implementation: see `pallas_kernels.dispatch`.

    Returns:
        [M, N] in x's dtype, summed in float32. Differentiable in x and w.

    Raises:
        ValueError: dtypes; shapes that do not fit; sizes that do not sum to M.
        Unsupported: the named implementation cannot.
    """
    _check_dtypes(x_MK, w_EKN)
    if x_MK.ndim != 2 or w_EKN.ndim != 3 or x_MK.shape[1] != w_EKN.shape[1]:
        raise ValueError(f"x {x_MK.shape} and w {w_EKN.shape}: expected [M, K] and [E, K, N]")
    groups.check(group_sizes_E, len(x_MK), len(w_EKN), tail=tail)
    if not len(x_MK):
        return jnp.zeros((0, w_EKN.shape[2]), x_MK.dtype)
    return _matmul(implementation, *dispatch.varying_alike(x_MK, w_EKN, group_sizes_E))


def grouped_outer(
    x_MK: jax.Array,
    dy_MN: jax.Array,
    group_sizes_E: jax.Array,
    *,
    tail: bool = False,
    dtype: Any = jnp.float32,
    implementation: Implementation = None,
) -> jax.Array:
    """dw_e = xᵀ dy over the rows of group e, zeros for a group without rows.

    Args and Raises: as `grouped_matmul`, with dy_MN [M, N]. Not differentiable.

    Returns:
        [E, K, N] of `dtype`, summed in float32.
    """
    _check_dtypes(x_MK, dy_MN)
    if x_MK.ndim != 2 or dy_MN.ndim != 2 or len(x_MK) != len(dy_MN):
        raise ValueError(f"x {x_MK.shape} and dy {dy_MN.shape}: expected [M, K] and [M, N]")
    groups.check(group_sizes_E, len(x_MK), len(group_sizes_E), tail=tail)
    if not len(x_MK):
        return jnp.zeros((len(group_sizes_E), x_MK.shape[1], dy_MN.shape[1]), dtype)
    return dispatch.run(
        implementation,
        lambda b: _module(b).outer(x_MK, dy_MN, group_sizes_E, dtype=jnp.dtype(dtype), backend=b),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(implementation, x_MK, w_EKN, sizes_E):
    return _product(implementation, x_MK, w_EKN, sizes_E, transposed=False)


def _product(implementation, x, w, sizes, *, transposed):
    return dispatch.run(
        implementation,
        lambda b: _module(b).matmul(x, w, sizes, transposed=transposed, dtype=x.dtype, backend=b),
    )


def _forward(implementation, x_MK, w_EKN, sizes_E):
    return _matmul(implementation, x_MK, w_EKN, sizes_E), (x_MK, w_EKN, sizes_E)


def _backward(implementation, kept, dy_MN):
    x_MK, w_EKN, sizes_E = kept
    dx_MK = _product(implementation, dy_MN, w_EKN, sizes_E, transposed=True)
    dw_EKN = grouped_outer(
        x_MK, dy_MN, sizes_E, tail=True, dtype=w_EKN.dtype, implementation=implementation
    )
    return dx_MK, dw_EKN, np.zeros(sizes_E.shape, jax.dtypes.float0)


_matmul.defvjp(_forward, _backward)


def _module(backend: Backend) -> Any:
    """The kernels' module costs most of half a second to import: only who runs it pays."""
    if backend.name == "tpu":
        from pallas_kernels.grouped_matmul import tpu

        return tpu
    if backend.name == "gpu":
        raise dispatch.Unsupported("grouped_matmul has no GPU kernel of its own; use 'xla'")
    return ref


def _check_dtypes(x, w):
    dispatch.check_dtype("x", x.dtype, DTYPES)
    if x.dtype != w.dtype:
        raise ValueError(
            f"x {x.shape} is {x.dtype} but w {w.shape} is {w.dtype}: expected one dtype"
        )
