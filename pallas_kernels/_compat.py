# SPDX-License-Identifier: Apache-2.0
"""What differs between JAX 0.10.2 and 0.12, with version and reason.

- `plgpu.CompilerParams.lowering_semantics`: the default went from `Lane` (0.10) to `Warpgroup`
  (0.12). Our kernels are written for `Lane`, so it is always named.
- `plgpu.InterpretGPUParams` (simulation of Mosaic GPU on CPU) is only in 0.12.
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
