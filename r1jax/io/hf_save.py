# SPDX-License-Identifier: Apache-2.0
"""The tensors of a Hugging Face checkpoint out of our tree: what `io.hf_load` reads."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from r1jax.config import DenseConfig, ModelConfig
from r1jax.io.hf_load import SCALE
from r1jax.io.hf_names import Place, places, shared_by_mtp
from r1jax.nn.param import leaves
from r1jax.ops.quant import BlockScaled, dequantise, quantise


def tensors(
    module: nnx.Module,
    cfg: ModelConfig | DenseConfig,
    *,
    dtype: str = "stored",
    keep: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of the checkpoint of a model, one by one, in the order of its layers.

    Args:
        module: the model.
        cfg: its architecture.
        dtype: "stored" writes what the arrays hold, FP8 blocks with their own scales; "bf16" and
            "float32" convert; "fp8" writes projections as E4M3 blocks, the rest as bfloat16.
        keep: whether a tensor of a name is wanted at all.
    """
    values = {path: variable.get_value() for path, variable in leaves(module).items()}
    by_name: dict[str, list[Place]] = {}
    for place in places(cfg):
        by_name.setdefault(place.name, []).append(place)
    copies = {original: copy for copy, original in shared_by_mtp(cfg).items()}
    repeated: list[tuple[str, str]] = []
    for name, parts in by_name.items():
        parts = sorted(parts, key=lambda p: p.layout.part or (0, 0))
        if keep(name):
            yield from _one(name, parts, values, dtype)
        if name in copies and keep(copies[name]):
            repeated.append((copies[name], name))
    for copy, original in repeated:
        for _, array in _one(original, by_name[original], values, dtype):
            yield copy, array


def _one(name: str, parts: list[Place], values: Mapping[str, Any], dtype: str):
    """A tensor of the checkpoint, and its scales if it has any."""
    held = [values[p.path] for p in parts]
    layout = parts[0].layout
    scaled = isinstance(held[0], BlockScaled)
    arrays = [
        np.asarray((x.values if scaled else x)[p.index]) for x, p in zip(held, parts, strict=True)
    ]
    matrix = layout.joined(arrays)
    if scaled:
        scale = np.asarray(held[0].scale[parts[0].index])
        if dtype in ("stored", "fp8"):
            yield name, matrix
            yield name + SCALE, scale
            return
        matrix = dequantise(matrix, scale)
    if dtype == "fp8" and is_projection(name):
        quantised, scale = quantise(matrix)
        yield name, quantised
        yield name + SCALE, scale
    elif dtype == "stored" or name.endswith("e_score_correction_bias"):
        yield name, matrix
    else:
        yield name, matrix.astype(jnp.float32 if dtype == "float32" else jnp.bfloat16)


def is_projection(name: str) -> bool:
    """Whether DeepSeek's FP8 checkpoints hold this tensor in FP8: every Linear of a layer."""
    return name.endswith(("proj.weight", "proj_with_mqa.weight"))
