# SPDX-License-Identifier: Apache-2.0
"""Writes architectures.npz and .json: what transformers 5.23 computes with tiny random models.

    pip install torch==2.13.0 "transformers>=5.23,<5.24"        # CPU wheels will do
    python tests/golden/architectures_from_transformers.py

Float32 on the CPU with eager attention. architectures.json holds, for each case, the config.json
and the tensors' names and shapes as `save_pretrained` writes them, and the seed; the weights
themselves are `weights(shapes, seed)`, without torch. architectures.npz holds `{case}/{what}`:

    tokens          [B, T] int32
    pads            [B] int32, how many positions of a row are padding
    logits          [B, T, N] no padding
    left, right     [B, T, N] the first (last) `pads` positions of each row masked and their logits
                    zero; positions count from 0 at the first token that is not masked
    greedy          [B, 64] int32, continuations of the left-padded prompts, cached, no stop token
    loss            mean next-token cross-entropy over the B·(T-1) predictions, no padding
    gradient_norm   [P] float64, the L2 norm of its gradient for each of `trained(shapes)`
    gradient_dot    [P] float64, the gradient's inner product with `directions(shapes, seed)`
    gradient/{name} the whole gradient of a few small tensors, in the layout of the checkpoint

Whether a greedy token or an expert is the same one is a fair question only where the choice is not
a tie: a seed is taken only if the two best logits of every greedy step lie `LOGIT_GAP` apart, and
what the router keeps `ROUTING_GAP` above what it leaves.
"""

import itertools
import json
import pathlib
import tempfile

import numpy as np

ROWS, LENGTH, NEW_TOKENS = 3, 24, 64
PADS = np.array([0, 5, 11], np.int32)
GAIN = 1.3  # of a projection: makes logits whose standard deviation is between 1 and 3
LOGIT_GAP, ROUTING_GAP = 1e-3, 4e-5
ROUTER_BIAS = "e_score_correction_bias"

YARN = {"rope_type": "yarn", "original_max_position_embeddings": 16}
DEEPSEEK_YARN = {
    **YARN,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "rope_theta": 50.0,
}
# No pair turns 32 times within 16 positions: only with betas near 1 does a change of either show.
NEAR_BETAS = {"beta_fast": 1.5, "beta_slow": 0.8, "mscale": 0.707, "rope_theta": 10.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
# The two norms inside DeepSeek's attention always have eps 1e-6, so rms_norm_eps keeps that value.
DEEPSEEK = {
    **COMMON,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 12,
    "v_head_dim": 10,
    "moe_intermediate_size": 14,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
}
# case -> (model_type, fields of its configuration)
CASES = {
    "deepseek_yarn": ("deepseek_v3", {**DEEPSEEK, "rope_parameters": DEEPSEEK_YARN}),
    "deepseek_yarn_mscale": (
        "deepseek_v3",
        {**DEEPSEEK, "rope_parameters": {**DEEPSEEK_YARN, **NEAR_BETAS}},
    ),
    "deepseek_plain": (
        "deepseek_v3",
        {
            **DEEPSEEK,
            "num_hidden_layers": 4,
            "first_k_dense_replace": 2,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 1.7,
            "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        },
    ),
    "qwen2_tied": (
        "qwen2",
        {
            **COMMON,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        },
    ),
    # max_position_embeddings is 8 times the original length here: the factor is 4 all the same.
    "qwen2_yarn": (
        "qwen2",
        {
            **COMMON,
            "num_key_value_heads": 1,
            "rope_parameters": {**YARN, "factor": 4.0, "rope_theta": 20.0},
        },
    ),
    "qwen3": (
        "qwen3",
        {
            **COMMON,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        },
    ),
    "llama3": (
        "llama",
        {
            **COMMON,
            "hidden_size": 36,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 256,
            "rope_parameters": LLAMA3,
        },
    ),
    "llama_tied": (
        "llama",
        {
            **COMMON,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 200.0},
        },
    ),
}
# model_type -> tensors whose gradient is kept whole
WHOLE = {
    "deepseek_v3": (
        "model.norm.weight",
        "model.layers.0.self_attn.kv_a_layernorm.weight",
        "model.layers.2.mlp.gate.weight",
    ),
    "qwen2": ("model.norm.weight", "model.layers.0.self_attn.k_proj.bias"),
    "qwen3": ("model.norm.weight", "model.layers.1.self_attn.q_norm.weight"),
    "llama": ("model.norm.weight", "model.layers.1.input_layernorm.weight"),
}


def weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """The model's weights by their names in the checkpoint, float32, drawn in sorted order."""
    rng = np.random.default_rng(seed)
    out = {}
    for name in sorted(shapes):
        x = rng.standard_normal(tuple(shapes[name]))
        if name.endswith("norm.weight"):
            x = 1.0 + 0.2 * x
        elif name.endswith(ROUTER_BIAS):
            x = 0.2 * x
        elif name.endswith(".bias"):
            x = 0.3 * x
        else:
            x = GAIN / np.sqrt(x.shape[-1]) * x
        out[name] = x.astype(np.float32)
    return out


def trained(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The sorted names of the tensors that have a gradient."""
    return sorted(name for name in shapes if not name.endswith(ROUTER_BIAS))


def directions(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """A standard normal direction for each of `trained(shapes)`, float32, from `seed` + 1."""
    rng = np.random.default_rng(seed + 1)
    return {
        name: rng.standard_normal(tuple(shapes[name])).astype(np.float32)
        for name in trained(shapes)
    }


def checkpoint_layout(named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors as they are in memory, with their experts fused, as they are in the checkpoint."""
    out = {}
    for name, x in named.items():
        layer, _, last = name.rpartition(".experts.")
        if not layer:
            out[name] = x
            continue
        for i, expert in enumerate(x):
            parts = {"down_proj": expert}
            if last == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), np.split(expert, 2), strict=True))
            for part, matrix in parts.items():
                out[f"{layer}.experts.{i}.{part}.weight"] = matrix
    return out


