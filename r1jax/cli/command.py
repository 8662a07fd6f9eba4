# SPDX-License-Identifier: Apache-2.0
"""`r1jax VERB [--flags]`: parses, asks one program to run, shows the result.

Results go to stdout, progress and errors to stderr. Exit status: 0 done, 1 failed while running,
2 the command or its input is wrong (nothing was overwritten), 130 interrupted (the same command
resumes).
"""

import argparse
import functools
import json
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from r1jax.cli import interrupt, models, pages, plan, rejection, together
from r1jax.train.failure import Preempted, StageFailed

# Programs and JAX are imported where they are called: `--help` and a wrong flag answer at once.

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
_LONG = ("quickstart", "train", rejection.VERB)  # they can be interrupted and resumed

_ABOUT = """\
The DeepSeek-R1 system in JAX: a DeepSeek-V3-shaped model goes through every stage
of the R1 recipe (pre-training, cold-start SFT, GRPO, rejection sampling and SFT, a
second RL stage, distillation into two dense students) and is measured on held-out
problems after each.

verbs:
  quickstart  the whole recipe on a laptop, in minutes
  train       what a config file describes: the recipe, or one trainer
  rejection-sample
              a model's right answers as training data
  generate    an answer of a model, streaming
  chat        a conversation with a model
  info        how large a model is
  plan        whether a step fits a TPU pod, without the pod
  import      a Hugging Face or GGUF checkpoint into r1jax
  export      a model into a Hugging Face checkpoint
"""
_EXAMPLES = """\
examples:
  r1jax quickstart                        the whole recipe on a laptop, in minutes
  r1jax quickstart --seed=1 --out=runs/b  another seed, in a folder beside it
  r1jax train --config=configs/quickstart.py --config.rl_1.steps=50
                                          the same in the open, any field changed
  r1jax generate runs/quickstart --prompt "compute 3 * 5 - 2 + 4" --draft 2
  r1jax VERB --help                       what a verb takes and leaves behind

Ctrl-C loses nothing: the same command resumes. An output folder is never overwritten;
--force starts it anew. Exit status: 0 done, 1 failed while running, 2 wrong command
or input, 130 interrupted.
"""
_QUICKSTART = """\
Runs the whole recipe on small generated tasks, with a model of under a million
parameters that has every mechanism of the large one: latent attention, routed experts
in groups, multi-token prediction. It takes minutes on two processor cores and
downloads nothing. It leaves in the output folder:

  report.html    curves, stage table, answers before and after RL: open it in a browser
  summary.json   the figures of every stage, versions, seed, host
  metrics.jsonl  one row per logged step
  checkpoints/   what a resumed run starts from (Orbax)

The same in the open: r1jax train --config=configs/quickstart.py
"""
_TRAIN = f"""\
Runs what a config file describes: the whole recipe (configs/quickstart.py), which leaves
what quickstart leaves, or one trainer, sft, grpo, ppo, dpo or reward_model
(configs/r1_zero_laptop.py and others), which leaves:

  model/         what was trained: a MODEL for r1jax generate, the start of the next run
  summary.json   the figures before and after, versions, seed, host
  metrics.jsonl  one row per logged step
  curves.png     the same as a picture
  checkpoints/   what a resumed run starts from (Orbax)

The file is Python; its function get_config() returns an ml_collections.ConfigDict. Any
field is changed by its path, as often as you like:

  --config.seed=3  --config.tasks.names=countdown,arithmetic  --config.sampling.top_p=None

A field that does not exist, or a value of another type, is refused, and the fields with
near names are listed. All fields of a file, with their values:

  r1jax train --config=configs/r1_zero_laptop.py --help

{together.HELP}"""
_LEFT = (("report", "report.html"), ("curves", "curves.png"), ("model", "model"))


