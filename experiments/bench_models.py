# SPDX-License-Identifier: Apache-2.0
"""Times r1jax beside transformers and MaxText: a training step, prefill and decoding.

The work is in `peers/models_work.py`; MaxText does the training step alone. Runs take turns, each a
fresh process without a compilation cache; compilation is not in the figures. Medians over the
rounds, and r1jax's as a multiple of each peer's.

    python experiments/bench_models.py --transformers-python B/bin/python --smollm2 FILE.gguf
    python experiments/bench_models.py --maxtext-python C/bin/python --only train
"""

import argparse
import json
import statistics
import sys

from turns import rounds


def table(results: dict[str, list[dict]]) -> str:
    """One line for each thing timed, one column a system, and r1jax's time over each peer's."""
    systems = [runs[0]["system"] for runs in results.values()]
    heads = ["", *systems, *(f"/ {name.split()[0]}" for name in systems[1:])]
    lines = ["".join(f"{head:>20}" for head in heads)]
    for what in next(iter(results.values()))[0]["seconds"]:
        times = [
            statistics.median(r["seconds"][what] for r in runs)
            if what in runs[0]["seconds"]
            else None
            for runs in results.values()
        ]
        cells = [f"{1e3 * t:.1f} ms" if t else "" for t in times]
        cells += [f"{times[0] / t:.2f}" if t else "" for t in times[1:]]
        lines.append("".join(f"{cell:>20}" for cell in (what, *cells)))
    loads = sorted(load for runs in results.values() for r in runs for load in r["load"])
    return "\n".join([*lines, f"load {loads[0]:.1f} to {loads[-1]:.1f}"])


def told(report: dict) -> str:
    """The figures of one run."""
    return ", ".join(f"{what} {1e3 * t:.1f} ms" for what, t in report["seconds"].items())


def main() -> None:
    """Reads the flags, runs the rounds and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transformers-python", help="a Python with torch and transformers")
    parser.add_argument("--maxtext-python", help="a Python with maxtext")
    parser.add_argument("--smollm2", help="SmolLM2-135M as a .gguf file; left out without it")
    parser.add_argument("--only", default="", help="a part of the names of what is timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print every run as JSON instead")
    args = parser.parse_args()
    pythons = {
        "r1jax": sys.executable,
        "transformers": args.transformers_python,
        "maxtext": args.maxtext_python,
    }
    flags = ["--only", args.only] + (["--smollm2", args.smollm2] if args.smollm2 else [])
    results = rounds(pythons, args.rounds, "{}_models.py".format, flags=flags, tell=told)
    print(json.dumps(results, indent=1) if args.json else table(results))


if __name__ == "__main__":
    main()
