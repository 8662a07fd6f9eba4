# SPDX-License-Identifier: Apache-2.0
"""How much of GSM8K and MATH their own test sets overlap, by n, and how long R1's paragraphs are.

python experiments/overlaps.py --data DATA

DATA holds gsm8k/, math/, math500/ and cot/ as the data sets are published. Results:
experiments/log/013_datasets_and_rejection_sampling.md.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from r1jax.data.datasets import conversations, evaluation_texts, gsm8k, math, read_indices
from r1jax.rl.rejection import (
    PARAGRAPHS,
    WORDS,
    clean,
    distinct,
    ngrams_of,
    one_language,
    without_code,
)


def main() -> None:
    """Prints a row for each set and n, and one for each set of traces."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    held_out = read_indices(data / "math/math500_idx_in_test5000.json")
    train = {
        "gsm8k": (gsm8k(data / "gsm8k/train.jsonl").items, data / "gsm8k/test.jsonl"),
        "math": (
            math(data / "math/test_5000.jsonl", leave_out=held_out).items,
            data / "math500/test.jsonl",
        ),
    }
    print("set    n   rows  questions  with solutions  solutions  seconds")
    for name, (rows, evaluation) in train.items():
        asked, worked = evaluation_texts(evaluation)
        texts, solutions = [q.question for q in rows], [q.solution for q in rows]
        for n in (8, 10, 13, 20):
            began = time.perf_counter()
            alone = clean(texts, ngrams_of(asked, n=n)).counts["overlapping"]
            took, both = time.perf_counter() - began, ngrams_of(asked, worked, n=n)
            counts = [clean(some, both).counts["overlapping"] for some in (texts, solutions)]
            print(
                f"{name:6} {n:2} {len(rows):5} {alone:9} {counts[0]:15} {counts[1]:10} {took:8.2f}"
            )
    print("\ntraces  longest paragraph in words: median, 95 %, 99 %, most; mixed, code, repeats")
    for path in sorted((data / "cot").glob("*.jsonl")):
        texts = [c.messages[-1].content for c in conversations(path).items]
        longest = [max(len(WORDS.findall(p)) for p in PARAGRAPHS.split(text)) for text in texts]
        found = one_language(texts), without_code(texts), distinct(texts, [0] * len(texts))
        dropped = [int((~f.keep).sum()) for f in found]
        print(f"{path.stem}, {len(texts)}:", *np.percentile(longest, [50, 95, 99, 100]), *dropped)


if __name__ == "__main__":
    main()
