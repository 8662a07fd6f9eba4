# SPDX-License-Identifier: Apache-2.0
"""Config files and overrides: typed by what is there, refused with the near names."""

import ml_collections
import pytest

from r1jax import config as schema
from r1jax.cli import overrides


def make_config():
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "name": "tiny",
            "tasks": ("countdown", "quadratic"),
            "weights": (1.0, 2.0),
            "nothing": (),
            "grpo": {"steps": 10, "beta": 0.04, "shared": True, "top_k": None},
            "optim": {"learning_rate": 1e-3, "clip": {"norm": 1.0}},
        }
    )


def value_of(config, path):
    return dict(overrides.fields_of(config))[path]


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("seed", "7", 7),
        ("seed", "-7", -7),
        ("name", "a=b c", "a=b c"),
        ("name", "3", "3"),
        ("grpo.steps", "1_000", 1000),
        ("grpo.beta", "1", 1.0),
        ("grpo.beta", "3e-6", 3e-6),
        ("grpo.shared", "false", False),
        ("grpo.shared", "True", True),
        ("grpo.shared", "0", False),
        ("grpo.steps", "None", None),
        ("grpo.top_k", "5", 5),
        ("grpo.top_k", "0.5", 0.5),
        ("grpo.top_k", "none", None),
        ("grpo.top_k", "__import__('os')", "__import__('os')"),
        ("tasks", "arithmetic", ("arithmetic",)),
        ("tasks", "a, b,c", ("a", "b", "c")),
        ("tasks", "('a', \"b\")", ("a", "b")),
        ("weights", "(1,2,)", (1.0, 2.0)),
        ("weights", "()", ()),
        ("nothing", "1,x", (1, "x")),
        ("optim.clip.norm", "0.5", 0.5),
    ],
)
def test_text_is_read_by_the_type_of_the_present_value(path, text, value):
    config = make_config()
    overrides.apply(config, [(path, text)])
    assert value_of(config, path) == value
    assert type(value_of(config, path)) is type(value)


def test_the_last_one_wins_and_the_rest_stays():
    config, before = make_config(), make_config()
    overrides.apply(
        config, [("seed", "1"), ("grpo.top_k", "2"), ("grpo.top_k", "3"), ("seed", "0")]
    )
    assert value_of(config, "grpo.top_k") == 3
    with config.ignore_type():
        config.grpo.top_k = None
    assert config == before


@pytest.mark.parametrize(
    ("path", "text", "kind"),
    [
        ("seed", "1.5", "int"),
        ("seed", "", "int"),
        ("grpo.steps", "many", "int"),
        ("grpo.beta", "low", "float"),
        ("grpo.shared", "maybe", "bool"),
        ("grpo.shared", "2", "bool"),
        ("weights", "1,x", "tuple of float"),
    ],
)
def test_text_of_another_type_is_refused_and_nothing_changes(path, text, kind):
    config = make_config()
    with pytest.raises(ValueError, match=f"config field {path}=") as error:
        overrides.apply(config, [(path, text)])
    assert f"not of type {kind}" in str(error.value)
    assert config == make_config()


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("grpo.step", "grpo.steps"),
        ("steps", "grpo.steps"),
        ("grpo.learning_rate", "optim.learning_rate"),
        ("optim.learning_rte", "optim.learning_rate"),
        ("norm", "optim.clip.norm"),
        ("optim", "one of its fields: optim.clip.norm, optim.learning_rate"),
        ("zzz", "first level is: grpo, name, nothing, optim, seed, tasks, weights"),
    ],
)
def test_an_unknown_field_lists_the_near_ones(path, near):
    with pytest.raises(ValueError, match="config field") as error:
        overrides.apply(make_config(), [(path, "1")])
    assert near in str(error.value)
    assert "\n" not in str(error.value)


def test_every_field_of_the_schema_takes_its_own_value_back():
    config = schema.to_config_dict(schema.RecipeConfig())
    for path, value in list(overrides.fields_of(config)):
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        overrides.apply(config, [(path, text)])
    assert schema.from_config_dict(schema.RecipeConfig, config) == schema.RecipeConfig()


def write(path, text):
    path.write_text(text)
    return path


GOOD = """
import ml_collections
def get_config():
    return ml_collections.ConfigDict({"seed": 3})
"""


def test_loading_a_file(tmp_path):
    assert overrides.load(write(tmp_path / "a.py", GOOD)).seed == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = (", "SyntaxError"),
        ("import no_such_module_at_all", "no_such_module_at_all"),
        ("def get_config(): return 1 / 0", "ZeroDivisionError"),
        ("x = 1", "get_config"),
        ("def get_config(): return {}", "returned dict"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, text, said):
    path = write(tmp_path / "bad.py", text)
    with pytest.raises(ValueError, match=str(path)) as error:
        overrides.load(path)
    assert said in str(error.value)


def test_a_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "quickstart.py", GOOD)
    with pytest.raises(ValueError, match=r"no such file; near: .*quickstart\.py"):
        overrides.load(tmp_path / "quickstrat.py")
    with pytest.raises(ValueError, match="no such file$"):
        overrides.load(tmp_path / "no" / "x.py")
    with pytest.raises(ValueError, match="not a Python file"):
        overrides.load(write(tmp_path / "config.yaml", "a: 1"))
