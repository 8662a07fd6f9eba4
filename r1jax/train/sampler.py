# SPDX-License-Identifier: Apache-2.0
"""Sampling completions of problems: the compiled rollout and the text around it."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from r1jax.config import SamplingConfig
from r1jax.data.corpus import prompt_batch
from r1jax.data.tasks import Problem
from r1jax.data.template import Template
from r1jax.data.tokenizer import TaskTokenizer
from r1jax.rl.rollout import Rollout, rollout
from r1jax.train.program import Ahead, program
from r1jax.train.state import TrainState


class Completions(NamedTuple):
    """A rollout and its texts; entry b belongs to problem b // (B / P), repeated in `problems`."""

    rollout: Rollout
    problems: list[Problem]
    texts: list[str]
    tokens_B: np.ndarray


@functools.cache
def compile_rollout(cfg: SamplingConfig, eos_id: int, pad_id: int):
    """`rl.rollout` of a state, jitted: (state, prompt_PS, valid_PS, noise, temperature_B)."""

    def run(state: TrainState, prompt_PS, valid_PS, noise, temperature_B) -> Rollout:
        key = jax.random.fold_in(jax.random.key(noise[0]), noise[1])
        return rollout(
            state.model(),
            prompt_PS,
            valid_PS,
            key,
            temperature_B,
            max_new_tokens=cfg.max_new_tokens,
            eos_id=eos_id,
            pad_id=pad_id,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
        )

    return program(run)


class Sampler:
    """Draws completions from any state of one architecture; one compilation a batch shape."""

    def __init__(self, cfg: SamplingConfig, tokenizer: TaskTokenizer, template: Template):
        self.cfg, self.tokenizer, self.template = cfg, tokenizer, template
        self.run = compile_rollout(cfg, tokenizer.eos_id, tokenizer.pad_id)

    def prompts(self, problems: Sequence[Problem]) -> tuple[np.ndarray, np.ndarray]:
        """Left-padded prompts [P, S] and their validity; ValueError if one does not fit."""
        return prompt_batch(problems, self.tokenizer, self.template, length=self.cfg.prompt_length)

    def ahead(self, state: TrainState, prompts: int, group_size: int) -> Ahead:
        """The traced rollout of so many prompts and samples of each."""
        prompt = lambda dtype: np.empty((prompts, self.cfg.prompt_length), dtype)  # noqa: E731
        noise, temperature_B = np.empty(2, np.uint32), np.empty(prompts * group_size, np.float32)
        return Ahead(self.run, state.slim(), prompt(np.int32), prompt(bool), noise, temperature_B)

    def __call__(
        self,
        state: TrainState,
        problems: Sequence[Problem],
        noise: tuple[int, int],
        temperatures: Sequence[float],
    ) -> Completions:
        """Completions of P problems, one for each of `temperatures` (0 is greedy).

        Args:
            state: of the policy; its optimizer is not looked at.
            noise: (seed, step); the same pair draws the same completions.
            temperatures: G numbers.
        """
        prompt_PS, valid_PS = self.prompts(problems)
        temperature_B = np.tile(np.asarray(temperatures, np.float32), len(problems))
        noise = np.array([n % 2**32 for n in noise], np.uint32)
        out = self.run(state.slim(), prompt_PS, valid_PS, noise, temperature_B)
        lengths = np.asarray(out.mask_BT).sum(-1).astype(np.int32)
        rows = np.asarray(out.tokens_BT)
        ids = [row[:n].tolist() for row, n in zip(rows, lengths, strict=True)]
        repeated = [p for p in problems for _ in temperatures]
        return Completions(out, repeated, self.tokenizer.decode_batch(ids), lengths)
