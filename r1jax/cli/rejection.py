# SPDX-License-Identifier: Apache-2.0
"""The verb rejection-sample: flags to settings, data to questions, statistics to a table."""

import argparse
import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

VERB = "rejection-sample"
TASK = "task:"
ANSWER = 512  # most tokens of an answer where nothing says another number
DRAWN = 256  # problems of a task where --questions says nothing
TEMPLATES = ("r1", "primer")
_ABOUT = """\
Makes training data of a model's own right answers, as DeepSeek-R1 does between its two
RL stages: samples answers to questions, verifies each, filters, balances, and writes

  traces.jsonl     the chosen answers as conversations (messages), ready for SFT
  pairs.jsonl      each beside a wrong answer to the same question, ready for DPO
  statistics.json  what became of every question and every sample
  samples/         everything that was drawn and judged

MODEL is what r1jax generate takes: a Hugging Face folder, a folder of ours, a .gguf
file, or a run. DATA are files: JSON lines, a JSON list (both also gzipped) or Parquet.
--dataset says what is in them; a file of another kind is written NAME=FILE:

  gsm8k math math500 aime amc minerva   answers compared as mathematics
  humaneval mbpp cruxeval               programs run against unit tests, in a sandbox
  questions                             your own: question (or problem) with answer, or
                                        with a solution that ends in \\boxed{...}
  scripts                               your own: question with cases (input, output)
  choices                               your own: question with options and answer
  task:arithmetic task:countdown task:quadratic
                                        generated problems, for models of the quickstart;
                                        no DATA

Left out are answers that are wrong, cut off, in mixed languages, with paragraphs that
are too long or with code blocks, and those that share ten words in a row with a file of
--decontaminate, as questions that do are.
"""
_EXAMPLES = """\
examples:
  r1jax rejection-sample runs/quickstart --dataset task:arithmetic --out runs/traces
  r1jax rejection-sample MODEL gsm8k/train.jsonl --dataset gsm8k --out runs/gsm8k \\
      --decontaminate gsm8k/test.jsonl math500/test.jsonl --samples 16 --keep 4 \\
      --instruction "Reason step by step; put your final answer within \\boxed{}."
  r1jax rejection-sample MODEL gsm8k=a.jsonl mbpp=b.jsonl --out runs/mixed \\
      --share gsm8k=3 --share mbpp=1

Killed at any moment, the same command goes on and leaves the same files. DIR is never
overwritten; --force starts it anew.
"""


