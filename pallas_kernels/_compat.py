# SPDX-License-Identifier: Apache-2.0
"""What differs between JAX 0.10.2 and 0.12, with version and reason.

- `plgpu.CompilerParams.lowering_semantics`: the default went from `Lane` (0.10) to `Warpgroup`
  (0.12). Our kernels are written for `Lane`, so it is always named.
- `plgpu.InterpretGPUParams` (simulation of Mosaic GPU on CPU) is only in 0.12.
- `plgpu.transpose_ref(ref, axes)` of 0.10 is `ref.transpose(axes)` in 0.12.
- `plgpu.load(ref, index, layout=)` of 0.10 is `plgpu.load(ref, layout=)` in 0.12.
"""

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu


def gpu_compiler_params(**fields: Any) -> Any:
    """`plgpu.CompilerParams` with the meaning that 0.10.2 gives it."""
    return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, **fields)


def gpu_interpret_params() -> Any | None:
    """Parameters that run a Mosaic GPU kernel on CPU; None where JAX cannot."""
    make = vars(plgpu).get("InterpretGPUParams")
    return make() if make else None


def transposed(ref: Any) -> Any:
    """A matrix in shared memory with its axes swapped, for `wgmma` (a function until 0.11)."""
    function = vars(plgpu).get("transpose_ref")
    return function(ref, (1, 0)) if function else ref.transpose((1, 0))


def load(ref: Any, layout: Any) -> Any:
    """All of a shared-memory ref into registers of a layout (0.10 wants an index before it)."""
    index = ((),) if "transpose_ref" in vars(plgpu) else ()
    return plgpu.load(ref, *index, layout=layout)
