# SPDX-License-Identifier: Apache-2.0
"""Data without files: tasks that make and verify problems, the tokenizer, templates, packing.

Data sets in files are read by `r1jax.data.datasets`.
"""

from r1jax.data.corpus import (
    batch_at,
    cold_start_corpus,
    left_padded,
    pretrain_corpus,
    problems,
)
from r1jax.data.packing import Packed, example, pack
from r1jax.data.tasks import TASKS, Difficulty, Problem, Trace, TraceMix
from r1jax.data.template import (
    PRIMER_RL,
    PRIMER_SFT,
    R1,
    Parsed,
    Template,
    completion,
    parse,
    prompt,
)
from r1jax.data.tokenizer import TaskTokenizer, task_tokenizer

__all__ = [
    "PRIMER_RL",
    "PRIMER_SFT",
    "R1",
    "TASKS",
    "Difficulty",
    "Packed",
    "Parsed",
    "Problem",
    "TaskTokenizer",
    "Template",
    "Trace",
    "TraceMix",
    "batch_at",
    "cold_start_corpus",
    "completion",
    "example",
    "pack",
    "parse",
    "pretrain_corpus",
    "problems",
    "prompt",
    "left_padded",
    "task_tokenizer",
]
