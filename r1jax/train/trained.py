# SPDX-License-Identifier: Apache-2.0
"""A stage of a recipe's run as a model to use: what it trained, with its tokenizer."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from r1jax.config import RecipeConfig, from_config_dict
from r1jax.data.template import Template, prompt
from r1jax.data.text import TextTokenizer
from r1jax.data.tokenizer import task_tokenizer
from r1jax.io import checkpoint
from r1jax.io.model import Model
from r1jax.io.outdir import MARKER
from r1jax.nn.build import blank
from r1jax.nn.param import RouterBias, filled, leaves
from r1jax.train.words import template_of

DEFAULT = "rl_2"


def is_run(path: Path) -> bool:
    """Whether `path` is the folder of a run, or of a run and a stage of it: RUN or RUN/STAGE."""
    return (path / MARKER).is_file() or (path.parent / MARKER).is_file() and not path.exists()


def recipe_of(path: Path) -> RecipeConfig:
    """The recipe of RUN or RUN/STAGE; ValueError if it is a run of another kind."""
    run = path if (path / MARKER).is_file() else path.parent
    return from_config_dict(RecipeConfig, json.loads((run / MARKER).read_text("utf-8"))["config"])


def open_run(path: Path) -> Model:
    """The model that a stage left.

    Args:
        path: RUN (its `rl_2`) or RUN/STAGE, as `runs/quickstart/student_qwen2`.

    Raises:
        ValueError: no such stage, or it has not been finished.
    """
    run, stage = (path, DEFAULT) if (path / MARKER).is_file() else (path.parent, path.name)
    folder = run / "checkpoints" / stage
    found = sorted(p.name for p in (run / "checkpoints").glob("*"))
    step = checkpoint.latest(folder)
    if step is None:
        raise ValueError(f"{run} has no stage {stage!r}; it has {', '.join(found) or 'none yet'}")
    recipe = recipe_of(path)
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
