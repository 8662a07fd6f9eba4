# SPDX-License-Identifier: Apache-2.0
"""Pre-trains the laptop's DeepSeek shape in float32 and by the FP8 recipe: same data, same seeds.

    python experiments/fp8_training.py --out runs/fp8 --arms float32 fp8 --seeds 0 1 2
    python experiments/fp8_training.py --out runs/text --data source --arms float32 fp8
    python experiments/fp8_training.py --out runs/12m --data source --shape 12m --block 128
    python experiments/fp8_training.py --out runs/fp8 --report

The quickstart's task text is learnt by heart, so that a last loss is a race to zero; Python's own
source code, byte by byte, is not.

Each arm is trained in a process of its own, what is there is not trained again. Three arms leave a
choice of the recipe out: `per_tensor` has one scale a tensor, `no_promotion` sums the blocks of a
contraction in bfloat16, `e5m2` has gradients in E5M2. They are written here, in plain jnp, and put
in the place of the two functions that the model calls; `plain` is the whole recipe in that way.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
import sysconfig
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from r1jax import optim
from r1jax.config import FP8Config, MLAConfig, quickstart
from r1jax.data import corpus
from r1jax.data.packing import Packed
from r1jax.data.tokenizer import task_tokenizer
from r1jax.nn.build import build
from r1jax.ops import experts, linear
from r1jax.train.state import Controls, create, restart
from r1jax.train.supervised import compile_supervised, micro_batched
from r1jax.train.words import Words, template_of

E4M3, E5M2 = (jnp.float8_e4m3fn, 448.0), (jnp.float8_e5m2, 57344.0)
ARMS = ("float32", "bfloat16", "fp8", "plain", "per_tensor", "no_promotion", "e5m2")
COLOURS = dict(
    zip(ARMS, ("#333", "#888", "#2a5bd7", "#7aa", "#d9622b", "#3a9", "#b3b"), strict=True)
)


def tiled(x, block, kind):
    """x as 1 × block tiles of its last axis show it; a block of 0 is the whole array."""
    dtype, largest = kind
    if not block:
        scale = jnp.abs(x).max() / largest
        scale = jnp.where(scale > 0, scale, 1.0)
        return (x / scale).astype(dtype).astype(jnp.float32) * scale
    tiles = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block))).reshape(len(x), -1, block)
    scale = jnp.abs(tiles).max(-1, keepdims=True) / largest
    scale = jnp.where(scale > 0, scale, 1.0)
    seen = (tiles / scale).astype(dtype).astype(jnp.float32) * scale
    return seen.reshape(len(x), -1)[:, : x.shape[1]]


def blocked(w, block):
    """w [K, N] as block × block blocks show it."""
    if not block:
        return tiled(w, 0, E4M3)
    k, n = w.shape
    padded = jnp.pad(w, ((0, -k % block), (0, -n % block)))
    blocks = padded.reshape(-(-k // block), block, -1, block).swapaxes(1, 2)
    seen = tiled(blocks.reshape(-1, block * block), block * block, E4M3)
    return seen.reshape(blocks.shape).swapaxes(1, 2).reshape(padded.shape)[:k, :n]


def product(a, b, block):
    """a b; with a block the sums of its blocks are added up in bfloat16."""
    exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    if not block:
        return exact("mk,kn->mn", a, b)
    k = a.shape[1]
    a = jnp.pad(a, ((0, 0), (0, -k % block))).reshape(len(a), -1, block)
    b = jnp.pad(b, ((0, -k % block), (0, 0))).reshape(-1, block, b.shape[1])
    sums = exact("mik,ikn->imn", a, b).astype(jnp.bfloat16)
    return jax.lax.scan(lambda s, x: (s + x, None), jnp.zeros_like(sums[0]), sums)[0].astype(
        a.dtype
    )


def layer(block, summed, gradient):
    """A linear layer [M, K] × [K, N] whose three products are quantised."""

    @jax.custom_vjp
    def run(x, w):
        return product(tiled(x, block, E4M3), blocked(w, block), summed)

    def back(kept, dy):
        x, w = kept
        dx = product(tiled(dy, block, gradient), blocked(w, block).T, summed)
        dw = product(tiled(x.T, block, E4M3), tiled(dy.T, block, gradient).T, summed)
        return dx, dw

    run.defvjp(lambda x, w: (run(x, w), (x, w)), back)
    return run


def replace_recipe(block, summed, gradient):
    """Puts such a layer where the model calls `pallas_kernels`."""
    run = layer(block, summed, gradient)

    def whole(x, w_KN, **_):
        return run(x.reshape(-1, x.shape[-1]), w_KN).reshape(*x.shape[:-1], -1)

    def grouped(x_MK, w_EKN, sizes_E, **_):
        ends_E = jnp.cumsum(sizes_E)
        own_EM = jnp.arange(len(x_MK)) < ends_E[:, None]
        own_EM &= jnp.arange(len(x_MK)) >= (ends_E - sizes_E)[:, None]
        one = lambda own, w: jnp.where(own, run(jnp.where(own, x_MK, 0), w), 0)  # noqa: E731
        return jax.vmap(one)(own_EM[:, :, None], w_EKN).sum(0)

    linear.fp8_linear, experts.fp8_grouped_linear = whole, grouped


def source(length: int) -> Packed:
    """Python's standard library as bytes, cut into rows of `length`."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = np.frombuffer(b"".join(f.read_bytes() for f in files), np.uint8).astype(np.int32)
    rows = len(text) // length - 1
    tokens, targets = (text[i : i + rows * length].reshape(rows, length) for i in (0, 1))
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return Packed(tokens, targets, positions, np.ones_like(tokens), np.ones(tokens.shape, "f4"))


