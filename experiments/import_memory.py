# SPDX-License-Identifier: Apache-2.0
"""Memory and exactness of a checkpoint's way in and out: a synthetic DeepSeek of over 2 GB.

Writes four shards, imports them on one device and onto a mesh of eight in processes of their own,
exports, and compares every byte. Prints the peak of memory above the arrays.

    python experiments/import_memory.py --folder /tmp/import_memory [--dtype bf16|fp8]
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

ROUTED = 40  # experts of each of the four mixture-of-experts layers


def config(dtype: str):
    """1.07B parameters as bfloat16, 2.1B as FP8: 2.1 GB; MTP layer included."""
    from r1jax.config import MLAConfig, ModelConfig, MoEConfig

    return ModelConfig(
        vocab_size=32_000,
        num_layers=5,
        first_k_dense=1,
        hidden_size=2048,
        intermediate_size=8192,
        mla=MLAConfig(16, 768, 512, 128, 64, 128),
        moe=MoEConfig(
            n_routed_experts=ROUTED * (2 if dtype == "fp8" else 1),
            n_shared_experts=1,
            moe_intermediate_size=640,
        ),
    )


def write(folder: Path, dtype: str) -> None:
    """The checkpoint, tensor by tensor, of random numbers."""
    import jax.numpy as jnp
    import numpy as np

    from r1jax.io.hf_config import write_config
    from r1jax.io.hf_load import SCALE
    from r1jax.io.hf_names import places, shared_by_mtp
    from r1jax.io.hf_save import is_projection
    from r1jax.io.shards import write_shards
    from r1jax.ops.quant import BLOCK

    cfg, rng = config(dtype), np.random.default_rng(0)
    first = {original: copy for copy, original in shared_by_mtp(cfg).items()}

    def tensors():
        for place in {p.name: p for p in places(cfg)}.values():
            shape = place.layout.matrix
            if dtype == "fp8" and is_projection(place.name):
                # Any bytes but the two that are NaN, any scales: quantising is not what is asked.
                drawn = np.frombuffer(rng.bytes(shape[0] * shape[1]), np.uint8).reshape(shape)
                yield place.name, np.where(drawn & 0x7F == 0x7F, 0, drawn).view(jnp.float8_e4m3fn)
                scales = [-(-n // BLOCK) for n in shape]
                yield place.name + SCALE, rng.uniform(1e-5, 1e-4, scales).astype(np.float32)
                continue
            x = rng.standard_normal(shape, np.float32) * np.float32(0.02)
            x = x if place.name.endswith("correction_bias") else x.astype(jnp.bfloat16)
            for name in filter(None, (place.name, first.get(place.name))):
                yield name, x

    folder.mkdir(parents=True)
    fields = write_config(cfg, dtype="bfloat16")
    if dtype == "fp8":
        quantised = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
        fields["quantization_config"] = quantised
    (folder / "config.json").write_text(json.dumps(fields))
    write_shards(folder, tensors(), shard_bytes=700_000_000)


def measure(folder: Path, mesh: bool, save: bool) -> None:
    """Imports in this process and prints one line; run in a process of its own."""
    import jax

    from r1jax.io.model import open_model, save_model

    devices = jax.make_mesh((2, 4), ("fsdp", "expert")) if mesh else None
    jax.block_until_ready(jax.numpy.ones(8) + 1)
    before = peak()
    model = open_model(folder, mesh=devices)
    # What the devices hold: a mesh keeps some arrays more than once.
    shards = (s for x in jax.tree.leaves(model.module) for s in x.addressable_shards)
    arrays = sum(shard.data.nbytes for shard in shards)
    largest = model.cfg.vocab_size * model.cfg.hidden_size * 2
    if save:
        save_model(folder.with_name("ours"), model)
    above = peak() - before - arrays
    what = "mesh of 8" if mesh else "one device"
    print(
        f"{what}{', saved' if save else ''}: arrays {arrays / 1e9:.3f} GB, peak above them "
        f"{above / 1e9:.3f} GB, allowed {(3 * largest + 1e9) / 1e9:.3f} GB",
        flush=True,
    )


def peak() -> int:
    """Peak resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(folder: Path) -> None:
    """Exports what was saved and compares every byte."""
    from r1jax.io.model import export_model, open_model
    from r1jax.io.shards import Shards

    export_model(folder.with_name("back"), open_model(folder.with_name("ours")))
    one, other = Shards(folder), Shards(folder.with_name("back"))
    assert one.shapes().keys() == other.shapes().keys()
    same = all(one.read(n).tobytes() == other.read(n).tobytes() for n in one.shapes())
    shards = len(list(folder.glob("*.safetensors")))
    print(f"{len(one.shapes())} tensors in {shards} shards: bit-identical {same}", flush=True)


def main() -> None:
    """Runs the parts, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dtype", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--part", choices=("write", "one", "mesh", "save", "compare"))
    args = parser.parse_args()
    hf = args.folder / "hf"
    parts = {
        "write": lambda: write(hf, args.dtype),
        "one": lambda: measure(hf, False, False),
        "mesh": lambda: measure(hf, True, False),
        "save": lambda: measure(hf, False, True),
        "compare": lambda: compare(hf),
    }
    if args.part:
        parts[args.part]()
        return
    shutil.rmtree(args.folder, ignore_errors=True)
    for part in parts:
        flags = "--xla_force_host_platform_device_count=8" if part == "mesh" else ""
        command = [sys.executable, __file__, "--folder", args.folder, "--dtype", args.dtype]
        env = {**os.environ, "XLA_FLAGS": flags}
        subprocess.run([*map(str, command), "--part", part], check=True, env=env)
    shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