def add_verb(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Adds the verb; `add(name, about)` makes its parser."""
    verb = add(VERB, _ABOUT)
    verb.epilog = _EXAMPLES
    put = verb.add_argument
    put("source", metavar="MODEL", type=Path)
    put("data", metavar="DATA", nargs="*", help="[NAME=]FILE, as many as you like")
    put("--dataset", metavar="NAME", help="what is in DATA without a NAME=, or task:NAME")
    put("--out", required=True, type=Path, metavar="DIR", help="folder to write into")
    put("--samples", type=int, default=16, help="answers to each question (default: 16)")
    put("--keep", type=int, default=4, help="most that are kept of them (default: 4)")
    put(
        "--questions",
        type=int,
        metavar="N",
        help=f"so many, drawn (default: all; {DRAWN} of a task)",
    )
    put("--temperature", type=float, default=1.0, help="of the sampling (default: 1)")
    put("--top-p", type=float, default=1.0, help="nucleus (default: 1, which is all)")
    put("--max-tokens", type=int, help="of an answer (default: a run's own; else 512, if they fit)")
    put("--rows", type=int, default=64, help="answers sampled at once (default: 64)")
    put("--seed", type=int, default=0, help="of the noise and the draws (default: 0)")
    put("--decontaminate", nargs="+", action="extend", default=[], metavar="FILE", type=Path)
    put("--ngram", type=int, default=10, metavar="N", help="words in a row (default: 10)")
    put("--language", help="en, zh, ...: keep answers in it alone (default: any one language)")
    put("--longest-paragraph", type=int, default=400, metavar="WORDS", help="(default: 400)")
    put("--share", action="append", default=[], metavar="NAME=X", help="of a source in the traces")
    put("--template", choices=TEMPLATES, help="tags that answers must have (default: a run's own)")
    put("--system", help="the system turn, if the template has one (default: a run's own)")
    put("--instruction", metavar="TEXT", help="put after each question (default: a run's own)")
    put("--skip-bad-rows", action="store_true", help="leave out rows that do not parse; counted")
    put("--dtype", default="stored", choices=("stored", "float32", "bf16"), help="of the weights")
    put("--ignore-field", action="append", default=[], metavar="NAME", help="as in r1jax generate")
    put("--force", action="store_true", help="start anew: delete first what a run left in DIR")
    put("--json", action="store_true", help="print the statistics as JSON")


def run(args: argparse.Namespace, opened: Callable[[argparse.Namespace], Any]) -> None:
    """Runs the verb; `opened(args)` is the model."""
    from r1jax.data.text import UNDATED
    from r1jax.io import outdir
    from r1jax.rl.rejection import ngrams_of

    task = _task(args)
    questions, unreadable = _questions(args) if task is None else ([], 0)
    evaluation = ngrams_of(*_evaluation(args.decontaminate), n=args.ngram)
    config, habits = _config(args), _habits(args)
    # Wrong settings are refused before a large model is read.
    drawing, choice = _settings(args, habits)
    if not args.force and outdir.inspect(args.out, config) == "finished":
        _say(f"{args.out} is finished, nothing to do; --force starts it anew")
        _show(outdir.read_json(args.out / outdir.STATISTICS), args)
        return
    model = opened(args)
    if model.tokenizer is None:
        raise ValueError(f"{args.source}: has no tokenizer.json, so it cannot read a question")
    model.tokenizer.today = UNDATED
    if habits.max_tokens is None:  # the other half of a small context is for the question
        habits = habits._replace(max_tokens=min(ANSWER, model.cfg.max_position // 2))
        drawing = dataclasses.replace(drawing, max_tokens=habits.max_tokens)
    guard = evaluation if args.decontaminate else None
    if task is None:
        items, asked = _read(args, model, habits, questions, guard)
    else:
        items, asked = _generated(args, model, habits, task)
    asked["unreadable"] = unreadable
    with outdir.held(args.out, config, force=args.force):
        statistics = _sampled(args, model, (items, asked), (drawing, choice), guard)
    _show(statistics, args)


def _habits(args: argparse.Namespace) -> Any:
    """How questions are asked: as the model's run did, and as the flags say otherwise."""
    from r1jax.config import Difficulty, TaskConfig
    from r1jax.train.trained import Habits, habits_of
    from r1jax.train.words import template_of

    found = habits_of(args.source)
    if found is None:
        tagged = (args.dataset or "").startswith(TASK)
        found = Habits(template_of(TaskConfig()) if tagged else None, Difficulty())
    flags = {name: vars(args)[name] for name in ("max_tokens", "system", "instruction")}
    changes = {name: value for name, value in flags.items() if value is not None}
    if args.template is not None:
        changes["template"] = template_of(TaskConfig(template=args.template))
    return found._replace(**changes)


def _task(args: argparse.Namespace) -> str | None:
    """The task's name where problems are generated."""
    from r1jax.data.datasets import QUESTIONS
    from r1jax.data.tasks import TASKS

    name = args.dataset
    known = [*QUESTIONS, *(f"{TASK}{task}" for task in TASKS)]
    if name is not None and name not in known:
        raise ValueError(f"--dataset={name} must be one of {', '.join(known)}")
    if name is None or not name.startswith(TASK):
        if not args.data:
            raise ValueError("no DATA given: name the files, or --dataset task:arithmetic")
        return None
    if args.data:
        raise ValueError(f"--dataset={name} is generated and takes no DATA, got {args.data[0]}")
    return name.removeprefix(TASK)


def _named(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """(name of the format, file) of all DATA."""
    from r1jax.data.datasets import QUESTIONS

    found = []
    for text in args.data:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            name, path = args.dataset, text
        if name is None:
            raise ValueError(f"say what {text} is: --dataset NAME, or NAME={text}")
        if name not in QUESTIONS:
            raise ValueError(f"{text}: {name!r} must be one of {', '.join(QUESTIONS)}")
        found.append((name, Path(path)))
    return found


def _questions(args: argparse.Namespace) -> tuple[list[Any], int]:
    from r1jax.data.datasets import QUESTIONS, joined

    skip = args.skip_bad_rows
    rows = joined(QUESTIONS[name](path, skip=skip) for name, path in _named(args))
    for bad in rows.skipped[:5]:
        _say(f"skipped {bad}")
    if len(rows.skipped) > 5:
        _say(f"skipped {len(rows.skipped) - 5} more rows")
    return list(rows.items), len(rows.skipped)


def _evaluation(paths: list[Path]) -> tuple[list[str], list[str]]:
    """(questions, solutions) of all evaluation files."""
    from r1jax.data.datasets import evaluation_texts

    pairs = [evaluation_texts(path) for path in paths]
    return [q for some, _ in pairs for q in some], [s for _, some in pairs for s in some]


def _config(args: argparse.Namespace) -> dict[str, Any]:
    """What makes the folder this run's: every flag that has a say in the traces, and the data."""
    apart = {"verb", "version", "overrides", "out", "force", "json", "data", "decontaminate"}
    config = {k: v for k, v in vars(args).items() if k not in apart}
    config["source"] = str(args.source.resolve())
    named = [] if (args.dataset or "").startswith(TASK) else _named(args)
    # By name and content, wherever they lie; two files of one name are told apart by their place.
    config["data"] = {
        f"{i}: {name}={path.name}": _digest(path) for i, (name, path) in enumerate(named)
    }
    config["decontaminate"] = {
        f"{i}: {path.name}": _digest(path) for i, path in enumerate(args.decontaminate)
    }
    return {"rejection_sample": config}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _settings(args: argparse.Namespace, habits: Any) -> tuple[Any, Any]:
    """(how to draw, how to choose)."""
    from r1jax.rl.rewards.language import SCRIPTS
    from r1jax.train.rejection import Drawing
    from r1jax.train.selection import Choice

    if args.language is not None and args.language not in SCRIPTS:
        raise ValueError(f"--language={args.language} must be one of {', '.join(sorted(SCRIPTS))}")
    if args.questions is not None and args.questions < 1:
        raise ValueError(f"--questions={args.questions} must be at least 1")
    drawing = Drawing(
        samples=args.samples,
        temperature=args.temperature,
        top_p=args.top_p,
        max_tokens=ANSWER if habits.max_tokens is None else habits.max_tokens,
        rows=args.rows,
        seed=args.seed,
    )
    choice = Choice(
        keep=args.keep,
        template=habits.template,
        language=args.language,
        longest_paragraph=args.longest_paragraph,
        shares=_shares(args) or None,
        seed=args.seed,
    )
    return drawing, choice


def _shares(args: argparse.Namespace) -> dict[str, float]:
    sources = {name for name, _ in _named(args)} if args.data else {args.dataset}
    found = {}
    for text in args.share:
        name, _, number = text.partition("=")
        try:
            found[name] = float(number)
        except ValueError as error:
            raise ValueError(f"--share={text}: write NAME=X, as in gsm8k=0.5") from error
        if not 0 < found[name] < float("inf"):
            raise ValueError(f"--share={text}: the share must be a positive number")
    if found and set(found) != sources:
        raise ValueError(f"--share: name each of {', '.join(sorted(sources))}, and no other")
    return found


def _generated(args, model, habits, task: str):
    """Problems of a task: (what is sampled, what became of them)."""
    from r1jax.train.asking import task_items

    wanted = args.questions or DRAWN
    items = task_items(task, wanted, model.tokenizer, difficulty=habits.difficulty, seed=args.seed)
    longest = max(len(item.ids) for item in items)
    if longest + habits.max_tokens > model.cfg.max_position:
        raise _no_room(model, habits, str(longest))
    return items, {"read": wanted, "sampled": len(items)}


def _read(args, model, habits, questions, evaluation):
    """Questions of files: (what is sampled, what became of them)."""
    from r1jax.train.asking import Room, Wording, items_of

    room = Room(model.cfg.max_position - habits.max_tokens, args.questions, args.seed)
    wording = Wording(habits.system, habits.instruction)
    items, asked = items_of(questions, model.tokenizer, wording, room=room, evaluation=evaluation)
    if not items and asked["too_long"]:
        raise _no_room(model, habits, "more")
    if not items:
        raise ValueError(f"no question is left: {_counted(asked)}")
    return items, asked


def _no_room(model, habits, longest: str) -> ValueError:
    most = model.cfg.max_position
    return ValueError(
        f"--max-tokens={habits.max_tokens} leaves {most - habits.max_tokens} tokens of the model's "
        f"{most} for prompts, which take {longest}; lower it"
    )


def _sampled(args, model, items_asked, settings, evaluation) -> dict[str, Any]:
    from r1jax.cli import display as displays
    from r1jax.train import rejection
    from r1jax.train.verifying import verifier

    items, asked = items_asked
    drawing, choice = settings
    display = displays.open_display(sys.stderr)
    log, handler = logging.getLogger("r1jax"), displays.LogToDisplay(display)
    log.addHandler(handler)
    try:
        with verifier([item.answer for item in items], choice.template) as verify:
            how = rejection.Run(args.out, drawing, choice, verify, evaluation, display)
            return rejection.run(model, items, how, asked=asked)
    finally:
        log.removeHandler(handler)
        display.close()


def _show(statistics: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(statistics, indent=2, ensure_ascii=False))
    else:
        write_statistics(statistics, sys.stdout)
        print(f"traces: {args.out / 'traces.jsonl'}\npairs:  {args.out / 'pairs.jsonl'}")
    if not statistics["kept"]:
        _say("nothing was kept; raise --samples or --questions, or look into samples/")


def write_statistics(statistics: dict[str, Any], out: Any) -> None:
    """The statistics as lines for people."""
    print(f"questions  {_counted(statistics['questions'])}", file=out)
    print(f"samples    {statistics['sampled']:,}", file=out)
    for name, step in statistics["dropped"].items():
        left = step["seen"] - step["dropped"]
        words = name.replace("_", " ")
        print(f"  {words:16} {step['dropped']:>9,} dropped {left:>9,} left", file=out)
    print(f"kept       {statistics['kept']:,}\n", file=out)
    head = ("source", "questions", "solved", "kept of", "pass rate", "tokens", "kept")
    rows = [head]
    for name, s in statistics["by_source"].items():
        numbers = (s["questions"], s["questions_solved"], s["questions_kept"])
        rate, tokens = f"{100 * s['pass_rate']:.1f} %", f"{s['mean_tokens']:.0f}"
        rows.append((name, *(f"{n:,}" for n in numbers), rate, tokens, f"{s['kept']:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *cells]), file=out)


def _counted(counts: dict[str, int]) -> str:
    shown = {k: n for k, n in counts.items() if n or k in ("read", "sampled")}
    return ", ".join(f"{n:,} {k.replace('_', ' ')}" for k, n in shown.items())


def _say(text: str) -> None:
    print(f"r1jax: {text}", file=sys.stderr)
