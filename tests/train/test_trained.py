# SPDX-License-Identifier: Apache-2.0
"""What a run's folder tells of how its questions were asked."""

import dataclasses
from pathlib import Path

import pytest

from r1jax.config import (
    Difficulty,
    QuestionData,
    RewardConfig,
    laptop,
    quickstart,
    to_config_dict,
)
from r1jax.data.template import PRIMER_RL, R1
from r1jax.io import outdir
from r1jax.train.trained import Habits, config_of, habits_of

EASY = Difficulty(arithmetic_operations=(1,))


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def ran(path, config):
    """The folder of a run that has written nothing else yet."""
    outdir.claim(path, to_config_dict(config).to_dict())
    return Path(path)


def test_a_recipe_and_its_stages():
    recipe = quickstart()
    run = ran("runs/quickstart", recipe)
    assert config_of(run) == recipe
    asked = Habits(R1, recipe.tasks.difficulty, recipe.sampling.max_new_tokens)
    assert habits_of(run) == habits_of(run / "rl_1") == asked


def test_a_run_that_asks_says_how():
    data = QuestionData("gsm8k", "train.jsonl", system="S", instruction="I", template="primer")
    grpo = dataclasses.replace(laptop.grpo(), data=data)
    run = ran("asked", grpo)
    asked = Habits(PRIMER_RL, Difficulty(), grpo.sampling.max_new_tokens, "S", "I")
    assert habits_of(run) == habits_of(run / "model") == asked
    plain = dataclasses.replace(data, template="plain")
    stage = dataclasses.replace(grpo.grpo, reward=RewardConfig(format=0.0))
    assert (
        habits_of(ran("plain", dataclasses.replace(grpo, data=plain, grpo=stage))).template is None
    )


def test_a_run_that_asks_nothing_has_the_habits_of_the_one_before():
    difficult = dataclasses.replace(laptop.ppo(), data=QuestionData(difficulty=EASY))
    ran("first", difficult)
    between = dataclasses.replace(laptop.dpo("pairs.jsonl"), start=laptop.StartConfig("first"))
    ran("second", between)
    ran("third", dataclasses.replace(laptop.distill("x"), start=laptop.StartConfig("second/model")))
    assert habits_of(Path("third")).difficulty == EASY
    ran("fourth", dataclasses.replace(between, start=laptop.StartConfig("a/model/from/elsewhere")))
    assert habits_of(Path("fourth")) is None
    assert habits_of(Path("no/run")) is None