def load(case: str, seed: int, folder: str | pathlib.Path) -> tuple:
    """The model with our weights, read from a checkpoint in an empty folder; its config.json and
    tensors' shapes."""
    import torch
    from safetensors.numpy import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, fields = CASES[case]
    config = AutoConfig.for_model(kind, **fields)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    path = pathlib.Path(folder, "model.safetensors")
    shapes = {name: x.shape for name, x in sorted(load_file(path).items())}
    ours = weights(shapes, seed)
    save_file(ours, path, metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    written = json.loads(pathlib.Path(folder, "config.json").read_text())
    if any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise RuntimeError(f"{case}: the checkpoint does not fit: {info}")
    if kind == "deepseek_v3":
        model.set_experts_implementation("eager")
    loaded = checkpoint_layout({name: x.numpy() for name, x in model.state_dict().items()})
    for name, x in ours.items():
        np.testing.assert_array_equal(loaded[name], x, err_msg=f"{case}: {name}")
    return model.eval(), written, shapes


def forward(model, tokens: np.ndarray, mask: np.ndarray):
    """Logits [B, T, N] of the rows under a mask of valid positions, with a graph for gradients."""
    import torch

    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    tensors = [torch.from_numpy(x.astype(np.int64)) for x in (tokens, mask, positions)]
    return model(
        input_ids=tensors[0], attention_mask=tensors[1], position_ids=tensors[2], use_cache=False
    ).logits


def gradient(model, logits, tokens: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """The mean loss of the tokens, -100 left out, and its gradient by the checkpoint's names."""
    import torch

    targets = torch.from_numpy(tokens[:, 1:].astype(np.int64)).flatten()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets)
    loss.backward()
    named = {name: x.grad.numpy() for name, x in model.named_parameters()}
    return loss.item(), checkpoint_layout(named)


def gradient_record(model, shapes: dict, logits, tokens: np.ndarray, seed: int) -> dict:
    """The loss on unpadded rows and what is kept of its gradient."""
    loss, found = gradient(model, logits, tokens)
    if sorted(found) != trained(shapes):
        raise RuntimeError(f"gradients of {sorted(found)}, tensors {trained(shapes)}")
    along = directions(shapes, seed)
    wide = {name: found[name].astype(np.float64) for name in trained(shapes)}
    return {
        "loss": np.float32(loss),
        "gradient_norm": np.array([np.linalg.norm(g) for g in wide.values()]),
        "gradient_dot": np.array([np.sum(g * along[name]) for name, g in wide.items()]),
        **{f"gradient/{name}": found[name] for name in WHOLE[model.config.model_type]},
    }


def greedy(model, tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, float]:
    """Greedy continuations [B, 64] from a cache, and the smallest lead of a chosen logit.

    Raises:
        RuntimeError: the forward pass of the whole sequences chooses other tokens.
    """
    import torch

    found = model.generate(
        input_ids=torch.from_numpy(tokens.astype(np.int64)),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(found.logits, 1).topk(2, dim=-1).values
    gap = (best[..., 0] - best[..., 1]).min().item()
    new = found.sequences[:, LENGTH:].numpy().astype(np.int32)
    whole = np.concatenate([tokens, new], axis=1)
    with torch.no_grad():
        again = forward(model, whole, np.pad(mask, ((0, 0), (0, NEW_TOKENS)), constant_values=1))
    if gap > LOGIT_GAP and (again[:, LENGTH - 1 : -1].argmax(-1).numpy() != new).any():
        raise RuntimeError("cached and whole forward passes choose other tokens")
    return new, gap


def watch_routers(model) -> list[float]:
    """A list that grows, with every call of a router, by the margin of its closest choice."""
    gaps = []

    def note(router, _, outputs):
        score = outputs[0].detach().sigmoid().numpy() + router.e_score_correction_bias.numpy()
        groups = score.reshape(len(score), router.num_group, -1)
        total = np.sort(groups)[..., -2:].sum(-1)
        best = -np.sort(-total)  # of the groups, best first
        if router.topk_group < router.num_group:
            gaps.append(float((best[:, router.topk_group - 1] - best[:, router.topk_group]).min()))
        kept = total >= best[:, router.topk_group - 1, None]
        inside = -np.sort(-np.where(kept[..., None], groups, -np.inf).reshape(score.shape))
        gaps.append(float((inside[:, router.top_k - 1] - inside[:, router.top_k]).min()))

    for module in model.modules():
        if type(module).__name__ == "DeepseekV3TopkRouter":
            module.register_forward_hook(note)
    return gaps


def measure(case: str, seed: int) -> tuple[dict, dict]:
    """The arrays of a case and what architectures.json says about it."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model, config, shapes = load(case, seed, folder)
    routing = watch_routers(model)
    vocabulary = config["vocab_size"]
    tokens = np.random.default_rng(seed + 2).integers(0, vocabulary, (ROWS, LENGTH), np.int32)
    masks = {
        "left": (np.arange(LENGTH) >= PADS[:, None]).astype(np.int32),
        "right": (np.arange(LENGTH) < LENGTH - PADS[:, None]).astype(np.int32),
    }
    logits = forward(model, tokens, np.ones_like(tokens))
    arrays = {"tokens": tokens, "pads": PADS, "logits": logits.detach().numpy()}
    with torch.no_grad():
        for name, mask in masks.items():
            arrays[name] = forward(model, tokens, mask).numpy() * mask[..., None].astype(np.float32)
    arrays |= gradient_record(model, shapes, logits, tokens, seed)
    arrays["greedy"], logit_gap = greedy(model, tokens, masks["left"])
    notes = {
        "seed": seed,
        "smallest_logit_gap": logit_gap,
        "smallest_routing_gap": min(routing, default=None),
        "logit_std": float(arrays["logits"].std()),
        "weights_norm": float(np.sqrt(sum((x**2).sum() for x in weights(shapes, seed).values()))),
        "config": config,
        "shapes": shapes,
    }
    return arrays, notes


def settled(case: str, first: int) -> tuple[dict, dict]:
    """What `measure` returns with the first seed from `first` on that leaves no choice close to a
    tie."""
    for seed in itertools.count(first):
        found, notes = measure(case, seed)
        routing = notes["smallest_routing_gap"]
        if notes["smallest_logit_gap"] > LOGIT_GAP and (routing or 1.0) > ROUTING_GAP:
            break
    return found, notes


def main() -> None:
    """Measures every case with the first seed that leaves no choice close to a tie."""
    import torch
    import transformers

    torch.set_num_threads(1)
    arrays, cases = {}, {}
    for number, case in enumerate(CASES):
        found, notes = settled(case, 1000 * number)
        arrays |= {f"{case}/{what}": x for what, x in found.items()}
        cases[case] = notes
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    path = pathlib.Path(__file__).with_name("architectures.npz")
    np.savez_compressed(path, **arrays)
    text = json.dumps({"versions": versions, "cases": cases}, separators=(",", ":"))
    path.with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
