# SPDX-License-Identifier: Apache-2.0
"""Rejection sampling as a program (DeepSeek-R1, 2501.12948, section 2.3.3): sample, verify, choose.

    run.json         whose folder this is
    samples/         what was drawn and judged, a file a batch: a killed run goes on behind the last
    traces.jsonl     the chosen traces, as conversations to train on
    pairs.jsonl      each with a wrong answer to the same question, where there is one: for DPO
    statistics.json  written last: what became of every question and every sample

A batch is a pure function of the settings and its number, so a run that was killed and goes on
leaves the same files as one that was not.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.config import SamplingConfig
from r1jax.data.datasets import Message
from r1jax.eval.summary import versions
from r1jax.io import jsonl, outdir
from r1jax.io.model import Model
from r1jax.rl.rejection import NGrams
from r1jax.train.judge import Verify
from r1jax.train.progress import Progress
from r1jax.train.sampler import Completions, Sampler
from r1jax.train.selection import Choice, choose
from r1jax.train.start import ending_of, state_of
from r1jax.train.state import TrainState

SHORTEST = 16  # a bucket of prompt lengths


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How completions are drawn.

    Attributes:
        samples: completions of a question.
        temperature, top_p: of the sampling; the paper names none for this stage.
        max_tokens: most tokens of a completion, its end included.
        rows: completions of one batch on the device.
        seed: of the noise.
    """

    samples: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512
    rows: int = 64
    seed: int = 0

    def __post_init__(self):
        for name in ("samples", "max_tokens", "rows"):
            if (value := vars(self)[name]) < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be a number of 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")


class Item(NamedTuple):
    """A question to sample.

    Attributes:
        messages: the prompt.
        ids: the prompt as tokens.
        answer: what `verifying.verifier` checks it with.
        source, identity: as in `Question`.
        reference: the answer as text.
        code: whether programs answer it.
    """

    messages: tuple[Message, ...]
    ids: list[int]
    answer: Any
    source: str
    identity: str
    reference: str
    code: bool = False


class Batch(NamedTuple):
    """One call of the sampler: `items` are indices, `first` the number of its first sample."""

    number: int
    length: int
    size: int
    items: tuple[int, ...]
    first: int
    samples: int


class Run(NamedTuple):
    """What a run works with.

    Attributes:
        out: the folder.
        drawing: how it samples.
        choice: how it chooses.
        verify: judges completions.
        evaluation: what no trace may share words with, or None.
        progress: is told what happens.
    """

    out: Path
    drawing: Drawing
    choice: Choice
    verify: Verify
    evaluation: NGrams | None
    progress: Progress


def run(model: Model, items: Sequence[Item], how: Run, *, asked: Mapping[str, Any]) -> dict:
    """Samples what is missing, chooses, and writes traces and statistics.

    Args:
        model: what answers.
        items: the questions.
        how: see `Run`.
        asked: what became of the questions before sampling; goes into the statistics.

    Returns:
        The statistics, as in `statistics.json`.

    Raises:
        ValueError: nothing to sample, or the samples in the folder are another model's.
    """
    if not items:
        raise ValueError("no question is left to sample")
    batches = plan([len(item.ids) for item in items], how.drawing)
    rows = _sampled(model, items, batches, how)
    chosen = choose(rows, items, how.choice, how.evaluation)
    traces = [_trace(items[rows[i]["item"]], rows[i]) for i in np.flatnonzero(chosen.keep)]
    jsonl.write(how.out / outdir.TRACES, traces)
    pairs = [_pair(items[rows[i]["item"]], rows[i], rows[j]) for i, j in paired(rows, chosen.keep)]
    jsonl.write(how.out / outdir.PAIRS, pairs)
    statistics = {
        "questions": dict(asked),
        **chosen.statistics,
        "pairs": len(pairs),
        "versions": versions(),
    }
    outdir.write_json(how.out / outdir.STATISTICS, statistics)
    return statistics


