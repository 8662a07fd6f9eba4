# SPDX-License-Identifier: Apache-2.0
"""Sampling completions of prompts: the compiled rollout and the text around it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from r1jax.config import SamplingConfig
from r1jax.data.corpus import left_padded
from r1jax.infer.redundant import Copies
from r1jax.parallel import hosts
from r1jax.rl.rollout import Rollout, laid_out_rollout, rollout
from r1jax.sharding import place, spec
from r1jax.train.program import Ahead, program
from r1jax.train.state import TrainState, no_load


class Completions(NamedTuple):
    """A rollout of all processes, and the texts of the rows that are this one's to judge.

    Attributes:
        rollout: row b belongs to prompt b // (B / P).
        texts: of this process's rows; alone it has all.
        tokens_B: their lengths.
        rows: their numbers; None: all.
    """

    rollout: Rollout
    texts: list[str]
    tokens_B: np.ndarray
    rows: np.ndarray | None = None


class Ending(NamedTuple):
    """What sampling has to know of a tokenizer: where a text ends, and how ids become text."""

    eos_ids: tuple[int, ...]
    pad_id: int
    decode: Callable[[list[int]], str]


@functools.cache
def compile_rollout(cfg: SamplingConfig, eos_ids: tuple[int, ...], pad_id: int):
    """`rl.rollout` of a state, jitted: (state, prompt_PS, valid_PS, noise, temperature_B)."""

    def run(state: TrainState, prompt_PS, valid_PS, noise, temperature_B) -> Rollout:
        key = jax.random.fold_in(jax.random.key(noise[0]), noise[1])
        drawn = rollout
        if cfg.layout == "decoding":
            held = cfg.redundant_experts
            copies = Copies(state.load, held) if held else None
            drawn = functools.partial(laid_out_rollout, copies=copies)
        return drawn(
            state.model(),
            prompt_PS,
            valid_PS,
            key,
            temperature_B,
            max_new_tokens=cfg.max_new_tokens,
            eos_ids=eos_ids,
            pad_id=pad_id,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
        )

    return program(run)


class Sampler:
    """Draws completions from any state of one architecture; one compilation a batch shape."""

    def __init__(self, cfg: SamplingConfig, ending: Ending):
        self.cfg, self.ending = cfg, ending
        self.run = compile_rollout(cfg, ending.eos_ids, ending.pad_id)

    def prompts(self, ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Left-padded prompts [P, S] and their validity; ValueError if one does not fit."""
        return left_padded(ids, length=self.cfg.prompt_length, pad_id=self.ending.pad_id)

    def ahead(self, state: TrainState, prompts: int, group_size: int) -> Ahead:
        """The traced rollout of so many prompts and samples of each."""
        prompt = lambda dtype: np.empty((prompts, self.cfg.prompt_length), dtype)  # noqa: E731
        noise, temperature_B = np.empty(2, np.uint32), np.empty(prompts * group_size, np.float32)
        return Ahead(
            self.run, self._seen(state), prompt(np.int32), prompt(bool), noise, temperature_B
        )

    def blank(self, prompts: int, group_size: int) -> Rollout:
        """Zeros in the form of a rollout."""
        new = (prompts * group_size, self.cfg.max_new_tokens)
        numbers = [np.zeros(new, np.float32) for _ in range(3)]
        tokens, ended_B = np.zeros(new, np.int32), np.zeros(new[0], bool)
        return Rollout(*self.prompts([[0]] * prompts), tokens, *numbers, ended_B)

    def draw(
        self,
        state: TrainState,
        ids: Sequence[Sequence[int]],
        noise: tuple[int, int],
        temperatures: Sequence[float],
    ) -> Rollout:
        """A rollout of P prompts, one row for each of `temperatures` (0 is greedy).

        It returns before the device is done; `read` waits.

        Args:
            state: of the policy; its optimizer is not looked at.
            ids: the P prompts.
            noise: (seed, step); the same pair draws the same completions.
            temperatures: G numbers.
        """
        prompt_PS, valid_PS = self.prompts(ids)
        temperature_B = np.tile(np.asarray(temperatures, np.float32), len(ids))
        noise = np.array([n % 2**32 for n in noise], np.uint32)
        return self.run(self._seen(state), prompt_PS, valid_PS, noise, temperature_B)

    def _seen(self, state: TrainState) -> TrainState:
        """What the rollout is given of a state: where experts are copied, with their loads."""
        slim = state.slim()
        if not self.cfg.redundant_experts:
            return dataclasses.replace(slim, load=None)
        if slim.load is not None:
            return slim
        return dataclasses.replace(slim, load=place(no_load(slim.router), spec()))

    def read(self, drawn: Rollout) -> Completions:
        """The texts of a rollout."""
        mine = hosts.own_rows(drawn.tokens_BT)
        lengths_B = hosts.local_rows(drawn.mask_BT, mine).sum(-1).astype(np.int32)
        rows = hosts.local_rows(drawn.tokens_BT, mine)
        ids = [row[:n].tolist() for row, n in zip(rows, lengths_B, strict=True)]
        return Completions(drawn, [self.ending.decode(row) for row in ids], lengths_B, mine)

    def __call__(
        self,
        state: TrainState,
        ids: Sequence[Sequence[int]],
        noise: tuple[int, int],
        temperatures: Sequence[float],
    ) -> Completions:
        """`draw`, then `read`."""
        return self.read(self.draw(state, ids, noise, temperatures))
