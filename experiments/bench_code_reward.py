# SPDX-License-Identifier: Apache-2.0
"""Reference solutions through the code reward: how many pass, programs a second, processor time.

python experiments/bench_code_reward.py --data ../shared/data [--workers 2] [--without files,pid]
"""

import argparse
import gzip
import json
import resource
import time
from pathlib import Path

from r1jax.rl.rewards.code import cruxeval_tests, humaneval_tests, mbpp_tests, submit_code
from r1jax.rl.rewards.sandbox import Sandbox

SETS = {
    "humaneval/HumanEval.jsonl.gz": (humaneval_tests, "canonical_solution"),
    "mbpp/mbpp.jsonl": (mbpp_tests, "code"),
    "cruxeval/cruxeval.jsonl": (cruxeval_tests, "code"),
}


def main() -> None:
    """Prints a line for each set."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--data", type=Path, required=True)
    flags.add_argument("--workers", type=int)
    flags.add_argument("--without", default="", help="layers to leave out, with commas between")
    args = flags.parse_args()
    without = [name for name in args.without.split(",") if name]
    for file, (tests_of, solution) in SETS.items():
        data = (args.data / file).read_bytes()
        text = gzip.decompress(data) if file.endswith(".gz") else data
        rows = [json.loads(line) for line in text.splitlines()]
        tests = [tests_of(row) for row in rows]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with Sandbox(workers=args.workers, without=without) as sandbox:
            layers = sandbox.layers()
            began = time.monotonic()
            pending = submit_code([row[solution] for row in rows], tests, sandbox=sandbox)
            passed = int(pending.result().sum())
            seconds = time.monotonic() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(
            f"{file}: {passed} of {len(rows)} pass, {len(rows) / seconds:.0f} programs/s, "
            f"{1000 * spent / len(rows):.1f} processor ms each"
        )
    print("layers:", {name: why or "on" for name, why in layers.items()})


if __name__ == "__main__":
    main()
