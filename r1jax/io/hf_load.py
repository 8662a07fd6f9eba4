# SPDX-License-Identifier: Apache-2.0
"""Weights of a Hugging Face checkpoint into (sharded) arrays, tensor by tensor and bit for bit."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r1jax.config import DenseConfig, ModelConfig
from r1jax.io.hf_names import Place, places, shared_by_mtp
from r1jax.io.shards import Source
from r1jax.nn.build import blank
from r1jax.nn.param import filled, leaves
from r1jax.ops.quant import BLOCK, BlockScaled, dequantise
from r1jax.sharding import spec

SCALE = "_scale_inv"  # of a block-scaled weight, after its name
E4M3 = np.dtype(jnp.float8_e4m3fn)
STORED_DTYPES = ("float32", "float16", "bfloat16", E4M3.name)
# Tensors that some exporters write and that are functions of the config.
DERIVED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


def load(
    source: Source,
    cfg: ModelConfig | DenseConfig,
    *,
    dtype: str = "stored",
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> nnx.Module:
    """The model of a checkpoint, its weights streamed into (sharded) arrays.

    At any time the host holds little more than one tensor beside the arrays themselves.

    Args:
        source: the checkpoint.
        cfg: its architecture, from `read_config`.
        dtype: "stored" keeps every tensor as it is, FP8 blocks as `BlockScaled`; "float32" and
            "bfloat16" convert, FP8 blocks by the block formula.
        mesh: where the arrays go, by the rules of `r1jax.sharding`; None: the default device.
        progress: called with (bytes read, bytes in all) after every tensor.

    Raises:
        ValueError: a tensor is missing, unexpected, of a wrong shape or dtype, or holds NaN or
            infinity; file and tensor are named.
    """
    shapes = source.shapes()
    _check_count(source.path, cfg, len(shapes))
    wanted = places(cfg)
    check_names(source, cfg, wanted)
    module = blank(cfg)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        arrays = {
            path: _Filling(variable, wanted_dtype, mesh)
            for path, variable, wanted_dtype in _planned(module, wanted, source, dtype)
        }
    by_name: dict[str, list[Place]] = {}
    for place in wanted:
        by_name.setdefault(place.name, []).append(place)
    total, done = sum(map(_bytes, shapes.values())), 0
    for name in (n for n in shapes if n in by_name):
        matrix = _checked(source, name)
        scale = _checked(source, name + SCALE) if matrix.dtype == E4M3 else None
        for place in by_name[name]:
            arrays[place.path].put(place, matrix, scale)
        done += _bytes(shapes[name])
        progress(done, total)
    _check_shared(source, cfg)
    return filled(module, {path: array.finish() for path, array in arrays.items()})


def _check_count(path, cfg: ModelConfig | DenseConfig, tensors: int) -> None:
    """Refuses layers and experts that so few tensors cannot be, before a table of all is made."""
    layers = cfg.num_layers
    if layers > tensors:
        raise ValueError(f"{path}: {tensors} tensors cannot be {layers} layers")
    if isinstance(cfg, DenseConfig):
        return
    experts, mixtures = cfg.moe.n_routed_experts, layers - cfg.first_k_dense
    if experts * mixtures > tensors:
        raise ValueError(
            f"{path}: {tensors} tensors cannot be {mixtures} layers of {experts} experts "
            "(n_routed_experts)"
        )


def _bytes(entry: tuple[str, tuple[int, ...]]) -> int:
    return int(np.prod(entry[1], dtype=np.int64)) * jnp.dtype(entry[0]).itemsize


def check_names(source: Source, cfg: ModelConfig | DenseConfig, wanted: Iterable[Place]) -> None:
    """Refuses a checkpoint that is not exactly this architecture, before anything is read."""
    shapes, expected, shared = source.shapes(), set(), shared_by_mtp(cfg)
    for place in wanted:
        expected.add(place.name)
        if place.name not in shapes:
            raise ValueError(f"{source.path}: the tensor {place.name} is missing")
        dtype, shape = shapes[place.name]
        where = f"{source.file_of(place.name)}: {place.name}"
        if shape != place.layout.matrix:
            raise ValueError(f"{where} has shape {shape}, the config asks {place.layout.matrix}")
        if dtype not in STORED_DTYPES:
            raise ValueError(f"{where} has the dtype {dtype}, expected one of {STORED_DTYPES}")
        if dtype == E4M3.name:
            _check_scale(source, place)
            expected.add(place.name + SCALE)
    extra = [n for n in shapes if n not in expected and not n.endswith(DERIVED) and n not in shared]
    tied = isinstance(cfg, DenseConfig) and cfg.tie_embeddings
    if tied and "lm_head.weight" in extra:  # a copy of the embedding: `_check_shared` compares
        extra.remove("lm_head.weight")
    if extra:
        raise ValueError(
            f"{source.file_of(extra[0])}: the tensor {extra[0]} has no place in this architecture"
            + (f", nor have {len(extra) - 1} more" if len(extra) > 1 else "")
        )


def _check_scale(source: Source, place: Place) -> None:
    name, shapes = place.name + SCALE, source.shapes()
    if name not in shapes:
        raise ValueError(f"{source.path}: the tensor {name} of an FP8 weight is missing")
    expected = ("float32", tuple(-(-n // BLOCK) for n in place.layout.matrix))
    if shapes[name] != expected:
        raise ValueError(f"{source.file_of(name)}: {name} is {shapes[name]}, expected {expected}")


def _check_shared(source: Source, cfg: ModelConfig | DenseConfig) -> None:
    """A tensor that repeats another must be equal to it: ours has it once."""
    pairs = shared_by_mtp(cfg)
    if isinstance(cfg, DenseConfig) and cfg.tie_embeddings:
        pairs = {"lm_head.weight": "model.embed_tokens.weight"}
    shapes = source.shapes()
    for copy, original in pairs.items():
        if copy not in shapes:
            continue
        same = shapes[copy] == shapes[original]
        if not same or not np.array_equal(_raw(source.read(copy)), _raw(source.read(original))):
            raise ValueError(
                f"{source.file_of(copy)}: {copy} differs from {original}, which it has to share"
            )


def _raw(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _checked(source: Source, name: str) -> np.ndarray:
    """One tensor without NaN or infinity."""
    array = source.read(name)
    if not _finite(array):
        raise ValueError(f"{source.file_of(name)}: {name} holds NaN or infinity")
    return array


def _finite(array: np.ndarray, chunk: int = 1 << 22) -> bool:
    """Whether all is finite, a chunk at a time; the exponent's bits tell for 8 and 16 bits."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, chunk):
        part = flat[start : start + chunk]
        if array.dtype == E4M3:
            bad = (part.view(np.uint8) & 0x7F) == 0x7F
        elif array.dtype == jnp.bfloat16:
            bad = (part.view(np.uint16) & 0x7F80) == 0x7F80
        else:
            bad = ~np.isfinite(part)
        if bad.any():
            return False
    return True


