# SPDX-License-Identifier: Apache-2.0
"""Times of the ops beside what the chip could do and what XLA does.

    python -m pallas_kernels.bench [--op fp8_matmul] [--shape v3-dense-up] [--device tpu] [--json]
    python -m pallas_kernels.bench tune --op fp8_matmul --shape v3-dense-up

The first prints for each op and shape: time, TFLOP/s or GB/s, the share of the roofline bound
max(FLOPs / peak, bytes / bandwidth) that was reached, XLA's own time for the same result in
bfloat16, and the relative error against float64 of a corner of the result. The second measures the
tiles of a TPU's or GPU's kernel and writes the best into `tuned/<chip>.json`, which `tuning` reads.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.errors import JaxRuntimeError

from pallas_kernels import cases, chips, dispatch, tuning
from pallas_kernels.dispatch import Backend, Unsupported

REPEATS = 10
QUEUED = 10  # calls at a time on an accelerator: the host's own work for one hides behind another


def seconds(call: Callable, arrays: tuple, repeats: int) -> float:
    """Median time of a call after one that compiles."""
    jax.block_until_ready(call(*arrays))
    queued = 1 if chips.present()[0] == "cpu" else QUEUED
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(queued):
            made = call(*arrays)
        jax.block_until_ready(made)
        taken.append((time.perf_counter() - began) / queued)
    return statistics.median(taken)


def measure(op: str, shape: str, implementation: str | None, repeats: int) -> dict[str, Any]:
    """One row of the table; "unsupported" says why it has no figures."""
    named, make = cases.OPS[op]
    backend = dispatch.resolve(implementation)
    row = dict(op=op, shape=shape, device=chips.present()[1], implementation=backend.name)
    try:
        case = make(named[shape])
        call = jax.jit(case.call(implementation))
        got = cases.corner(call(*case.arrays))
        took = seconds(call, case.arrays, repeats)
    except (Unsupported, JaxRuntimeError) as reason:  # no memory for it, say
        return {**row, "unsupported": _first_line(reason)}
    bound = max(case.flops / backend.device.peak(case.bits), case.traffic / backend.device.hbm)
    error = np.linalg.norm(got - case.truth[: len(got), : got.shape[1]])
    return {
        **row,
        "ms": took * 1e3,
        "tflops": case.flops / took / 1e12,
        "gb_s": case.traffic / took / 1e9,
        "of_bound": bound / took,
        "xla_ms": _by_xla(case, repeats),
        "error": float(error / np.linalg.norm(case.truth)),
    }


def _by_xla(case: cases.Case, repeats: int) -> float | None:
    """Milliseconds; None where XLA cannot, for want of memory."""
    try:
        return seconds(jax.jit(case.xla), case.xla_arrays, repeats) * 1e3
    except JaxRuntimeError as reason:
        print(f"XLA's own: {_first_line(reason)}", file=sys.stderr)
        return None


def _first_line(reason: Exception) -> str:
    return next(iter(str(reason).splitlines()), type(reason).__name__)


def tune(op: str, shape: str, backend: Backend, repeats: int) -> tuple[tuning.Tiles, float]:
    """(tiles, seconds) of the fastest candidate, which is written to the chip's table.

    Raises:
        Unsupported: the op has no tiles to choose, or none of them fits the chip.
    """
    named, make = cases.OPS[op]
    case = make(named[shape])
    if (choices := case.gpu_tiles if backend.name == "gpu" else case.tiles) is None:
        raise Unsupported(f"{op} has no tiles to choose on a GPU")
    name, dims, candidates = choices
    best: tuple[float, tuning.Tiles] | None = None
    for tiles in candidates:
        one = Backend(backend.name, backend.chip, interpret=backend.interpret, tiles=tiles)
        try:
            took = seconds(jax.jit(case.call(one)), case.arrays, repeats)
        except (Unsupported, ValueError, JaxRuntimeError) as reason:
            print(f"{tiles}: {_first_line(reason)}", file=sys.stderr)
            continue
        print(f"{tiles}: {took * 1e3:.3f} ms", file=sys.stderr)
        best = min(best or (took, tiles), (took, tiles))
    if best is None:
        raise Unsupported(f"{op} at {shape}: none of {len(candidates)} choices of tiles runs")
    tuning.write(backend.chip, name, dims, best[1])
    return best[1], best[0]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned columns."""
    head = ("op", "shape", "impl", "ms", "TFLOP/s", "GB/s", "of bound", "XLA ms", "error")
    lines = [head]
    for row in rows:
        start = (row["op"], row["shape"], row["implementation"])
        if "unsupported" in row:
            lines.append((*start, row["unsupported"], *[""] * 5))
            continue
        rate = f"{row['tflops']:.3g}" if row["tflops"] else "-"
        times = f"{row['ms']:.3f}", rate, f"{row['gb_s']:.3g}", f"{row['of_bound']:.1%}"
        xla = "-" if row["xla_ms"] is None else f"{row['xla_ms']:.3f}"
        lines.append((*start, *times, xla, f"{row['error']:.1e}"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    pad = lambda line: "  ".join(v.ljust(w) for v, w in zip(line, widths, strict=True))  # noqa: E731
    return "\n".join(pad(line).rstrip() for line in lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("verb", nargs="?", choices=["bench", "tune"], default="bench")
    made.add_argument("--op", action="append", choices=list(cases.OPS), help="default: all")
    made.add_argument("--shape", action="append", help="names of pallas_kernels.shapes")
    made.add_argument("--device", help="cpu, tpu or gpu; default: JAX's")
    made.add_argument("--implementation", choices=dispatch.NAMES, help="default: the device's")
    made.add_argument("--repeats", type=int, default=REPEATS)
    made.add_argument("--json", action="store_true")
    return made


def chosen(ops: list[str] | None, names: list[str] | None) -> list[tuple[str, str]]:
    """(op, shape) pairs to run. CPUs run "tiny" unless told otherwise.

    Raises:
        ValueError: a shape that none of the ops has.
    """
    ops = ops or list(cases.OPS)
    known = {name for op in ops for name in cases.OPS[op][0]}
    if wrong := set(names or ()) - known:
        raise ValueError(
            f"no shape {', '.join(sorted(wrong))}; there are {', '.join(sorted(known))}"
        )
    if names is None:
        names = ["tiny"] if chips.present()[0] == "cpu" else sorted(known)
    return [(op, name) for op in ops for name in names if name in cases.OPS[op][0]]


def _kernels() -> str:
    """Whose tiles to choose: a TPU's where there is neither chip, which says what is missing."""
    return "gpu" if chips.present()[0] in ("gpu", "cuda") else "tpu"


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 nothing could run, 2 wrong arguments."""
    options = parser().parse_args(argv)
    try:
        if options.device:
            jax.config.update("jax_default_device", jax.devices(options.device)[0])
        pairs = chosen(options.op, options.shape)
        if options.verb == "tune":
            backend = dispatch.resolve(options.implementation or _kernels())
            rows = []
            for op, shape in pairs:
                try:
                    tiles, took = tune(op, shape, backend, options.repeats)
                except Unsupported as reason:
                    if options.op:
                        raise
                    print(f"{op} at {shape} is left out: {reason}", file=sys.stderr)
                else:
                    rows.append(dict(op=op, shape=shape, tiles=tiles, ms=took * 1e3))
            print(json.dumps(rows, indent=1))
            return 0
        rows = []
        for op, shape in pairs:
            print(f"{op} {shape}", file=sys.stderr)
            rows.append(measure(op, shape, options.implementation, options.repeats))
    except (ValueError, RuntimeError) as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1 if isinstance(reason, Unsupported) else 2
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