def paired(rows: Sequence[Mapping[str, Any]], keep: np.ndarray) -> list[tuple[int, int]]:
    """Places (kept, wrong) of two answers to one question; no text is used twice for it.

    A wrong answer that was cut off or has no text is left out: what it lacks is its end.
    """
    wrong: dict[int, dict[str, int]] = {}
    for place, row in enumerate(rows):
        if row["reward"] < 1 and row["ended"] and row["text"].strip():
            wrong.setdefault(row["item"], {}).setdefault(row["text"], place)
    left = {item: list(texts.values())[::-1] for item, texts in wrong.items()}
    kept = np.flatnonzero(keep).tolist()
    return [(i, left[rows[i]["item"]].pop()) for i in kept if left.get(rows[i]["item"])]


def plan(lengths: Sequence[int], drawing: Drawing) -> list[Batch]:
    """The batches: prompts of about one length together, so that few programs are compiled.

    Args:
        lengths: tokens of each prompt.
        drawing: how many samples and rows.
    """
    group = min(drawing.samples, drawing.rows)
    buckets: dict[int, list[int]] = {}
    for item, length in enumerate(lengths):
        bucket = max(SHORTEST, 1 << max(length - 1, 1).bit_length())
        buckets.setdefault(bucket, []).append(item)
    batches: list[Batch] = []
    for bucket, members in sorted(buckets.items()):
        size = min(max(1, drawing.rows // group), len(members))
        for start in range(0, len(members), size):
            for first in range(0, drawing.samples, group):
                some = tuple(members[start : start + size])
                count = min(group, drawing.samples - first)
                batches.append(Batch(len(batches), bucket, size, some, first, count))
    return batches


@jax.jit
def fingerprint(state: TrainState) -> jax.Array:
    """A number of the weights' bits, the same on every machine: whole numbers add up exactly."""

    def of(x: jax.Array) -> jax.Array:
        kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32).reshape(-1)
        place = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(1)
        return (bits * place).sum(dtype=jnp.uint32)

    leaves = jax.tree.leaves((state.params, state.router))
    total = jnp.uint32(0)
    for leaf in leaves:
        total = total * jnp.uint32(31) + of(leaf)
    return total


class _Samplers:
    """A sampler for each length of prompts."""

    def __init__(self, model: Model, drawing: Drawing):
        self.drawing, self.ending, self.state = drawing, ending_of(model), state_of(model.module)

    def __call__(self, batch: Batch, items: Sequence[Item]) -> Completions:
        """The completions of a batch, those that fill it up included."""
        drawing = self.drawing
        top_p = None if drawing.top_p == 1 else drawing.top_p
        rules = SamplingConfig(None, top_p, batch.length, drawing.max_tokens)
        ids = [items[i].ids for i in batch.items]
        # The last batch of a length repeats its first prompt: its program is compiled already.
        ids += ids[:1] * (batch.size - len(ids))
        temperatures = [drawing.temperature] * min(drawing.samples, drawing.rows)
        noise = (drawing.seed, batch.number)
        return Sampler(rules, self.ending)(self.state, ids, noise, temperatures)


def _sampled(
    model: Model, items: Sequence[Item], batches: Sequence[Batch], how: Run
) -> list[dict[str, Any]]:
    """The rows of all batches, those of an earlier run read again."""
    folder = how.out / outdir.SAMPLES
    samplers = _Samplers(model, how.drawing)
    _same_model(folder, int(fingerprint(samplers.state)))
    found = {batch.number: _kept(folder, batch) for batch in batches}
    missing = [batch for batch in batches if found[batch.number] is None]
    if len(missing) < len(batches):
        done = len(batches) - len(missing)
        how.progress.message(f"going on: {done} of {len(batches)} batches were sampled before")
    how.progress.stage("sampling", len(batches))
    earlier = [row["reward"] for rows in found.values() if rows for row in rows]
    count, total = len(earlier), sum(earlier)
    for done, (batch, rows) in enumerate(
        _drawn(samplers, items, missing, how.verify), len(batches) - len(missing) + 1
    ):
        jsonl.write(_file(folder, batch), rows)
        found[batch.number] = rows
        count, total = count + len(rows), total + sum(row["reward"] for row in rows)
        how.progress.step(done, accuracy=total / count)
    return [row for batch in batches for row in found[batch.number]]


def _drawn(
    samplers: _Samplers, items: Sequence[Item], batches: Sequence[Batch], verify: Verify
) -> Iterator[tuple[Batch, list[dict[str, Any]]]]:
    """Batches with their judged rows; the workers judge one while the device samples the next."""

    def judged(batch, rows, verdict):
        rewards = map(float, verdict())
        return batch, [{**row, "reward": r} for row, r in zip(rows, rewards, strict=True)]

    waiting = None
    for batch in batches:
        rows = _rows(batch, samplers(batch, items))
        answers = [items[row["item"]].answer for row in rows]
        verdict = verify(answers, [row["text"] for row in rows])
        if waiting is not None:
            yield judged(*waiting)
        waiting = batch, rows, verdict
    if waiting is not None:
        yield judged(*waiting)


def _rows(batch: Batch, done: Completions) -> list[dict[str, Any]]:
    """The rows of a batch that were asked for."""
    group = len(done.texts) // batch.size
    ended_B = np.asarray(done.rollout.ended_B)
    return [
        {
            "item": item,
            "sample": batch.first + k,
            "text": done.texts[place * group + k],
            "tokens": int(done.tokens_B[place * group + k]),
            "ended": bool(ended_B[place * group + k]),
        }
        for place, item in enumerate(batch.items)
        for k in range(batch.samples)
    ]


def _file(folder: Path, batch: Batch) -> Path:
    return folder / f"{batch.number:06d}.jsonl"


def _kept(folder: Path, batch: Batch) -> list[dict[str, Any]] | None:
    """The rows that an earlier run left of a batch; None where they are not whole."""
    path = _file(folder, batch)
    try:
        rows = jsonl.read(path) if path.is_file() else []
    except ValueError:
        return None  # damaged: it is drawn again, and comes out the same
    wanted = [(i, batch.first + k) for i in batch.items for k in range(batch.samples)]
    whole = all({"text", "tokens", "ended", "reward"} <= row.keys() for row in rows)
    if not whole or [(row.get("item"), row.get("sample")) for row in rows] != wanted:
        return None
    return rows


def _same_model(folder: Path, weights: int) -> None:
    """Refuses to go on with samples of other weights."""
    path = folder / "model.json"
    saved = outdir.read_json(path) if path.is_file() else None
    if saved is None:
        folder.mkdir(parents=True, exist_ok=True)
        outdir.write_json(path, {"weights": weights})
    elif saved.get("weights") != weights:
        raise ValueError(
            f"{folder}: holds samples of other weights than MODEL's now; "
            "start anew with --force or another --out"
        )


def _trace(item: Item, row: Mapping[str, Any]) -> dict[str, Any]:
    """A chosen sample as a conversation to train on."""
    turns = [*item.messages, Message("assistant", row["text"])]
    return {
        "messages": [dataclasses.asdict(turn) for turn in turns],
        "source": item.source,
        "identity": item.identity,
        "answer": item.reference,
        "reward": row["reward"],
        "tokens": row["tokens"],
    }


def _pair(item: Item, better: Mapping[str, Any], worse: Mapping[str, Any]) -> dict[str, Any]:
    """Two samples as a preference to train on."""
    return {
        "prompt": [dataclasses.asdict(turn) for turn in item.messages],
        "chosen": better["text"],
        "rejected": worse["text"],
        "source": item.source,
        "identity": item.identity,
    }
