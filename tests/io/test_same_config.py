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


def test_many_differences_stay_one_line():
    old = {f"f{i}": i for i in range(9)}
    check_config(old, dict(old), where="out")
    with pytest.raises(ValueError, match="f0: saved 0, asked for 1; .* and 4 more") as error:
        check_config(old, {k: v + 1 for k, v in old.items()}, where="out")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("out was made by another config")
