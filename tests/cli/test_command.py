# SPDX-License-Identifier: Apache-2.0
"""The command: what it runs and says, how it ends, and what it never overwrites."""

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import r1jax.train
from r1jax import config as schema
from r1jax.cli import main
from r1jax.io import outdir

ROOT = Path(__file__).resolve().parents[2]
STAGE = {"name": "rl_1", "parameters": 1000, "steps": 5, "seconds": 1.5, "pass_at_1": 0.875}


class Recipe:
    """Stands in for the recipe: claims the folder, does what it is told, leaves a summary."""

    def __init__(self):
        self.calls, self.error = [], None

    def run(self, config, out, *, display, force):
        self.calls.append((config, out, force))
        outdir.claim(out, schema.to_config_dict(config).to_dict(), force=force)
        display.stage("rl_1", 5)
        if self.error is not None:
            raise self.error
        summary = {"stages": [STAGE], "seed": config.seed}
        (out / "report.html").touch()
        outdir.write_json(out / outdir.SUMMARY, summary)
        return summary


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    """The command with a recipe that takes no time, in an empty working directory."""
    fake = Recipe()
    module = types.ModuleType("r1jax.train.recipe")
    module.run = fake.run
    monkeypatch.setitem(sys.modules, "r1jax.train.recipe", module)
    monkeypatch.setattr(r1jax.train, "recipe", module, raising=False)
    monkeypatch.setattr(schema, "quickstart", schema.RecipeConfig, raising=False)
    monkeypatch.chdir(tmp_path)
    return fake


CONFIG_FILE = """
from r1jax.config import RecipeConfig, to_config_dict
def get_config():
    return to_config_dict(RecipeConfig(seed=5))
"""


@pytest.fixture
def config_file(tmp_path):
    (tmp_path / "my_run.py").write_text(CONFIG_FILE)
    return "my_run.py"


def one_error_line(capsys, status):
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("r1jax: error: ")
    return line


def test_quickstart(recipe, capsys):
    assert main(["quickstart"]) == 0
    ((config, out, force),) = recipe.calls
    assert (config, out, force) == (schema.RecipeConfig(), Path("runs/quickstart"), False)
    text, progress = capsys.readouterr()
    assert " 87.5\n" in text
    assert "report: runs/quickstart/report.html" in text
    assert "rl_1: 5 steps" in progress


def test_train_with_a_config_file(recipe, config_file):
    fields = ["--config.rl_1.steps=3", "--config.tasks.template=primer"]
    assert main(["train", f"--config={config_file}", *fields]) == 0
    assert main(["train", "--config", config_file, "--seed=9", "--out=elsewhere"]) == 0
    (first, out, _), (second, elsewhere, _) = recipe.calls
    assert (first.seed, first.rl_1.steps, first.tasks.template) == (5, 3, "primer")
    assert out == Path("runs/my_run")
    assert (second.seed, second.rl_1.steps, elsewhere) == (9, 100, Path("elsewhere"))


def test_json_goes_to_stdout_alone(recipe, capsys):
    assert main(["quickstart", "--json", "--seed", "3"]) == 0
    assert json.loads(capsys.readouterr().out) == {"stages": [STAGE], "seed": 3}


def test_a_finished_run_is_shown_not_repeated(recipe, capsys):
    assert main(["quickstart"]) == 0
    first = capsys.readouterr().out
    assert main(["quickstart"]) == 0
    out, err = capsys.readouterr()
    assert len(recipe.calls) == 1
    assert out == first
    assert "is finished, nothing to do; --force starts it anew" in err
    assert main(["quickstart", "--force"]) == 0
    assert [force for _, _, force in recipe.calls] == [False, True]


def test_a_damaged_summary_is_said(recipe, capsys):
    assert main(["quickstart"]) == 0
    capsys.readouterr()
    Path("runs/quickstart/summary.json").write_text("{")
    assert "summary.json is damaged" in one_error_line(capsys, main(["quickstart"]))


def test_an_interrupted_run_says_so_and_resumes(recipe, capsys):
    recipe.error = KeyboardInterrupt()
    assert main(["quickstart"]) == 130
    assert capsys.readouterr().err.endswith("r1jax: interrupted; the same command resumes\n")
    recipe.error = None
    assert main(["quickstart"]) == 0
    assert len(recipe.calls) == 2


