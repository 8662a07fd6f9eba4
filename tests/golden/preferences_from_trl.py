# SPDX-License-Identifier: Apache-2.0
"""Writes preferences.json: TRL 1.16's losses on pairs and its RLOO loss, float64, no model.

    pip install torch==2.13.0 transformers==5.23.0 trl==1.16.0        # CPU wheels will do
    python tests/golden/preferences_from_trl.py

The trainers' losses are called on log-probabilities given as arrays: everything around them (model,
accelerator, metrics) is replaced by constants, so that only their arithmetic is measured.
"""

import collections
import json
import pathlib
import types

import numpy as np
import torch
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

PAIRS, LENGTH = 6, 5
# name -> loss_type, beta, label smoothing. TRL 1.16 smooths the labels of `aot_unpaired` only,
# which on a single pair is cDPO: its sorts have nothing to sort.
DPO_CASES = {
    "dpo": ("sigmoid", 0.1, 0.0),
    "dpo_strong": ("sigmoid", 2.0, 0.0),
    "dpo_mean": ("sigmoid_norm", 0.5, 0.0),
    "ipo": ("ipo", 0.1, 0.0),
    "cdpo": ("aot_unpaired", 0.5, 0.2),
}
ACCELERATOR = types.SimpleNamespace(
    device="cpu",
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, **_: x,
)


def draw(seed: int = 0) -> dict[str, np.ndarray]:
    """Log-probs of PAIRS preferred and then PAIRS other answers, and scores and margins."""
    rng = np.random.default_rng(seed)
    logp = -rng.exponential(1, (2 * PAIRS, LENGTH))
    return {
        "logp": logp,
        "ref_logp": logp + 0.8 * rng.normal(size=logp.shape),
        "mask": np.arange(LENGTH)[None] < rng.integers(1, LENGTH + 1, 2 * PAIRS)[:, None],
        "score": 2.0 * rng.normal(size=2 * PAIRS),
        "margin": rng.exponential(1, PAIRS),
        "advantage": rng.normal(size=2 * PAIRS),
    }


class Model:
    """Answers with given log-probabilities, whatever the tokens are."""

    training, is_gradient_checkpointing = True, False

    def __init__(self, logp: torch.Tensor):
        self.logp = logp

    def __call__(self, **_: object) -> types.SimpleNamespace:
        blank = torch.zeros_like(self.logp)
        return types.SimpleNamespace(
            log_probs=self.logp, entropy=blank, mean_logits=blank, is_top1=blank.bool()
        )


def trl_dpo(logp: torch.Tensor, ref: torch.Tensor, mask: torch.Tensor, case: str) -> tuple:
    """The loss of a batch whose first half is preferred, and its metrics."""
    loss_type, beta, smoothing = DPO_CASES[case]
    # A prompt of one token stands before the answer; its log-prob is shifted away.
    completion_mask = torch.cat([torch.zeros(len(mask), 1), mask], dim=1)
    trainer = types.SimpleNamespace(
        model=Model(logp), ref_model=Model(ref), accelerator=ACCELERATOR,
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=False, use_weighting=False,
        f_divergence_type="reverse_kl", loss_types=[loss_type], loss_weights=[1.0], beta=beta,
        label_smoothing=smoothing, _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(completion_mask.shape, dtype=torch.long),
        "attention_mask": torch.ones(completion_mask.shape),
        "completion_mask": completion_mask,
    }
    loss = DPOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    return loss, {k: v[0] for k, v in trainer._metrics["train"].items() if k.startswith("rewards")}


def dpo_record(data: dict[str, torch.Tensor], case: str) -> dict[str, object]:
    """Loss, gradient with respect to the policy's log-probabilities, and rewards."""
    logp, ref, mask = data["logp"].clone().requires_grad_(), data["ref_logp"], data["mask"]
    # The log-probs of masked tokens are 0 in the fused head.
    masked, masked_ref = logp * mask, ref * mask
    if case == "cdpo":
        rows = [[i, PAIRS + i] for i in range(PAIRS)]
        losses = [trl_dpo(masked[r], masked_ref[r], mask[r], case)[0] for r in rows]
        loss, metrics = torch.stack(losses).mean(), {}
    else:
        loss, metrics = trl_dpo(masked, masked_ref, mask, case)
    (gradient,) = torch.autograd.grad(loss, logp)
    return {"loss": loss.item(), "gradient": gradient.tolist(), "metrics": metrics}


def reward_record(data: dict[str, torch.Tensor], with_margin: bool) -> dict[str, object]:
    """Loss of the reward trainer and its gradient with respect to the scores."""
    score = data["score"].clone().requires_grad_()
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=False),
        accelerator=ACCELERATOR,
        args=types.SimpleNamespace(center_rewards_coefficient=None),
        _metrics={"eval": collections.defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {"margin": data["margin"]} if with_margin else {}
    loss = RewardTrainer.compute_loss(
        trainer, lambda **_: types.SimpleNamespace(logits=score[:, None]), inputs
    )
    (gradient,) = torch.autograd.grad(loss, score)
    return {"loss": loss.item(), "gradient": gradient.tolist()}


def rloo_record(data: dict[str, torch.Tensor]) -> dict[str, object]:
    """Loss of the RLOO trainer (ratio of whole outputs, clipped) and its gradient."""
    logp = data["logp"].clone().requires_grad_()
    ids = torch.zeros(logp.shape, dtype=torch.long)
    trainer = types.SimpleNamespace(
        model=Model(logp), accelerator=ACCELERATOR, aux_loss_enabled=False,
        epsilon_low=0.2, epsilon_high=0.28, _metrics={"train": collections.defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
    )  # fmt: skip
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids,
        "completion_mask": data["mask"], "advantages": data["advantage"],
        "old_logps": (data["ref_logp"] * data["mask"]).sum(1),
    }  # fmt: skip
    loss = RLOOTrainer._compute_loss(trainer, None, inputs)
    (gradient,) = torch.autograd.grad(loss, logp)
    return {"loss": loss.item(), "gradient": gradient.tolist()}


def main() -> None:
    """Writes every case of one draw."""
    data = draw()
    tensor = {name: torch.tensor(x, dtype=torch.float64) for name, x in data.items()}
    record = {
        "inputs": {name: x.tolist() for name, x in data.items()},
        "cases": {case: dpo_record(tensor, case) for case in DPO_CASES}
        | {"pairwise": reward_record(tensor, False), "pairwise_margin": reward_record(tensor, True)}
        | {"rloo": rloo_record(tensor)},
    }
    path = pathlib.Path(__file__).with_name("preferences.json")
    path.write_text(json.dumps(record, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
