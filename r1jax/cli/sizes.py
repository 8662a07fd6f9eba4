# SPDX-License-Identifier: Apache-2.0
"""What `r1jax info` says about an architecture."""

from typing import Any, TextIO

from r1jax.config import DenseConfig
from r1jax.nn.count import bytes_by_dtype, cached_values, size
from r1jax.nn.memory import by_format

BYTES = {"float32": 4, "bfloat16": 2}


def facts(cfg: Any, module: Any) -> dict[str, Any]:
    """The figures, by name. Without a module the bytes are those of bfloat16 and of FP8 weights."""
    s = size(cfg)
    whole = s.parameters + s.mtp
    stored = bytes_by_dtype(module) if module is not None else {"bfloat16": 2 * whole}
    return {
        "architecture": "dense" if isinstance(cfg, DenseConfig) else "deepseek_v3",
        "layers": cfg.num_layers,
        "hidden_size": cfg.hidden_size,
        "parameters": s.parameters,
        "active_parameters": s.active,
        "mtp_parameters": s.mtp,
        "bytes": stored,
        "bytes_by_format": {
            name: {"weights": found.weights, "kept_per_token": found.kept}
            for name, found in by_format(cfg).items()
        },
        "fp8_block": cfg.fp8.block,
        "cache_values_per_token_and_layer": cached_values(cfg),
        "cache_bytes_per_token": s.cache_values * BYTES[cfg.dtype],
        "cache_dtype": cfg.dtype,
        "forward_flops_per_token": s.flops,
        "train_flops_per_token": 3 * s.flops,
        "attention_flops_per_pair": s.attention_flops,
    }


def write_facts(found: dict[str, Any], out: TextIO) -> None:
    """The figures as lines for people."""
    total, active = found["parameters"], found["active_parameters"]
    rows = [
        ("architecture", f"{found['architecture']}, {found['layers']} layers"),
        ("parameters", f"{short(total)} ({total:,})"),
        ("active a token", f"{short(active)} ({active:,}){_multiplied(found)}"),
    ]
    if found["mtp_parameters"]:
        mtp = found["mtp_parameters"]
        rows.append(("MTP module", f"{short(mtp)} ({mtp:,}), embedding and head shared"))
    for dtype, n in sorted(found["bytes"].items()):
        rows.append((f"bytes in {dtype}", f"{n / 1e9:,.3f} GB"))
    rows += _formats(found["bytes_by_format"], found["fp8_block"])
    values, layers = found["cache_values_per_token_and_layer"], found["layers"]
    rows += [
        (
            "cache a token",
            f"{found['cache_bytes_per_token']:,} bytes: {values} values x {layers} layers in "
            f"{found['cache_dtype']}",
        ),
        ("forward", f"{short(found['forward_flops_per_token'])}FLOP a token, without attention"),
        ("training", f"{short(found['train_flops_per_token'])}FLOP a token, without attention"),
        ("attention", f"{short(found['attention_flops_per_pair'])}FLOP more a token of context"),
    ]
    for name, value in rows:
        print(f"{name:16} {value}", file=out)


def _multiplied(found: dict[str, Any]) -> str:
    """How DeepSeek counts active parameters: the embedding is looked up, not multiplied by."""
    active = found["forward_flops_per_token"] / 2e9
    return f"; {active:.0f}B without the embedding" if active >= 1 else ""


def _formats(found: dict[str, dict[str, float]], block: int) -> list[tuple[str, str]]:
    """Weights, and what linear layers keep of one token for the backward pass, by format."""
    rows, whole = [], found["float32"]
    for name, one in found.items():
        size = {"weights": f"{one['weights'] / 1e9:,.3f} GB"}
        size["kept_per_token"] = f"{one['kept_per_token'] / 1e3:,.1f} kB"
        for key in size:
            more = one[key] / whole[key] - 1
            size[key] += f" ({abs(more):.1%} {'more' if more > 0 else 'less'})" if more else ""
        text = f"weights {size['weights']}, activations kept {size['kept_per_token']}"
        note = f" a token; blocks of {block}" if name == "fp8" else " a token"
        rows.append(("FP8" if name == "fp8" else name, text + note))
    return rows


def short(n: float) -> str:
    """671026419200 → 671B, 37552297472 → 37.6B."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= scale:
            return f"{n / scale:.1f}".removesuffix(".0") + unit
    return f"{n:.0f} "
