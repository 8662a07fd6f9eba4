# SPDX-License-Identifier: Apache-2.0
"""Wrong input against the real recipe: one line that names the field, status 2, nothing touched."""

import json
import re

import numpy as np
import pytest

from r1jax.cli import main
from r1jax.config import to_config_dict
from r1jax.io import checkpoint, outdir
from r1jax.train import recipe
from r1jax.train.failure import StageFailed
from tests.train import tiny

CONFIG_FILE = """
from r1jax.config import to_config_dict
from tests.train import tiny
def get_config():
    return to_config_dict(tiny.recipe())
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """An empty working directory with a config file in it."""
    (tmp_path / "small.py").write_text(CONFIG_FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(capsys, *flags):
    """(status, the only line on stderr)."""
    status = main(["train", "--config=small.py", "--out=run", *flags])
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return status, line


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"}


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("sampling.prompt_length=3", r"has 7 tokens.*prompt_length=3; set sampling.prompt_length"),
        ("model.vocab_size=100", r"model.vocab_size=100 is smaller than the tokenizer's \d+"),
        ("students.llama.vocab_size=99", r"students.llama.vocab_size=99 .* set students.llama.voc"),
        (
            "model.moe.n_group=4",
            r"model.moe.n_routed_experts=6 .* divisible .* model.moe.n_group=4",
        ),
        ("model.max_position=15", r"model.max_position=15 is shorter than .* raise model.max_pos"),
        ("distill.length=15", r"distill.length=15 cannot hold .* raise distill.length"),
        ("rl_1.update.minibatches=3", r"=8 must be divisible by .*minibatches .*=3"),
        ("evaluation.problems=9999", r"evaluation.problems=9999: task 'arithmetic' has only \d+"),
        ("seed=-1", r"seed must lie in 0\.\.1048575, got -1"),
        ("seed=1099511627776", r"seed must lie in 0\.\.1048575, got 1099511627776"),
        ("tasks.names=chess", r"tasks must be distinct names out of \['arithmetic'.*chess"),
        ("model.mla.num_head=2", r"model.mla.num_heads"),
    ],
)
def test_a_wrong_field(capsys, folder, flag, said):
    status, line = train(capsys, f"--config.{flag}", "--force")
    assert status == 2
    assert re.search(said, line), line
    assert not (folder / "run").exists()


def claimed(folder):
    """The folder of a run of this config that has done nothing yet."""
    outdir.claim(folder / "run", to_config_dict(tiny.recipe()).to_dict())
    return folder / "run"


@pytest.mark.parametrize("record", [None, {"name": "pretrain", "seconds": 1.0}])
def test_a_checkpoint_of_another_config(capsys, folder, record):
    """Whether it was left inside the stage or at its end."""
    other = to_config_dict(tiny.recipe()).to_dict() | {"seed": 3}
    meta = {"config": other, "seconds": 1.0, "metrics_position": 0, "record": record}
    meta = {k: v for k, v in meta.items() if v is not None}
    series = claimed(folder) / "checkpoints" / "pretrain"
    checkpoint.save(series, 1, {"w": np.zeros(3)}, meta=meta)
    before = contents(folder)
    status, line = train(capsys)
    assert status == 2
    assert "seed: saved 3, asked for 0" in line
    assert "--force" in line
    assert contents(folder) == before


def test_a_folder_of_another_config(capsys, folder):
    claimed(folder)
    before = contents(folder)
    status, line = train(capsys, "--config.rl_2.steps=9", "--seed=2")
    assert status == 2
    assert "rl_2.steps: saved 1, asked for 9; seed: saved 0, asked for 2" in line
    assert contents(folder) == before


def test_a_half_written_folder(capsys, folder):
    """A torn marker is no marker; a run whose only checkpoint is torn is not begun again."""
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text('{"program": "r1j')
    before = contents(folder)
    status, line = train(capsys)
    assert (status, contents(folder)) == (2, before)
    assert "not a run of r1jax" in line

    (folder / "run" / "run.json").unlink()
    series = claimed(folder) / "checkpoints" / "pretrain"
    (series / "00000001" / "tree").mkdir(parents=True)
    (series / "00000002.orbax-checkpoint-tmp" / "tree").mkdir(parents=True)
    before = contents(folder)
    status = main(["train", "--config=small.py", "--out=run"])
    *_, line = capsys.readouterr().err.splitlines()
    assert (status, contents(folder)) == (2, before)
    assert "none of the checkpoints [1]" in line
    assert "--force to start anew" in line


def test_a_damaged_summary(capsys, folder):
    (claimed(folder) / "summary.json").write_text("{")
    status, line = train(capsys)
    assert status == 2
    assert "summary.json is damaged" in line
    assert "--force starts anew" in line


def test_a_stage_that_cannot_go_on_is_one_line_and_status_1(capsys, folder, monkeypatch):
    """No fault of the program: no traceback."""

    def stuck(self):
        raise StageFailed(recipe.nothing_kept("distill", self.cfg.distill_data))

    monkeypatch.setattr(recipe.Recipe, "all_stages", stuck)
    status, line = train(capsys)
    assert status == 1
    assert line.startswith("r1jax: failed: distill: rejection sampling kept nothing")
    assert "raise rl_2.steps, distill_data.problems or distill_data.samples" in line
    assert json.loads((folder / "run" / "run.json").read_text())["program"] == "r1jax"