def _planned(
    module: nnx.Module, wanted: Iterable[Place], source: Source, dtype: str
) -> Iterator[tuple[str, nnx.Variable, Any]]:
    """(path, variable, the dtype it will have, or the layout of FP8 blocks) of every array."""
    shapes, stored = source.shapes(), {}
    for place in wanted:
        kinds = stored.setdefault(place.path, {})
        kinds.setdefault(shapes[place.name][0], place)
    for path, variable in leaves(module).items():
        kinds = stored[path]
        place = next(iter(kinds.values()))
        if path.endswith("router.bias") or dtype == "float32":
            yield path, variable, jnp.dtype("float32")
        elif dtype == "bfloat16":
            yield path, variable, jnp.dtype(dtype)
        elif len(kinds) > 1:
            a, b = list(kinds.items())[:2]
            raise ValueError(
                f"{source.path}: {a[1].name} is {a[0]} but {b[1].name} {b[0]}; layers are stacked, "
                "so pass --dtype bfloat16 or float32"
            )
        else:
            kind = next(iter(kinds))
            yield path, variable, place.layout if kind == E4M3.name else jnp.dtype(kind)


class _Filling:
    """An array, or a block-scaled weight, that is filled slice by slice where it lies."""

    def __init__(self, variable: nnx.Variable, kind: Any, mesh: jax.sharding.Mesh | None):
        shape = jax.tree.leaves(variable)[0].shape
        axes = variable.get_metadata("out_sharding", None) or (None,) * len(shape)
        self.layout = None if isinstance(kind, np.dtype) else kind
        if self.layout is None:
            self.values, self.scale = _Pieces(shape, kind, axes, mesh), None
            return
        lead = len(shape) - len(self.layout.shape)
        blocks = tuple(-(-n // BLOCK) for n in self.layout.matrix)
        self.values = _Pieces(shape, E4M3, axes, mesh)
        self.scale = _Pieces(
            shape[:lead] + blocks, np.dtype(np.float32), (*axes[:lead], None, None), mesh
        )

    def put(self, place: Place, matrix: np.ndarray, scale: np.ndarray | None) -> None:
        """Writes one tensor of the checkpoint into its place."""
        if self.scale is not None:
            self.scale.put(place.index, scale)
        elif scale is not None:
            matrix = dequantise(matrix, scale)
        self.values.put(place.index, place.layout.apply(matrix))

    def finish(self) -> Any:
        """The filled array."""
        if self.scale is None:
            return self.values.finish()
        return BlockScaled(self.values.finish(), self.scale.finish(), self.layout)


class _Pieces:
    """The shards of one array that this process holds, each on its device."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, axes, mesh):
        self.shape, self.dtype = shape, dtype
        if mesh is None:
            self.sharding = None
            self.pieces = [(tuple(slice(0, n) for n in shape), jnp.zeros(shape, dtype))]
            return
        self.sharding = jax.NamedSharding(mesh, fitting(spec(*axes), shape, mesh))
        places = self.sharding.addressable_devices_indices_map(shape)
        self.pieces = []
        for device, index in places.items():
            index = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True))
            local = tuple(s.stop - s.start for s in index)
            self.pieces.append((index, jnp.zeros(local, dtype, device=device)))

    def put(self, at: tuple[int, ...], part: np.ndarray) -> None:
        """Writes `part` at the leading index `at`, into every shard that holds some of it."""
        for i, (index, piece) in enumerate(self.pieces):
            lead, rest = index[: len(at)], index[len(at) :]
            if not all(s.start <= n < s.stop for n, s in zip(at, lead, strict=True)):
                continue
            local = np.ascontiguousarray(part[rest]).astype(self.dtype, copy=False)
            start = tuple(n - s.start for n, s in zip(at, lead, strict=True))
            with _alone(piece.device):
                made = _written(piece, jax.device_put(local, piece.device), start)
            self.pieces[i] = (index, made)

    def finish(self) -> jax.Array:
        """The whole array."""
        if self.sharding is None:
            return self.pieces[0][1]
        local = [piece for _, piece in self.pieces]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, local)


def _alone(device: jax.Device) -> contextlib.AbstractContextManager:
    """The mesh of one device, where a program for it is to run while a larger mesh is in force."""
    if jax.sharding.get_mesh().empty:
        return contextlib.nullcontext()
    return jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("device",)))


@functools.partial(jax.jit, donate_argnums=0)
def _written(whole: jax.Array, part: jax.Array, start: tuple[Any, ...]) -> jax.Array:
    """`whole` with `part` at the leading index `start`, in place.

    XLA:CPU converts all of a float8 array to update some of it: 3.3 s a tensor for an array of
    0.4 GB, where moving its bytes takes 3 ms.
    """
    at = (*start, *(0,) * part.ndim)
    part = part.reshape((1,) * len(start) + part.shape)
    if whole.dtype != E4M3:
        return jax.lax.dynamic_update_slice(whole, part, at)
    raw = [jax.lax.bitcast_convert_type(x, jnp.uint8) for x in (whole, part)]
    return jax.lax.bitcast_convert_type(jax.lax.dynamic_update_slice(*raw, at), E4M3)


def lies(variable: nnx.Variable, shape: tuple[int, ...], mesh: jax.sharding.Mesh | None):
    """Where a variable's array goes on a mesh, which is in force; None without."""
    if mesh is None:
        return None
    axes = variable.get_metadata("out_sharding", None) or (None,) * len(shape)
    return jax.NamedSharding(mesh, fitting(spec(*axes), shape, mesh))


def fitting(wanted: Any, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> Any:
    """The spec without the mesh axes that do not divide their dimension."""

    def fits(axis, n):
        names = (axis,) if isinstance(axis, str) else axis or ()
        return axis if n % int(np.prod([mesh.shape[a] for a in names], dtype=int)) == 0 else None

    padded = (*wanted, *(None,) * (len(shape) - len(wanted)))
    return jax.P(*(fits(axis, n) for axis, n in zip(padded, shape, strict=True)))