_format = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=24, width=88)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of repeating the usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def console() -> int:
    """The command in a process of its own, which a long verb may start anew: see `pages`."""
    if sys.argv[1:2] and sys.argv[1] in _LONG:
        pages.ask()
    code = main()
    program = sys.modules.get("r1jax.train.program")
    if program is not None and program.compiling():  # of a run that failed: it would be waited for
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(code)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: arguments without the program's name; those of the process by default.

    Returns:
      the exit status.
    """
    code, why = _outcome(sys.argv[1:] if argv is None else argv)
    if together.several():
        together.leave(code, why)
    return code


def _outcome(argv: Sequence[str]) -> tuple[int, str]:
    """The exit status, and why the other processes of a run must end too, if they must."""
    try:
        args = _parse(argv)
        with interrupt.heard():
            return _run(args), ""
    except KeyboardInterrupt as error:
        resumes = argv[0] in _LONG
        _say("interrupted; the same command resumes" if resumes else "interrupted")
        code = DONE if isinstance(error, Preempted) and together.several() else INTERRUPTED
        # All stop together where the loop says what it saved.
        return code, "" if str(error) else "interrupted"
    except ValueError as error:
        if not _ours(error):
            return _failed()
        text = " ".join(str(error).split())
        _say(f"error: {text}")
        return WRONG, text
    except StageFailed as error:
        _say(f"failed: {error}")
        return FAILED, str(error)
    except BrokenPipeError:  # the reader of stdout has seen enough
        sys.stdout = None
        return DONE, ""
    except Exception:  # the edge of the program: whatever went wrong is shown and becomes a status
        return _failed()


def _parser(fields: str = "") -> argparse.ArgumentParser:
    """The grammar; `fields` are shown at the end of the help of train."""
    parser = _Parser(
        prog="r1jax",
        usage="r1jax VERB [--flags]",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=_format,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the versions in use and exit")
    # The verbs are listed in _ABOUT: argparse would not give them one line each.
    verbs = parser.add_subparsers(
        prog="r1jax", dest="verb", metavar="VERB", parser_class=_Parser, help=argparse.SUPPRESS
    )
    _add_run(verbs, "quickstart", _QUICKSTART)
    train = _add_run(verbs, "train", _TRAIN)
    train.epilog = fields
    train.add_argument("--config", required=True, metavar="FILE", help="the config file, a path")
    together.add_flags(train)
    rejection.add_verb(functools.partial(_add_verb, verbs))
    models.add_verbs(functools.partial(_add_verb, verbs))
    plan.add_verb(functools.partial(_add_verb, verbs))
    return parser


def _add_verb(verbs: Any, name: str, about: str) -> argparse.ArgumentParser:
    return verbs.add_parser(name, description=about, formatter_class=_format, allow_abbrev=False)


def _add_run(verbs: Any, name: str, about: str) -> argparse.ArgumentParser:
    """A verb that runs a recipe into an output folder."""
    verb = _add_verb(verbs, name, about)
    add = verb.add_argument
    add("--out", type=Path, metavar="DIR", help="output folder (default: runs/ and the run's name)")
    add("--seed", type=int, metavar="N", help="random seed (default: the config's)")
    add("--force", action="store_true", help="start anew: delete first what a run left in DIR")
    add("--json", action="store_true", help="print the summary as JSON")
    return verb


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with `overrides`: (path, text) of every `--config.path=text`."""
    overrides, rest = [], []
    for arg in argv:
        if arg.startswith("--config."):
            path, equals, text = arg.removeprefix("--config.").partition("=")
            if not equals:
                raise ValueError(f"{arg} has no value; write {arg}=VALUE, with the equals sign")
            overrides.append((path, text))
        else:
            rest.append(arg)
    args = _parser(_fields(rest)).parse_args(rest)
    args.overrides = overrides
    if overrides and args.verb not in ("train", "plan"):
        raise ValueError("--config.FIELD=VALUE belongs to: r1jax train|plan --config=FILE")
    if args.verb is None and not args.version:
        raise ValueError("no verb given: try r1jax quickstart, or r1jax --help")
    return args


def _fields(argv: Sequence[str]) -> str:
    """Where help on a config file is asked for: its fields, as they would be typed."""
    if argv[:1] != ["train"] or not {"-h", "--help"} & set(argv):
        return ""
    asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    asked.add_argument("--config")
    path = asked.parse_known_args(argv)[0].config
    if path is None:
        return ""
    from r1jax.cli import overrides

    fields = overrides.shown(overrides.load(path))
    lines = (f"  {shlex.quote(f'--config.{name}={value}')}" for name, value in fields)
    return "\n".join([f"fields of {path}:", *lines])