def test_another_config_is_refused_and_nothing_overwritten(recipe, capsys):
    assert main(["quickstart"]) == 0
    capsys.readouterr()
    before = {p: p.read_bytes() for p in Path("runs/quickstart").iterdir()}
    line = one_error_line(capsys, main(["quickstart", "--seed=1"]))
    assert "seed: saved 0, asked for 1" in line
    assert {p: p.read_bytes() for p in Path("runs/quickstart").iterdir()} == before
    assert len(recipe.calls) == 1


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_folder_that_is_not_ours_is_refused(recipe, capsys, force):
    Path("precious").mkdir()
    Path("precious/thesis.tex").write_text("x")
    line = one_error_line(capsys, main(["quickstart", "--out=precious", *force]))
    assert "not a run of r1jax" in line
    assert [p.name for p in Path("precious").iterdir()] == ["thesis.tex"]


def test_an_unwritable_folder_is_refused(recipe, capsys):
    Path("file").touch()
    assert "--out" in one_error_line(capsys, main(["quickstart", "--out=file/below"]))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "no verb given"),
        (["quickstrt"], "invalid choice: 'quickstrt'"),
        (["quickstart", "--sed=1"], "--sed"),
        (["quickstart", "--seed=one"], "invalid int value: 'one'"),
        (["quickstart", "--config.seed=1"], "belongs to: r1jax train"),
        (["train"], "--config"),
        (["train", "--config=absent.py"], "no such file"),
        (["train", "--config=my_run.py", "--config.rl_1.steps"], "with the equals sign"),
        (["train", "--config=my_run.py", "--config.rl_1.step=1"], "rl_1.steps"),
        (["train", "--config=my_run.py", "--config.rl_1.steps=few"], "not of type int"),
        (["train", "--config=my_run.py", "--config.model.moe.n_group=7"], "n_routed_experts"),
        (
            ["train", "--config=my_run.py", "--config.sampling.max_new_tokens=999999"],
            "max_position",
        ),
        (["train", "--config=my_run.py", "--config.model.num_layers=None"], "model.num_layers"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(recipe, config_file, capsys, args, said):
    assert said in one_error_line(capsys, main(args))
    assert recipe.calls == []
    assert not Path("runs").exists()


def test_errors_while_running(recipe, capsys):
    recipe.error = RuntimeError("the disk\nis full")
    assert main(["quickstart"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("r1jax: failed: RuntimeError: the disk is full\n")


def test_a_value_error_from_below_the_library_is_a_failure_not_an_input(recipe, capsys):
    def broken(config, out, *, display, force):
        json.loads("{")

    sys.modules["r1jax.train.recipe"].run = broken
    assert main(["quickstart"]) == 1
    assert "Traceback" in capsys.readouterr().err

    def refused(config, out, *, display, force):
        schema.RecipeConfig(checkpoint_every=-1)

    sys.modules["r1jax.train.recipe"].run = refused
    assert "checkpoint_every" in one_error_line(capsys, main(["quickstart", "--json"]))


@pytest.mark.parametrize(("args", "said"), [([], "examples:"), (["quickstart"], "report.html")])
def test_help_teaches(capsys, args, said):
    with pytest.raises(SystemExit) as status:
        main([*args, "--help"])
    assert status.value.code == 0
    text = capsys.readouterr().out
    assert said in text
    assert all(len(line) <= 90 for line in text.splitlines())


def test_help_shows_every_field_that_its_example_names():
    """The fields that the help uses as examples exist."""
    fields = dataclasses.asdict(schema.RecipeConfig())
    assert {"seed", "rl_1", "tasks", "sampling"} <= fields.keys()
    assert {"names"} <= fields["tasks"].keys()
    assert {"top_p"} <= fields["sampling"].keys()


def test_version(capsys):
    assert main(["--version"]) == 0
    assert "r1jax " in capsys.readouterr().out


def test_help_and_wrong_flags_do_not_wait_for_jax():
    code = (
        "import sys; from r1jax.cli import main; status = main(['quickstart', '--sed=1']); "
        "assert 'jax' not in sys.modules, 'jax was imported'; sys.exit(status)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
