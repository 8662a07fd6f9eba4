# SPDX-License-Identifier: Apache-2.0
"""Times one GRPO iteration of r1jax beside Tunix and TRL on the same work (`peers/work.py`).

Every run is a fresh process without a compilation cache, and the systems take turns, a round
starting one place later than the one before. Medians over the rounds are printed with the load
average, because a busy machine stretches the systems unevenly. A Python that is not given leaves
its system out.

    python experiments/bench_grpo.py --tunix-python A/bin/python --trl-python B/bin/python
"""

import argparse
import json
import statistics
import sys

from turns import rounds


def table(results: dict[str, list[dict]]) -> str:
    """Lays out the medians, one system a line, each also as a multiple of the first's."""
    median = {
        name: [statistics.median(r[k] for r in runs) for k in ("first_step_s", "steady_step_s")]
        for name, runs in results.items()
    }
    first0, steady0 = next(iter(median.values()))
    lines = [f"{'system':16}{'first step':>12}{'ratio':>8}{'steady step':>13}{'ratio':>8}"
             f"{'programs/step':>15}{'recompiled':>12}{'load':>12}"]  # fmt: skip
    for name, runs in results.items():
        first, steady = median[name]
        programs = max((r["programs_per_step"] or {}).get("total", 0) for r in runs)
        again = max(r["compilations"]["steady"] for r in runs)
        loads = sorted(load for r in runs for load in r["load"])
        lines.append(
            f"{runs[0]['system']:16}{first:10.2f} s{first / first0:8.2f}{1e3 * steady:10.1f} ms"
            f"{steady / steady0:8.2f}{f'{programs:g}' if programs else 'eager':>15}{again:12}"
            f"{f'{loads[0]:.1f}-{loads[-1]:.1f}':>12}"
        )
    return "\n".join(lines)


def told(report: dict) -> str:
    """The figures of one run."""
    first, steady = report["first_step_s"], 1e3 * report["steady_step_s"]
    return f"first step {first:.2f} s, steady {steady:.1f} ms"


def main() -> None:
    """Reads the flags, runs the rounds and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tunix-python", help="a Python with google-tunix==0.1.7")
    parser.add_argument("--trl-python", help="a Python with torch, transformers and trl==1.16.0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print every run as JSON instead")
    args = parser.parse_args()
    pythons = {"r1jax": sys.executable, "tunix": args.tunix_python, "trl": args.trl_python}
    results = rounds(pythons, args.rounds, "{}_grpo.py".format, tell=told)
    print(json.dumps(results, indent=1) if args.json else table(results))


if __name__ == "__main__":
    main()
