# SPDX-License-Identifier: Apache-2.0
"""transformers on the work of `models_work.py`, its cache driven by hand, not by generate()."""

import os
import pathlib
import time

import models_work as work

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import transformers


def train(cfg) -> float:
    """Seconds of one training step."""
    model = transformers.DeepseekV3ForCausalLM(cfg).float()
    optimizer = torch.optim.AdamW(model.parameters(), work.LEARNING_RATE)
    tokens = torch.tensor(work.rows(work.ROWS, work.LENGTH, cfg.vocab_size))
    seconds = []
    for _ in range(work.STEPS):
        began = time.perf_counter()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return work.steady(seconds)


@torch.no_grad()
def generation(model, batch: int, length: int, new: int) -> list[float]:
    """[seconds to the first token, seconds of each further step], greedy."""
    tokens = torch.tensor(work.rows(batch, length, model.config.vocab_size))
    began = time.perf_counter()
    out = model(tokens, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    first, seconds = time.perf_counter() - began, []
    for _ in range(new - 1):
        began = time.perf_counter()
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        seconds.append(time.perf_counter() - began)
    return [first, work.steady(seconds) if seconds else 0.0]


def prefill(model, batch: int) -> float:
    """Seconds to the first token."""
    return min(generation(model, batch, work.READ, 1)[0] for _ in range(work.REPEATS))


def decode(model, batch: int, context: int) -> float:
    """Seconds of a step."""
    return generation(model, batch, context, work.NEW)[1]


def main() -> None:
    """Times what was asked for."""
    torch.manual_seed(0)
    args, seconds = work.arguments(), {}
    cfg = transformers.DeepseekV3Config(**work.TINY)

    def timed(name: str, measure, *how) -> None:
        if args.only in name:
            seconds[name] = measure(*how)

    timed("tiny train", train, cfg)
    model = transformers.DeepseekV3ForCausalLM(cfg).float().eval()
    for context in work.CONTEXTS:
        timed(f"tiny decode {context}", decode, model, 8, context)
    if args.smollm2:
        file = pathlib.Path(args.smollm2)
        smol = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        ).eval()
        for batch in work.BATCHES:
            timed(f"smol prefill {batch}", prefill, smol, batch)
            timed(f"smol decode {batch}", decode, smol, batch, work.AFTER)
    work.report(f"transformers {transformers.__version__}", seconds)


if __name__ == "__main__":
    main()