def _run(args: argparse.Namespace) -> int:
    if args.version:
        from r1jax.eval.summary import versions

        print("  ".join(f"{name} {version}" for name, version in versions().items()))
        return DONE
    if args.verb == rejection.VERB:
        rejection.run(args, models.opened)
        return DONE
    if args.verb in models.VERBS:
        models.run(args)
        return DONE
    if args.verb == "plan":
        return plan.run(args)
    from r1jax import config as schema
    from r1jax.cli import overrides
    from r1jax.eval.summary import read_summary
    from r1jax.io import outdir

    if args.verb == "train":
        tree = overrides.load(args.config)
        if "trainer" in dict(args.overrides):
            raise ValueError(
                f"--config.trainer: {args.config} is a config of one trainer, and its fields are; "
                "start from a file of the other"
            )
        out = args.out or Path("runs") / Path(args.config).stem
    else:
        tree = schema.to_config_dict(schema.quickstart())
        out = args.out or Path("runs") / "quickstart"
    overrides.apply(tree, args.overrides)
    if args.seed is not None:
        overrides.apply(tree, [("seed", str(args.seed))])
    config = schema.from_config_dict(_schema_of(tree), tree)
    as_dict = schema.to_config_dict(config).to_dict()
    if args.verb == "train" and together.join(args):
        return _in_company(config, out, args)
    if not args.force and outdir.inspect(out, as_dict) == "finished":
        summary = read_summary(out)
        _say(f"{out} is finished, nothing to do; --force starts it anew")
    else:
        summary = _train(config, out, force=args.force)
    _show(summary, out, as_json=args.json)
    return DONE


def _in_company(config: Any, out: Path, args: argparse.Namespace) -> int:
    """`train` as one of several processes, of which the first alone shows what happens."""
    from r1jax import config as schema
    from r1jax.parallel import hosts

    if isinstance(config, schema.RecipeConfig):
        raise ValueError(
            f"{args.config} is the whole recipe, which runs in one process; a run of several is of "
            "one trainer (configs/r1_stage1_671b.py), or give --coordinator=none"
        )
    said = [schema.to_config_dict(config).to_dict(), str(out.absolute()), args.force]
    hosts.check_same(said, "the config, --out or --force")
    summary = _train(config, out, force=args.force)
    if hosts.is_first():
        _show(summary, out, as_json=args.json)
    return DONE


def _schema_of(tree: Any) -> type:
    """What a config file describes: the recipe, or the trainer that its field `trainer` names."""
    from r1jax.config import RUNS, PlanConfig, RecipeConfig

    if "trainer" not in tree:
        if set(tree) == set(PlanConfig.__dataclass_fields__):
            raise ValueError("the config is of a model, for r1jax plan and info, and of no run")
        return RecipeConfig
    if tree.trainer not in RUNS:
        raise ValueError(f"trainer must be one of {', '.join(RUNS)}, got {tree.trainer!r}")
    return RUNS[tree.trainer]


def _train(config: Any, out: Path, *, force: bool) -> dict[str, Any]:
    from r1jax import config as schema
    from r1jax.cli import display as displays
    from r1jax.parallel import hosts
    from r1jax.train.progress import Silent
    from r1jax.train.recipe import run
    from r1jax.train.runs import run_trainer

    shows = not together.several() or hosts.is_first()
    display = displays.open_display(sys.stderr) if shows else Silent()
    log, handler = logging.getLogger("r1jax"), displays.LogToDisplay(display)
    log.addHandler(handler)
    try:
        program = run if isinstance(config, schema.RecipeConfig) else run_trainer
        return program(config, out, display=display, force=force)
    finally:
        log.removeHandler(handler)
        display.close()


def _show(summary: dict[str, Any], out: Path, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
        return
    from r1jax.cli.table import write_table

    write_table(summary, sys.stdout)
    for what, name in _LEFT:
        if (out / name).exists():
            print(f"{what}: {out / name}")


def _ours(error: BaseException) -> bool:
    """Whether this library raised it. A ValueError from below it is a fault, not a wrong input."""
    frame = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(frame).is_relative_to(Path(__file__).parents[1])


def _failed() -> tuple[int, str]:
    error = sys.exception()
    if together.several():
        together.settle()
    traceback.print_exception(error)
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    _say(f"failed: {text}")
    return FAILED, text


def _say(text: str) -> None:
    print(f"r1jax: {together.name()}{text}", file=sys.stderr)
