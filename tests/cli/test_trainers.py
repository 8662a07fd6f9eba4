# SPDX-License-Identifier: Apache-2.0
"""`r1jax train` with a config of one trainer: every config file, and wrong input in one line."""

import pathlib
import re

import pytest

from r1jax import config as schema
from r1jax.cli import main, overrides
from r1jax.config import laptop
from r1jax.io import outdir

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))
ARCHITECTURES = {"v2_lite", "v3_671b"}
GRPO = """
from r1jax.config import laptop, to_config_dict
def get_config():
    return to_config_dict(laptop.grpo())
"""
DPO = GRPO.replace("laptop.grpo()", "laptop.dpo('pairs.jsonl')")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_file_is_one_of_the_schema(path):
    """It says how it is run, on what, and what to expect; and it is the config it claims to be."""
    text = path.read_text()
    if path.stem in ARCHITECTURES:
        return
    for word in ("Command: ", "Hardware: ", "Expected: ", "r1jax train --config=configs/"):
        assert word in text
    assert f"configs/{path.name}" in text
    tree = overrides.load(path)
    kind = schema.RUNS[tree.trainer] if "trainer" in tree else schema.RecipeConfig
    assert schema.to_config_dict(schema.from_config_dict(kind, tree)) == tree


def published(name):
    tree = overrides.load(next(p for p in CONFIGS if p.stem == name))
    return schema.from_config_dict(schema.RUNS[tree.trainer], tree)


