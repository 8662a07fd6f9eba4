# SPDX-License-Identifier: Apache-2.0
"""MaxText on the training step of `models_work.py`: its own trainer, its fastest remat policy."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from importlib import metadata

import models_work as work

STEP = re.compile(r"completed step: (\d+), seconds: ([\d.]+)")


def flags(folder: str) -> dict[str, object]:
    """Those of the trainer: the model in float32, a batch of random tokens."""
    tiny = work.TINY
    same = ("num_experts_per_tok", "routed_scaling_factor", "kv_lora_rank", "q_lora_rank")
    same += ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "vocab_size")
    return {name: tiny[name] for name in same} | dict(
        run_name="tiny", base_output_directory=folder, hardware="cpu", dataset_type="synthetic",
        enable_checkpointing=False, enable_tensorboard=False, skip_jax_distributed_system=True,
        decoder_block="deepseek", attention_type="mla", attention="dot_product",
        base_emb_dim=tiny["hidden_size"], base_mlp_dim=tiny["intermediate_size"],
        base_moe_mlp_dim=tiny["moe_intermediate_size"],
        base_num_decoder_layers=tiny["num_hidden_layers"],
        base_num_query_heads=tiny["num_attention_heads"],
        base_num_kv_heads=tiny["num_key_value_heads"],
        first_num_dense_layers=tiny["first_k_dense_replace"],
        shared_experts=tiny["n_shared_experts"], num_experts=tiny["n_routed_experts"],
        n_routing_groups=tiny["n_group"], topk_routing_group=tiny["topk_group"],
        routed_score_func="sigmoid", routed_bias=True, sparse_matmul=True, megablox=False,
        mlp_activations='["silu","linear"]', rope_max_timescale=int(tiny["rope_theta"]),
        dtype="float32", weight_dtype="float32", scan_layers=True,
        remat_policy="minimal_with_context", learning_rate=work.LEARNING_RATE,
        per_device_batch_size=work.ROWS, max_target_length=work.LENGTH, steps=work.STEPS + 2,
    )  # fmt: skip


def train() -> float:
    """Seconds of one training step, as its trainer tells them."""
    found = importlib.util.find_spec("maxtext")
    config = pathlib.Path(found.submodule_search_locations[0]) / "configs/base.yml"
    with tempfile.TemporaryDirectory() as folder:
        given = [f"{name}={value}" for name, value in flags(folder).items()]
        done = subprocess.run(
            [sys.executable, "-m", "maxtext.trainers.pre_train.train", str(config), *given],
            env=os.environ | {"DECOUPLE_GCLOUD": "TRUE", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
    seconds = dict(STEP.findall(done.stdout + done.stderr))
    if len(seconds) != work.STEPS + 2:
        sys.exit(done.stderr[-2000:])
    # The clock runs two steps ahead of the work: the first two do not count.
    return work.steady([float(seconds[str(i + 2)]) for i in range(work.STEPS)])


def main() -> None:
    """Times the training step if it is asked for, and nothing else."""
    args = work.arguments()
    seconds = {"tiny train": train()} if args.only in "tiny train" else {}
    work.report(f"MaxText {metadata.version('maxtext')}", seconds)


if __name__ == "__main__":
    main()
