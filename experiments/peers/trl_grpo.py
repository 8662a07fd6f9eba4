# SPDX-License-Identifier: Apache-2.0
"""TRL GRPO on the work of `work.py`; needs torch and trl 1.16.0 and prints one line of JSON.

A step is the time between two ends of an optimizer step: generation with the transformers
sampler, reference log-probs, reward, advantages, update.
"""

import os
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports, which read it

import torch
import trl
import work
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback


class Stamps(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self, stamps: list[float]) -> None:
        self.stamps = stamps

    def on_step_end(self, args, state, control, **_):
        self.stamps.append(time.perf_counter())


def tokenizer() -> PreTrainedTokenizerFast:
    """One symbol a token; the two special tokens get the ids after the vocabulary's."""
    words = Tokenizer(models.WordLevel({c: i for i, c in enumerate(work.SYMBOLS)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def trainer(folder: str, stamps: list[float]) -> trl.GRPOTrainer:
    """Builds the policy and its reference; TRL loads the latter from `folder` once more."""
    config = LlamaConfig(
        vocab_size=work.VOCAB, hidden_size=work.EMBED, intermediate_size=work.MLP,
        num_hidden_layers=work.LAYERS, num_attention_heads=work.HEADS,
        num_key_value_heads=work.KV_HEADS, head_dim=work.HEAD_DIM, max_position_embeddings=128,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    batch = len(work.PROMPTS) * work.SAMPLES
    args = trl.GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=batch, num_generations=work.SAMPLES,
        max_completion_length=work.NEW_TOKENS, max_steps=work.STEPS,
        learning_rate=work.LEARNING_RATE, lr_scheduler_type="constant", max_grad_norm=0.0,
        beta=work.KL_COEF, epsilon=work.CLIP, loss_type="grpo",
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return trl.GRPOTrainer(
        model=LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=work.reward, args=args,
        train_dataset=Dataset.from_dict({"prompt": list(work.PROMPTS)}),
        processing_class=tokenizer(), callbacks=[Stamps(stamps)],
    )  # fmt: skip


def main() -> None:
    """Times the steps and prints the result."""
    torch.set_num_threads(os.cpu_count())
    stamps: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        grpo = trainer(folder, stamps)
        stamps.append(time.perf_counter())
        grpo.train()
    work.report(f"TRL {trl.__version__}", stamps)


if __name__ == "__main__":
    main()
