# SPDX-License-Identifier: Apache-2.0
"""The one piece of GRPO work that every system in `bench_grpo.py` is timed on.

Each system runs in a Python of its own, so this module imports nothing beyond the standard
library. A dense transformer of about 79k parameters (Qwen2- or Llama-shaped, float32, untied)
answers 4 prompts of 8 tokens 8 times each, always with exactly 32 new tokens; reward, group
advantages, KL to a frozen reference, one AdamW update.
"""

import itertools
import json
import statistics
import string

SYMBOLS = string.digits + string.ascii_uppercase + "+-*="  # a symbol's place is its token id
VOCAB = len(SYMBOLS)
# Both lie outside the vocabulary, so neither can be sampled: nothing ends early, nothing is masked.
EOS, PAD = VOCAB, VOCAB + 1
PROMPTS = ("10+20+3=", "11*22*3=", "90-45-6=", "77+8-99=")  # equal lengths: nothing is padded
PROMPT_TOKENS, NEW_TOKENS, SAMPLES = 8, 32, 8
LAYERS, EMBED, MLP, HEADS, KV_HEADS, HEAD_DIM = 2, 64, 128, 4, 2, 16
LEARNING_RATE, KL_COEF, CLIP = 1e-3, 0.04, 0.2
WARMUP_STEPS, STEPS = 10, 40  # the median is over the last STEPS - WARMUP_STEPS


def reward(completions: list[str], **_: object) -> list[float]:
    """Share of '5' in each completion; proves on the way that no completion ended early.

    Args:
        completions: decoded text, one symbol a token.

    Returns:
        One float a completion.

    Raises:
        ValueError: a batch or a completion is not of the agreed size.
    """
    sizes = {len(c) for c in completions}
    if len(completions) != len(PROMPTS) * SAMPLES or sizes != {NEW_TOKENS}:
        raise ValueError(f"not the agreed work: {len(completions)} completions of lengths {sizes}")
    return [c.count("5") / NEW_TOKENS for c in completions]


def report(
    system: str, stamps: list[float], *, compiled: list[float] = (), programs: dict | None = None
) -> None:
    """Prints the result as one line of JSON, the last line of standard output.

    Args:
        system: name and version.
        stamps: seconds on `time.perf_counter`: the start, then the end of each of the STEPS steps.
        compiled: when each XLA compilation ended, on the same clock.
        programs: executions per steady step by program name; None where nothing is compiled.
    """
    steps = [end - begin for begin, end in itertools.pairwise(stamps)]
    edges = [float("-inf"), stamps[0], stamps[1], stamps[WARMUP_STEPS], stamps[-1]]
    phases = ("setup", "first_step", "warm_up", "steady")
    result = {
        "system": system,
        "first_step_s": steps[0],
        "steady_step_s": statistics.median(steps[WARMUP_STEPS:]),
        "programs_per_step": programs,
        "compilations": {
            phase: sum(a < t <= b for t in compiled)
            for phase, (a, b) in zip(phases, itertools.pairwise(edges), strict=True)
        },
        "steps_s": [round(s, 5) for s in steps],
    }
    print(json.dumps(result), flush=True)