def tasks_text(cfg, steps: int, seed: int) -> Packed:
    """What the quickstart pre-trains on."""
    tasks, sft = cfg.tasks, cfg.pretrain
    words = Words(tasks, task_tokenizer(), template_of(tasks))
    how = dict(tasks=words.mixture(), template=words.template, tokenizer=words.tokenizer)
    how |= dict(length=sft.length, difficulty=tasks.difficulty)
    return corpus.pretrain_corpus(32 * steps, seed=seed, **how)


def twelve_million(model):
    """A model of 12M parameters in which sums are as long as several blocks of 128."""
    mla = MLAConfig(num_heads=8, q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64,
                    qk_rope_head_dim=32, v_head_dim=64)  # fmt: skip
    moe = dataclasses.replace(model.moe, n_routed_experts=16, num_experts_per_tok=4)
    moe = dataclasses.replace(moe, moe_intermediate_size=128, bias_update_speed=0.001)
    width = dict(hidden_size=256, intermediate_size=512, init_std=0.02)
    return dataclasses.replace(model, num_layers=6, mla=mla, moe=moe, **width)


def config(arm: str, block: int, *, data: str, shape: str):
    """The model of an arm; what the arm replaces is replaced."""
    model = quickstart().model
    if shape == "12m":
        model = twelve_million(model)
    if data == "source":
        model = dataclasses.replace(model, vocab_size=256)
    if arm in ("float32", "bfloat16"):
        return dataclasses.replace(model, dtype=arm)
    if arm != "fp8":
        summed, gradient = block if arm == "no_promotion" else 0, E5M2 if arm == "e5m2" else E4M3
        replace_recipe(0 if arm == "per_tensor" else block, summed, gradient)
    return dataclasses.replace(model, fp8=FP8Config(enabled=True, block=block))