def test_the_published_numbers():
    """SPEC section 3, where the paper names them."""
    zero, long, one, two = map(
        published,
        ("r1_zero_671b", "r1_zero_671b_long", "r1_stage1_671b", "r1_stage2_671b"),
    )
    for run in (zero, long, one, two):
        grpo = run.grpo
        assert (grpo.group_size, grpo.prompts * grpo.group_size) == (16, 8192)
        assert (grpo.update.minibatches, grpo.update.epochs) == (16, 1)
        assert (grpo.optim.learning_rate, grpo.update.beta) == (3e-6, 0.001)
        assert grpo.reference_every * grpo.update.minibatches == 400
    limits = [run.sampling.max_new_tokens for run in (zero, long, one, two)]
    assert limits == [32_768, 65_536, 32_768, 32_768]
    updates = [run.grpo.steps * 16 for run in (zero, long, one, two)]
    # whole rollouts of 16 updates: 8,200, 2,200, 10,400 and 1,700, rounded down
    assert updates == [8192, 2192, 10_400, 1696]
    for run in (zero, long):  # a base model has to be told of the tags that earn the format reward
        assert all(f"<{tag}> </{tag}>" in run.data.instruction for tag in ("think", "answer"))
    assert zero.seed != long.seed  # or the second would ask the first's questions again
    assert [run.grpo.temperature for run in (zero, one, two)] == [1.0, 1.0, 0.7]
    assert (one.grpo.update.clip_high, one.grpo.reward.language) == (10.0, 1.0)
    assert zero.grpo.reward == schema.RewardConfig(accuracy=1.0, format=1.0)
    assert two.grpo.reward.model_from * 16 == 1296
    assert (two.data.general, two.grpo.reward.safe_path != "") == ("data/general.jsonl", True)
    for name in ("r1_cold_start_671b", "r1_sft2_671b"):
        sft = published(name).sft
        assert (sft.batch_size, sft.length) == (128, 32_768)
        assert (sft.optim.learning_rate, sft.optim.final_fraction) == (5e-5, 0.1)
    rates = {
        "qwen_1_5b": 1e-4, "qwen_7b": 8e-5, "qwen_14b": 7e-5, "qwen_32b": 6e-5,
        "llama_8b": 5e-5, "llama_70b": 2e-5,
    }  # fmt: skip
    for name, rate in rates.items():
        run = published(f"distill_{name}")
        assert (run.sft.optim.learning_rate, run.sft.batch_size) == (rate, 64)
    for name, steps in (("helpful", 257), ("safe", 414)):
        pairs = published(f"reward_{name}_671b").pairs
        assert (pairs.batch_size, pairs.length, pairs.steps) == (256, 8192, steps)
        assert pairs.optim.learning_rate == 6e-6


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    (tmp_path / "grpo.py").write_text(GRPO)
    (tmp_path / "dpo.py").write_text(DPO)
    (tmp_path / "model.py").write_text(
        "from r1jax.config import PlanConfig, to_config_dict\n"
        "def get_config():\n    return to_config_dict(PlanConfig())\n"
    )
    (tmp_path / "odd.py").write_text(
        "import ml_collections\ndef get_config():\n"
        "    return ml_collections.ConfigDict({'trainer': 'grop'})\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "flag", "said"),
    [
        ("odd", "", r"trainer must be one of sft, grpo, .* got 'grop'"),
        ("grpo", "trainer=ppo", r"--config.trainer: grpo.py is a config of one trainer"),
        ("model", "", r"the config is of a model, for r1jax plan and info"),
        ("grpo", "grpo.update.objective=gpro", r"objective must be one of .*did you mean .*grpo"),
        ("grpo", "grpo.update.kl=k4", r"kl must be one of k1, k2, k3"),
        ("grpo", "grpo.reward.acuracy=1.0", r"no config field .*acuracy; near: .*accuracy"),
        ("grpo", "grpo.update.minibatches=3", r"=128 must be divisible by .*minibatches.*=3"),
        ("grpo", "grpo.reward.accuracy=0.0 grpo.reward.format=0.0", r"every weight of reward is 0"),
        ("grpo", "grpo.pieces=3", r"prompts=16 must be divisible by pieces=3"),
        ("grpo", "grpo.reward.model=1.0", r"reward.model=1.0 and reward.model_path='' belong"),
        ("grpo", "grpo.reward.safe_path=x", r"reward.safe_path='x' needs reward.model"),
        ("grpo", "data.general=x.jsonl", r"data.general='x.jsonl' has no answers to check"),
        ("grpo", "data.general_share=1.5", r"data.general_share must lie in \(0, 1\)"),
        ("grpo", "data.dataset=gsm8k", r"data.dataset='gsm8k' needs data.path"),
        ("grpo", "data.dataset=gsm8", r"dataset must be one of .*did you mean gsm8k"),
        ("grpo", "data.template=plain", r"a task's answers stand in tags"),
        ("grpo", "start.path=nowhere", r"nowhere: there is no such model folder"),
        ("grpo", "start.path=", r"start.path names no model"),
        ("grpo", "grpo.temperature=0", r"temperature=0.0 must be positive: greedy .*\(in grpo\)"),
        ("grpo", "grpo.group_size=1", r"group_size=1 leaves update.objective='grpo' no answer"),
        ("grpo", "grpo.group_size=0", r"^r1jax: error: grpo.group_size must be positive, got 0$"),
        ("grpo", "grpo.reward.target_language=xx", r"grpo.reward.target_language must be one of"),
        ("grpo", "sampler.data=4", r"sampler.data=4 samples one step .*grpo.update.importance_cap"),
        ("grpo", "sampler.data=-1", r"sampler.data must be >= 0, got -1"),
        ("grpo", "sampler.tensor=2", r"sampler.expert=1 and sampler.tensor=2 .*set sampler.data"),
        ("grpo", "sampler.dato=2", r"no config field .*sampler.dato; near: .*sampler.data"),
        (
            "grpo", "sampler.data=1 grpo.update.importance_cap=2.0 grpo.refill=1",
            r"whether grpo.refill=1 wants more of the last batch; set one of them to 0",
        ),
        ("grpo", "sampling.layout=decode", r"sampling.layout must be one of .*did you mean decod"),
        ("dpo", "sampler.data=2", r"no config field .*sampler"),
        ("dpo", "pairs.loss=pairwise", r"a reward model; take a config of the trainer reward_m"),
        ("dpo", "pairs.loss=dqo", r"loss must be one of .*did you mean dpo"),
        ("dpo", "pairs.micro_batches=5", r"batch_size=32 must be divisible by micro_batches=5"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(capsys, folder, file, flag, said):
    flags = [f"--config.{one}" for one in flag.split()]
    before = {p.name for p in folder.iterdir()}
    status = main(["train", f"--config={file}.py", "--out=run", *flags])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert re.search(said, line), line
    assert {p.name for p in folder.iterdir()} - {"__pycache__"} == before


def test_help_on_a_config_file_lists_its_fields_as_they_are_typed(capsys):
    with pytest.raises(SystemExit) as status:
        main(["train", "--config=grpo.py", "--help"])
    assert status.value.code == 0
    text = capsys.readouterr().out
    typed = [line.strip() for line in text.partition("fields of grpo.py:\n")[2].splitlines()]
    assert "--config.grpo.update.epochs=1" in typed
    tree = overrides.load("grpo.py")
    fields = [line.removeprefix("--config.").split("=") for line in typed]
    overrides.apply(tree, fields)
    assert tree == overrides.load("grpo.py")
    assert main(["train", "--config=none.py", "--help"]) == 2
    assert "none.py: no such file" in capsys.readouterr().err


def run_folder(path, config, *stages):
    """What a run leaves in its folder first."""
    outdir.claim(path, schema.to_config_dict(config).to_dict())
    for stage in stages:
        (path / "checkpoints" / stage).mkdir(parents=True)


SAMPLED = {"rejection_sample": {"source": "/models/m"}}


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("drawn", "drawn holds traces of rejection sampling and no model: it is data .*/models/m$"),
        ("sft", "sft has not been finished, so it has no model yet"),
        ("sft/grpo", "sft is a run of the trainer sft: its model is sft/model"),
        ("whole/rl_9", "whole has no stage 'rl_9'; it has rl_1"),
        ("old", "old was written by an older version of r1jax.*unknown config key rl_1.gone"),
        ("torn", "torn/run.json: is damaged"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "generate", "info", "rejection-sample"])
def test_a_run_folder_that_is_no_model(capsys, folder, verb, start, said):
    """Wherever a model is named: whose folder it is, and where the model lies."""
    outdir.claim(folder / "drawn", SAMPLED)
    run_folder(folder / "sft", laptop.distill("x.jsonl"))
    run_folder(folder / "whole", schema.quickstart(), "rl_1")
    old = schema.to_config_dict(schema.quickstart()).to_dict()
    outdir.claim(folder / "old", old | {"rl_1": old["rl_1"] | {"gone": 1}})
    (folder / "torn").mkdir()
    (folder / "torn" / "run.json").write_text('{"program": ')
    command = {
        "train": ["train", "--config=grpo.py", f"--config.start.path={start}", "--out=run"],
        "generate": ["generate", start, "--prompt=1"],
        "info": ["info", start],
        "rejection-sample": ["rejection-sample", start, "--dataset=task:arithmetic", "--out=run"],
    }
    assert main(command[verb]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line), line
    assert not (folder / "run").exists()
