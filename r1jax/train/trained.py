# SPDX-License-Identifier: Apache-2.0
"""A run as a model to use: what it trained, with its tokenizer, and how it asked its questions."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from r1jax.config import (
    RUNS,
    Difficulty,
    GRPORun,
    PPORun,
    RecipeConfig,
    RunConfig,
    TaskConfig,
    from_config_dict,
)
from r1jax.data.template import Template, prompt
from r1jax.data.text import TextTokenizer
from r1jax.data.tokenizer import task_tokenizer
from r1jax.io import checkpoint
from r1jax.io.model import Model, open_model
from r1jax.io.outdir import MARKER
from r1jax.nn.build import blank
from r1jax.nn.param import RouterBias, filled, leaves
from r1jax.train.words import template_of

DEFAULT = "rl_2"
MODEL = "model"  # what a run of one trainer leaves in its folder


class Habits(NamedTuple):
    """How a run asked its questions.

    Attributes:
        template: the tags of its answers; None for text without.
        difficulty: of a task's problems.
        max_tokens: most of an answer; None where nothing is known.
        system, instruction: around each question, as in `QuestionData`.
    """

    template: Template | None
    difficulty: Difficulty
    max_tokens: int | None = None
    system: str = ""
    instruction: str = ""


def is_run(path: Path) -> bool:
    """Whether `path` is the folder of a run, or of a run and a stage of it: RUN or RUN/STAGE."""
    return (path / MARKER).is_file() or (path.parent / MARKER).is_file() and not path.exists()


def config_of(run: Path) -> RecipeConfig | RunConfig:
    """What made the folder of a run.

    Raises:
        ValueError: it holds what is no run of a recipe or a trainer, or another version wrote it.
    """
    try:
        saved: dict[str, Any] = json.loads((run / MARKER).read_text("utf-8"))["config"]
        kind = RUNS[saved["trainer"]] if "trainer" in saved else RecipeConfig
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run / MARKER}: is damaged: {error!r}") from error
    if "rejection_sample" in saved:
        source = saved["rejection_sample"].get("source")
        raise ValueError(
            f"{run} holds traces of rejection sampling and no model: it is data to train on "
            f"(traces.jsonl, pairs.jsonl); they were sampled from {source}"
        )
    try:
        return from_config_dict(kind, saved)
    except ValueError as error:
        raise ValueError(
            f"{run} was written by an older version of r1jax, whose config was another ({error}); "
            "use that version, or run it again with --force"
        ) from error


def habits_of(path: Path) -> Habits | None:
    """How the run that left a model asked its questions, or the one before it that had any.

    Args:
        path: RUN, RUN/STAGE or RUN/model; of anything else nothing is known.
    """
    run = path if (path / MARKER).is_file() else path.parent
    if not (run / MARKER).is_file():
        return None
    cfg = config_of(run)
    if isinstance(cfg, RecipeConfig):
        tasks = cfg.tasks
        return Habits(template_of(tasks), tasks.difficulty, cfg.sampling.max_new_tokens)
    if not isinstance(cfg, GRPORun | PPORun):
        return habits_of(Path(cfg.start.path))
    data, longest = cfg.data, cfg.sampling.max_new_tokens
    tagged = data.template != "plain"
    template = template_of(TaskConfig(template=data.template)) if tagged else None
    return Habits(template, data.difficulty, longest, data.system, data.instruction)


def open_run(path: Path, *, mesh: jax.sharding.Mesh | None = None) -> Model:
    """The model that a run, or a stage of one, left.

    Args:
        path: RUN (of a recipe its `rl_2`) or RUN/STAGE, as `runs/quickstart/student_qwen2`.
        mesh: as for `open_model`; of a recipe's run nothing is laid out.

    Raises:
        ValueError: no such stage, or it has not been finished; or as `config_of`.
    """
    run, stage = (path, DEFAULT) if (path / MARKER).is_file() else (path.parent, path.name)
    cfg = config_of(run)
    if isinstance(cfg, RecipeConfig):
        return _stage(run, stage, cfg)
    if path != run:
        raise ValueError(f"{run} is a run of the trainer {cfg.trainer}: its model is {run / MODEL}")
    if not (run / MODEL).is_dir():
        raise ValueError(f"{run} has not been finished, so it has no model yet; run it on")
    return open_model(run / MODEL, mesh=mesh)


def _stage(run: Path, stage: str, recipe: RecipeConfig) -> Model:
    folder = run / "checkpoints" / stage
    found = sorted(p.name for p in (run / "checkpoints").glob("*"))
    step = checkpoint.latest(folder)
    if step is None:
        raise ValueError(f"{run} has no stage {stage!r}; it has {', '.join(found) or 'none yet'}")
    students = {"qwen2": recipe.students.qwen2, "llama": recipe.students.llama}
    cfg = students.get(stage.partition("_")[2], recipe.model)
    empty = blank(cfg)
    _, params, router = nnx.split(empty, nnx.Param, RouterBias)
    wanted = {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "params": nnx.to_pure_dict(params),
        "router": nnx.to_pure_dict(router),
        "opt": (),
    }
    if "record" not in checkpoint.read_meta(folder, step):
        raise ValueError(f"{run}: the stage {stage} has not been finished; run the recipe on")
    tree = checkpoint.restore(folder, step, {"state": wanted})["state"]
    values = {path: _at(tree["params"], path) for path in leaves(empty) if not _is_bias(path)}
    values |= {path: _at(tree["router"], path) for path in leaves(empty) if _is_bias(path)}
    return Model(cfg, filled(empty, values), task_words(template_of(recipe.tasks)))


def _is_bias(path: str) -> bool:
    return path.endswith("router.bias")


def _at(tree, path: str):
    for key in path.split("."):
        tree = tree[key]
    return tree


def task_words(template: Template) -> TextTokenizer:
    """The tasks' words, with the recipe's prompt as the chat template of the last user turn."""
    words = task_tokenizer()
    question = prompt("{{ messages[-1]['content'] }}", template)
    config = {
        "bos_token": template.bos,
        "eos_token": template.eos,
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "chat_template": question,
    }
    return TextTokenizer(words.inner, config)