def train(args, arm: str) -> None:
    """Trains an arm for each seed and writes its losses."""
    cfg, model = quickstart(), config(arm, args.block, data=args.data, shape=args.shape)
    sft = dataclasses.replace(cfg.pretrain, steps=args.steps)
    if args.rate:
        sft = dataclasses.replace(
            sft, optim=dataclasses.replace(sft.optim, learning_rate=args.rate)
        )
    optimizer = optim.adamw(dataclasses.replace(sft.optim, moment_dtype=args.moments))
    step_jit = compile_supervised(optimizer, mtp_weight=sft.mtp_weight)
    for seed in args.seeds:
        file = args.out / f"{arm}_{seed}.json"
        if file.exists():
            continue
        by_heart = args.data == "tasks"
        packed = tasks_text(cfg, args.steps, seed) if by_heart else source(sft.length)
        state = create(lambda: build(model), optax.identity(), jax.random.key(seed))
        state, rows, began = restart(state, optimizer), [], time.perf_counter()
        for step in range(args.steps):
            batch = corpus.batch_at(packed, step, batch_size=sft.batch_size, seed=seed)
            speed = model.moe.bias_update_speed * (step < args.steps * (1 - sft.bias_freeze))
            rate = optim.learning_rate(sft.optim, step, args.steps)
            controls = Controls(np.float32(rate), np.float32(speed))
            state, found = step_jit(state, micro_batched(batch, 1), controls)
            names = ("loss", "mtp_loss", "grad_norm", "skipped")
            rows.append([float(found[name]) for name in names])
            if step % 50 == 49:
                seconds = time.perf_counter() - began
                print(f"{arm} {seed} {step + 1} {rows[-1][0]:.4f} {seconds:.0f} s", flush=True)
        file.write_text(json.dumps(dict(zip(names, zip(*rows, strict=True), strict=True))))


def report(out: pathlib.Path) -> None:
    """Prints the mean loss of the last tenth of the steps, and draws the curves."""
    found = {arm: {} for arm in ARMS}
    for file in sorted(out.glob("*_*.json")):
        arm, seed = file.stem.rsplit("_", 1)
        found[arm][int(seed)] = json.loads(file.read_text())
    last = lambda run: np.mean(run["loss"][-len(run["loss"]) // 10 :])  # noqa: E731
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm, runs in found.items():
        for seed, run in runs.items():
            base = found["float32"].get(seed)
            gap = f"{100 * (last(run) / last(base) - 1):+.3f} %" if base else ""
            skipped = int(sum(run["skipped"]))
            print(f"{arm:14} seed {seed}: loss {last(run):.4f} {gap}, {skipped} steps skipped")
            smooth = lambda x, n: np.convolve(x, np.ones(n) / n, "valid")  # noqa: E731
            label = arm if seed == min(runs) else None
            left.plot(smooth(run["loss"], 20), color=COLOURS[arm], linewidth=1, label=label)
            if base and arm != "float32":
                gaps = 100 * (smooth(run["loss"], 100) / smooth(base["loss"], 100) - 1)
                right.plot(range(99, 99 + len(gaps)), gaps, color=COLOURS[arm], linewidth=1.3)
                right.annotate(
                    f" {seed}", (99 + len(gaps), gaps[-1]), color=COLOURS[arm], fontsize=8
                )
    left.set_title("Loss, nats a token, mean of 20 steps", loc="left", fontsize=10)
    right.set_title(
        "Beside float32 of the same seed, %, mean of 100 steps", loc="left", fontsize=10
    )
    right.axhspan(-0.5, 0.5, color="#eee")
    left.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("step")
    figure.savefig(out / "fp8_training.png", dpi=140)


def main() -> None:
    """Trains what is not trained, an arm in a process, or reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["float32", "fp8"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--data", choices=("tasks", "source"), default="tasks")
    parser.add_argument("--shape", choices=("laptop", "12m"), default="laptop")
    parser.add_argument("--rate", type=float, help="the largest learning rate; the quickstart's")
    parser.add_argument("--moments", default="float32", help="dtype of Adam's moments")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.report:
        report(args.out)
    elif len(args.arms) == 1:
        train(args, args.arms[0])
    else:
        for arm in args.arms:
            own = [x for x in sys.argv if x not in ARMS and x != "--arms"]
            subprocess.run([sys.executable, *own, "--arms", arm], check=True)


if __name__ == "__main__":
    main()
