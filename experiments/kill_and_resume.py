# SPDX-License-Identifier: Apache-2.0
"""kill -9 at random moments: is a resumed run the uninterrupted one, bit for bit?

For each trainer (sft, grpo, ppo) one run is left alone and one is killed and resumed until it has
been killed so many times; then parameters, the last checkpoint's every array and the metrics
(without the clock) are compared. The model is the smallest that has every part.

    python experiments/kill_and_resume.py --kills 25 --out runs/kill
"""

import argparse
import dataclasses
import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np

from r1jax import config as schema
from r1jax.config import laptop
from r1jax.data.template import R1
from r1jax.io import metrics
from r1jax.io.model import Model, open_model, save_model
from r1jax.nn.build import build
from r1jax.nn.param import initialise, leaves
from r1jax.train.trained import task_words

SMALL = dict(steps=60, optim=laptop.optim(1e-3))


def configs(out: pathlib.Path) -> dict[str, schema.RunConfig]:
    """One short run of each trainer on a model that is drawn here."""
    import jax

    cfg = dataclasses.replace(schema.laptop_model(), num_layers=2)
    start = out / "start"
    if not start.exists():
        save_model(start, Model(cfg, initialise(build(cfg), jax.random.key(0)), task_words(R1)))
    rows = [
        {"prompt": f"compute {i} + 1", "completion": f"<think> {i} </think>"} for i in range(64)
    ]
    data = out / "sft.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    reward = schema.RewardConfig(format=0.2, language=1.0)
    rl = dict(SMALL, prompts=4, reward=reward)
    runs = {
        "sft": laptop.distill(str(data), batch_size=4, length=32, optim=laptop.optim(1e-3)),
        "grpo": laptop.grpo(group_size=4, reference_every=7, **rl),
        "ppo": laptop.ppo(**rl),
    }
    measure = schema.MeasureConfig(questions=4, samples=1)
    sampling = schema.SamplingConfig(prompt_length=12, max_new_tokens=8)
    where = schema.StartConfig(path=str(start), remat=False)
    for name, run in runs.items():
        changes = {} if name == "sft" else dict(measure=measure, sampling=sampling)
        changes |= dict(epochs=60.0) if name == "sft" else {}
        runs[name] = dataclasses.replace(run, start=where, checkpoint_every=0.5, **changes)
    return runs


def command(out: pathlib.Path, name: str, run: schema.RunConfig, folder: str) -> list[str]:
    """`r1jax train` of a run, as a process of its own."""
    text = json.dumps(schema.to_config_dict(run).to_dict())
    file = out / f"{name}.py"
    file.write_text(
        "import json, ml_collections\ndef get_config():\n"
        f"    return ml_collections.ConfigDict(json.loads({text!r}))\n"
    )
    code = "import sys; from r1jax.cli import main; sys.exit(main(sys.argv[1:]))"
    where = [f"--config={file}", f"--out={out / folder / name}"]
    return [sys.executable, "-c", code, "train", *where]


def killed(argv: list[str], rng: random.Random, longest: float) -> bool:
    """Starts the run and kills it after a random time; False if it was done before."""
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        child.wait(rng.uniform(0.2, longest))
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        child.wait()
        return True
    if child.returncode:
        raise SystemExit(f"exit status {child.returncode} of {' '.join(argv)}")
    return False


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """What is not the same in two runs."""
    found = []
    models = [leaves(open_model(p / "model").module) for p in (one, other)]
    for key in models[0]:
        pair = [np.asarray(m[key][...]) for m in models]
        if not np.array_equal(*pair):
            found.append(f"{key}: {np.abs(pair[0] - pair[1]).max()}")
    rows = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in metrics.read(p / "metrics.jsonl")]
        for p in (one, other)
    ]
    return found if rows[0] == rows[1] else [*found, "metrics.jsonl"]


def main() -> None:
    """Runs, kills, compares, and prints a line for each trainer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25, help="in all (default: 25)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=30.0, help="seconds before a kill")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng, left = random.Random(args.seed), args.kills
    runs = configs(args.out)
    for number, (name, run) in enumerate(runs.items()):
        began = time.time()
        subprocess.run(command(args.out, name, run, "whole"), check=True, capture_output=True)
        whole, share, kills, rounds = time.time() - began, left // (len(runs) - number), 0, 0
        while kills < share:
            folder, rounds = f"killed_{rounds}", rounds + 1
            argv, here = command(args.out, name, run, folder), 0
            while kills < share and killed(argv, rng, args.longest):
                kills, here = kills + 1, here + 1
            subprocess.run(argv, check=True, capture_output=True)
            wrong = differences(args.out / "whole" / name, args.out / folder / name)
            print(f"{name}: {here} kills, {whole:.0f} s whole, {wrong or 'identical'}", flush=True)
        left -= kills


if __name__ == "__main__":
    main()
