# SPDX-License-Identifier: Apache-2.0
"""The batch of a step: questions drawn, completions sampled, rewards judged."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.config import GRPOConfig, PPOConfig
from r1jax.parallel import hosts
from r1jax.rl.advantages import informative_groups
from r1jax.rl.rollout import Rollout, settled
from r1jax.train.judge import Judge, Verdict
from r1jax.train.program import Ahead
from r1jax.train.questions import Asked, Questions
from r1jax.train.sampler import Completions, Sampler
from r1jax.train.state import TrainState


class Collected(NamedTuple):
    """What an update learns from.

    Attributes:
        rollout: B = prompts × group_size rows.
        reward_B: float32.
        shown: for the metrics, of everything that was sampled.
        drawn: batches of questions used up so far.
    """

    rollout: Rollout
    reward_B: np.ndarray
    shown: dict[str, float]
    drawn: int


class Collector:
    """Makes the batch of each step; a pure function of the policy and of what was drawn before."""

    def __init__(
        self,
        cfg: GRPOConfig | PPOConfig,
        sampler: Sampler,
        questions: Questions,
        judge: Judge,
        *,
        seed: int,
    ):
        self.cfg, self.sampler, self.questions, self.judge = cfg, sampler, questions, judge
        self.seed = seed

    def ahead(self, state: TrainState) -> Ahead:
        """The traced rollout of one piece."""
        return self.sampler.ahead(state, self.cfg.prompts // self.cfg.pieces, self.cfg.group_size)

    def shapes(self, piece: Rollout) -> Rollout:
        """The whole batch's shapes from those of a piece."""

        def whole(x):
            return jax.ShapeDtypeStruct((x.shape[0] * self.cfg.pieces, *x.shape[1:]), x.dtype)

        return jax.tree.map(whole, piece)

    def batch(self, state: TrainState, step: int, drawn: int) -> Collected:
        """One batch of questions, as it comes."""
        asked = self.questions(drawn, self.cfg.prompts, step)
        return self.judged(asked, self.draw(state, asked, drawn), step, drawn)

    def draw(self, state: TrainState, asked: Asked, drawn: int) -> tuple[Rollout, ...]:
        """A rollout of each piece of the questions. It returns before the device is done."""
        cfg = self.cfg
        temperatures = [cfg.temperature] * cfg.group_size
        # The device is given all pieces at once; the first are judged while it samples the rest.
        return tuple(
            self.sampler.draw(state, part.ids, (self.seed, drawn * cfg.pieces + i), temperatures)
            for i, part in enumerate(self._parts(asked))
        )

    def judged(self, asked: Asked, rollouts: Iterable[Rollout], step: int, drawn: int) -> Collected:
        """What a step learns from the rollouts of the questions, which are read one by one."""
        done, waiting = [], []
        for part, rollout in zip(self._parts(asked), rollouts, strict=True):
            done.append(self.sampler.read(rollout))
            waiting.append(self._judged(step, part.repeated(self.cfg.group_size), done[-1]))
        verdicts = [wait() for wait in waiting]
        reward_B = np.concatenate([v.reward_B for v in verdicts])
        rollout = joined([piece.rollout for piece in done])
        return Collected(rollout, reward_B, mean_shown(verdicts), drawn + 1)

    def _parts(self, asked: Asked) -> list[Asked]:
        size = self.cfg.prompts // self.cfg.pieces
        return [asked.part(i * size, (i + 1) * size) for i in range(self.cfg.pieces)]

    def _judged(self, step: int, asked: Asked, done: Completions) -> Callable[[], Verdict]:
        """Begins to judge the rows that are this process's; of all of them is what comes back."""
        if done.rows is None or len(done.rows) == len(asked.ids):
            wait = self.judge(step, asked, done)
        else:
            wait = self.judge(step, asked.at(done.rows), done)
        return lambda: of_all(wait(), done.rows, len(asked.ids))

    def refilled(self, state: TrainState, step: int, drawn: int) -> Collected:
        """A batch of groups with contrast: dynamic sampling (DAPO, arXiv 2503.14476, section 3.2).

        Further batches are sampled until there are enough such groups, `cfg.refill` of them at
        most; places left over are filled by groups without, whose advantages are 0.
        """
        cfg, size = self.cfg, self.cfg.group_size
        batches = [self.batch(state, step, drawn)]
        live = [np.asarray(informative_groups(batches[0].reward_B, group_size=size))]
        while sum(map(np.sum, live)) < cfg.prompts and len(batches) <= cfg.refill:
            batches.append(self.batch(state, step, batches[-1].drawn))
            live.append(np.asarray(informative_groups(batches[-1].reward_B, group_size=size)))
        live_P = np.concatenate(live)
        shown = mean_shown([Verdict(b.reward_B, b.shown) for b in batches])
        shown |= {"batches": float(len(batches)), "live_groups": float(live_P.mean())}
        # Live groups first, each kind in the order it was sampled.
        chosen_P = np.argsort(~live_P, kind="stable")[: cfg.prompts]
        if len(batches) == 1:
            return batches[0]._replace(shown=shown)
        rows_B = (chosen_P[:, None] * size + np.arange(size)).reshape(-1)
        rollout = taken(joined([b.rollout for b in batches]), chosen_P, rows_B)
        reward_B = np.concatenate([b.reward_B for b in batches])[rows_B]
        return Collected(rollout, reward_B, shown, batches[-1].drawn)


