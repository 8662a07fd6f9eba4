# SPDX-License-Identifier: Apache-2.0
"""Writes objectives.json: losses and gradients of TRL 1.16's GRPO trainer, float64, no model.

    pip install torch==2.13.0 trl==1.16.0        # CPU wheels will do
    python tests/golden/objectives_from_trl.py

The trainer's loss is called on log-probabilities given as arrays: everything around it (model,
accelerator, metrics) is replaced by constants, so that only its arithmetic is measured.
"""

import collections
import json
import pathlib
import types

import numpy as np
import torch
from trl.trainer.grpo_trainer import GRPOTrainer

# Everything the loss reads: features not measured here are off, the rest has the default that most
# cases share.
IDLE_ARGS = {
    "delta": None,
    "use_bias_correction_kl": True,
    "steps_per_generation": 1,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.0,
}
IDLE_TRAINER = {
    "importance_sampling_level": "token",
    "epsilon_low": 0.2,
    "epsilon_high": 0.28,
    "beta": 0.04,
    "current_gradient_accumulation_steps": 1,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "aux_loss_enabled": False,
    "use_vllm": False,
    "vllm_importance_sampling_correction": False,
    "_entropy_bonus_enabled": False,
}

# name -> loss_type, trainer attributes, arguments, whether the sampler's weights are used
CASES = {
    "grpo": ("grpo", {}, {}, False),
    "dapo": ("dapo", {}, {}, False),
    "dr_grpo": ("dr_grpo", {}, {}, False),
    "cispo": ("cispo", {"epsilon_high": 5.0}, {}, False),
    "gspo": (
        "grpo",
        {"importance_sampling_level": "sequence", "beta": 0.0, "epsilon_high": 0.2},
        {},
        False,
    ),
    "grpo_plain_k3": ("grpo", {}, {"use_bias_correction_kl": False}, False),
    "grpo_r1_clip": (
        "grpo",
        {"epsilon_high": 10.0, "beta": 0.001},
        {"use_bias_correction_kl": False},
        False,
    ),
    "grpo_dual_clip": ("grpo", {}, {"delta": 1.5}, False),
    "dapo_importance": ("dapo", {}, {}, True),
}


def draw(seed: int, spread: float) -> dict[str, np.ndarray]:
    """Log-probs of 8 completions of up to 6 tokens; `spread` is how far the policies lie apart."""
    rng = np.random.default_rng(seed)
    shape = rows, length = 8, 6
    logp = -rng.exponential(1, shape)
    return {
        "logp": logp,
        "old_logp": logp + spread * rng.normal(size=shape),
        "ref_logp": logp + spread * rng.normal(size=shape),
        "advantage": rng.normal(size=rows),
        "mask": np.arange(length)[None] < rng.integers(2, length + 1, rows)[:, None],
        "importance": np.exp(0.2 * rng.normal(size=shape)),
    }


def trl_loss(data: dict[str, np.ndarray], case: str) -> dict[str, object]:
    """Loss and its gradient with respect to the policy's log-probabilities."""
    loss_type, attributes, args, with_importance = CASES[case]
    tensor = {name: torch.tensor(x, dtype=torch.float64) for name, x in data.items()}
    logp = tensor["logp"].requires_grad_()
    trainer = types.SimpleNamespace(
        **{**IDLE_TRAINER, **attributes},
        loss_type=loss_type,
        args=types.SimpleNamespace(**{**IDLE_ARGS, **args}),
        max_completion_length=logp.shape[1],
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x, device="cpu"
        ),
        _metrics={"train": collections.defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
    )
    ids = torch.zeros(logp.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": tensor["mask"],
        "advantages": tensor["advantage"],
        "old_per_token_logps": tensor["old_logp"],
        "ref_per_token_logps": tensor["ref_logp"],
        "num_items_in_batch": tensor["mask"].sum(),
    }
    if with_importance:
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
        inputs["importance_sampling_ratio"] = tensor["importance"]
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    (gradient,) = torch.autograd.grad(loss, logp)
    return {"loss": loss.item(), "gradient": gradient.tolist()}


def main() -> None:
    """Writes every case for a draw where little is clipped and for one where much is."""
    record = {}
    for name, seed, spread in (("near", 0, 0.3), ("far", 1, 1.0)):
        data = draw(seed, spread)
        record[name] = {
            "inputs": {key: x.tolist() for key, x in data.items()},
            "cases": {case: trl_loss(data, case) for case in CASES},
        }
    path = pathlib.Path(__file__).with_name("objectives.json")
    path.write_text(json.dumps(record, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
