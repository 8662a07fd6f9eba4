# SPDX-License-Identifier: Apache-2.0
"""Configs are compared leaf by leaf, and the leaves that differ are named."""

import pytest

from r1jax.io.same_config import check_config, config_difference


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ({"a": {"b": 1}, "c": None}, []),
        ({"a": {"b": 1.5}, "c": None}, ["a.b: saved 1, asked for 1.5"]),
        ({"a": {"b": 1}}, ["c: saved None, asked for nothing"]),
        ({"a": 1, "c": None}, ["a: saved nothing, asked for 1", "a.b: saved 1, asked for nothing"]),
    ],
)
def test_config_difference(new, said):
    assert config_difference({"a": {"b": 1}, "c": None}, new) == said


def test_tuples_equal_lists_but_true_is_not_one_and_a_half():
    assert config_difference({"a": (1, 2), "b": {}}, {"a": [1, 2], "b": {}}) == []
    assert config_difference({"a": [1, 2]}, {"a": [2, 1]})
    assert config_difference({"b": {}}, {"b": {"c": 1}})


def test_another_kind_of_run_is_named_instead_of_its_fields():
    sft, recipe = {"trainer": "sft", "seed": 0}, {"rl_1": {"steps": 1}, "seed": 0}
    drawn = {"rejection_sample": {"seed": 0}}
    for saved, asked, said in (
        (sft, recipe, r"out holds a run of the trainer sft, not a run of the recipe; choose"),
        (recipe, {**sft, "trainer": "dpo"}, r"a run of the recipe, not a run of the trainer dpo"),
        (drawn, sft, r"traces of rejection sampling, not a run of the trainer sft"),
    ):
        with pytest.raises(ValueError, match=said):
            check_config(saved, asked, where="out")


def test_fields_that_an_older_version_lacked_are_told_from_changed_ones():
    old = {f"a{i}": 0 for i in range(5)} | {"z": 3}
    new = {f"b{i}": 0 for i in range(5)} | {"z": 4}
    with pytest.raises(
        ValueError, match=r"an older version of r1jax .*\(.*z: saved 3, asked for 4"
    ):
        check_config(old, old | new, where="out")
    with pytest.raises(ValueError, match=r"made by another config \(z: saved 3"):
        check_config({"z": 3}, {"z": 4}, where="out")


def test_many_differences_stay_one_line():
    old = {f"f{i}": i for i in range(9)}
    check_config(old, dict(old), where="out")
    with pytest.raises(ValueError, match="f0: saved 0, asked for 1; .* and 4 more") as error:
        check_config(old, {k: v + 1 for k, v in old.items()}, where="out")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("out was made by another config")