class InTurns:
    """A step's batch sampled by the policy that learns from it, right before it does."""

    def __init__(self, collector: Collector):
        self.collector = collector
        self.collect = collector.refilled if collector.cfg.refill else collector.batch
        self._compiling: Ahead | None = None

    def carried(self) -> dict[str, Any]:
        """What a stage has to carry for it at first."""
        return {}

    def shapes(self, state: TrainState) -> Rollout:
        """Of a batch; the sampler is traced for it, and compiles in a thread until it is called."""
        self._compiling = self.collector.ahead(state).start()
        return self.collector.shapes(self._compiling.shapes)

    def __call__(self, carry: Mapping[str, Any], step: int) -> tuple[Collected, dict[str, Any]]:
        """The batch of a step, and what to carry from here on."""
        if self._compiling is not None:
            self._compiling.join()
        return self.collect(carry["state"], step, int(carry["drawn"])), {}


def joined(rollouts: Sequence[Rollout]) -> Rollout:
    """Rollouts one below the other; one alone stays where it is."""
    if len(rollouts) == 1:
        return rollouts[0]
    if hosts.several():
        return _joined(tuple(rollouts))
    return jax.tree.map(lambda *x: np.concatenate([np.asarray(a) for a in x]), *rollouts)


def taken(rollout: Rollout, prompt_P: np.ndarray, row_B: np.ndarray) -> Rollout:
    """Some prompts of a rollout with their rows."""
    if hosts.several():
        return _taken(rollout, prompt_P, row_B)
    prompts = {"prompt_PS", "prompt_valid_PS"}
    fields = rollout._asdict().items()
    return Rollout(*(np.asarray(x)[prompt_P if name in prompts else row_B] for name, x in fields))


@jax.jit
def _joined(rollouts: tuple[Rollout, ...]) -> Rollout:
    return settled(jax.tree.map(lambda *x: jnp.concatenate(x), *rollouts))


@jax.jit
def _taken(rollout: Rollout, prompt_P, row_B) -> Rollout:
    prompts = (x[prompt_P] for x in rollout[:2])
    return settled(Rollout(*prompts, *(x[row_B] for x in rollout[2:])))


def of_all(mine: Verdict, rows: np.ndarray | None, total: int) -> Verdict:
    """The verdict on all rows of what each process says of its own; `rows` are those."""
    if not hosts.several():
        return mine
    shown = {k: (v, mine.counts.get(k, len(rows))) for k, v in mine.shown.items()}
    said = hosts.exchanged([rows.tolist(), mine.reward_B.tolist(), shown])
    reward_B = np.zeros(total, np.float32)
    for places, rewards, _ in said:
        reward_B[places] = rewards
    names = dict.fromkeys(name for _, _, shown in said for name in shown)
    of = {name: [shown[name] for _, _, shown in said if name in shown] for name in names}
    return Verdict(reward_B, {name: _mean(found) for name, found in of.items()})


def _mean(found: Sequence[tuple[float, int]]) -> float:
    """Of means of so many each."""
    return sum(mean * n for mean, n in found) / max(sum(n for _, n in found), 1)


def mean_shown(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Means of what was shown of batches of one size; some may lack what others have."""
    shown = [v.shown for v in verdicts]
    names = dict.fromkeys(name for each in shown for name in each)
    return {k: float(np.mean([each[k] for each in shown if k in each])) for k in names}
