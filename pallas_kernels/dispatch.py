# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: chosen by the device, or named and then never replaced silently.

Every public function of the package takes `implementation`:

    None      the device's own kernel where it can, else "xla": the only choice that falls back. The
              device is the mesh's in force, which need not be there, or the default one; on a mesh
              whose arrays XLA partitions it is "xla", for it cannot partition a kernel
    "xla"     the op's `ref.py`, plain jnp: any device, any block size
    "tpu"     Mosaic kernels, on a TPU
    "gpu"     Mosaic GPU kernels, on Hopper
    Backend   the same names with what the running device cannot tell: the chip compiled for
              (ahead of time, `Backend("tpu", chip="v5p")`), or simulation on CPU
              (`Backend("tpu", chip="v5p", interpret=True)`)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax

from pallas_kernels import chips

T = TypeVar("T")
Name = Literal["xla", "tpu", "gpu"]
NAMES = ("xla", "tpu", "gpu")


class Unsupported(RuntimeError):
    """A backend cannot do what was asked; the message says what and what can.

    Raised while tracing, before anything is compiled.
    """


@dataclass(frozen=True)
class Backend:
    """An implementation and the chip it is made for: static under `jit`.

    Attributes:
        name: "xla", "tpu" or "gpu".
        chip: a name of `chips.CHIPS`.
        interpret: run the kernel's simulation on CPU. For tests: hundreds of times slower.
        tiles: of the one kernel that the call runs, in its op's own order; None: `tuning` chooses.
        explicit: False where the device chose: what `run` may replace by "xla".
    """

    name: Name
    chip: str
    interpret: bool = False
    tiles: tuple[int, ...] | None = None
    explicit: bool = True

    def __post_init__(self):
        if self.name not in NAMES:
            raise ValueError(f"implementation {self.name!r} must be one of {NAMES} or None")
        if self.chip not in chips.CHIPS:
            raise ValueError(f"chip {self.chip!r} must be one of {tuple(chips.CHIPS)}")

    @property
    def device(self) -> chips.Chip:
        """The chip's numbers."""
        return chips.CHIPS[self.chip]


Implementation = Backend | Name | None


def resolve(implementation: Implementation) -> Backend:
    """The backend that an argument `implementation` names on this device.

    Raises:
        ValueError: a name that is none.
        Unsupported: a kernel's name on a device that cannot run it.
    """
    if isinstance(implementation, Backend):
        return implementation
    if implementation not in (None, *NAMES):
        raise ValueError(f"{implementation=} must be one of {NAMES}, a Backend or None")
    platform, kind = chips.present()
    chip = chips.named(kind)
    if implementation is None:
        mesh = jax.sharding.get_abstract_mesh()
        own = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}.get(platform)
        whole = mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual
        name = own if own and chip and whole else "xla"
        return Backend(name, (chip or chips.CPU).name, explicit=False)
    if implementation == "xla":
        return Backend("xla", (chip or chips.CPU).name)
    wanted = ("tpu",) if implementation == "tpu" else ("gpu", "cuda")
    if platform not in wanted or chip is None:
        raise Unsupported(
            f"{implementation=} needs {'a TPU' if implementation == 'tpu' else 'a Hopper GPU'} but "
            f"JAX's first device is {kind!r} ({platform}); use 'xla', or Backend("
            f"{implementation!r}, chip=…) to compile for another chip or to simulate"
        )
    return Backend(implementation, chip.name)


def run(implementation: Implementation, call: Callable[[Backend], T]) -> T:
    """`call(backend)`; where the device chose and its kernel is Unsupported, `call` of "xla"."""
    backend = resolve(implementation)
    try:
        return call(backend)
    except Unsupported:
        if backend.explicit:
            raise
        return call(Backend("xla", backend.chip))


def check_dtype(name: str, dtype: Any, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless the dtype's name is one of `allowed`."""
    if dtype.name not in allowed:
        raise ValueError(f"{name} has dtype {dtype.name}, expected one of {', '.join(allowed)}")


def varying_alike(*operands: Any) -> tuple[Any, ...]:
    """Pytrees of arrays, each array varying over all the mesh axes that one of them varies over.

    Inside `jax.shard_map` a weight is often the same on all devices while rows are not. Its
    gradient is then a sum over the devices: the transpose of this cast, which JAX adds by itself,
    where a custom VJP would have to.
    """
    over = frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(operands)))

    def one(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(over - jax.typeof(x).mat.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, operands)


def without_derivative(call: Callable[..., T], instead: str) -> Callable[..., T]:
    """`run(implementation, call)` as a function (implementation, *arrays) that refuses to be
    differentiated and names the op that can be."""

    def outer(implementation: Implementation, *arrays: Any) -> T:
        @jax.custom_vjp
        def inner(*arrays):
            return run(implementation, lambda backend: call(backend, *arrays))

        def refuse(*_):
            raise ValueError(f"quantised operands have no derivative: differentiate {instead}")

        inner.defvjp(refuse, refuse)
        return inner(*arrays)

    return outer
