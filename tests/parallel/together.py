# SPDX-License-Identifier: Apache-2.0
"""`r1jax train` in several real processes of some CPU devices each, on one machine."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

from r1jax.config import to_config_dict
from r1jax.io import metrics

ROOT = Path(__file__).resolve().parents[2]


def config_file(path, run):
    """A config file of a run."""
    tree = to_config_dict(run).to_dict()
    lines = ["import ml_collections", "def get_config():"]
    path.write_text("\n".join([*lines, f"    return ml_collections.ConfigDict({tree!r})\n"]))
    return path


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


class Run:
    """One command in `processes` processes of `devices` devices each.

    `before` is code that each runs first, where `me` is its number.
    """

    def __init__(self, config, out, *, processes=2, devices=4, flags=(), before="", errors=None):
        self.out = out
        self.errors = [(errors or out).with_suffix(f".{i}.err") for i in range(processes)]
        address = f"localhost:{free_port()}"
        start = "import sys; from r1jax.cli import main; sys.exit(main())"
        command = ["train", f"--config={config}", f"--out={out}", *flags]
        self.processes = []
        for i, errors in enumerate(self.errors):
            who = [f"--coordinator={address}", f"--processes={processes}", f"--process={i}"]
            with errors.open("a") as stderr:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", f"me = {i}\n{before}\n{start}", *command]
                        + (who if processes > 1 else []),
                        env=environment(devices), cwd=ROOT, stderr=stderr,
                        stdout=subprocess.DEVNULL,
                    )
                )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:  # ours, by their handles
            process.kill()
            process.wait()

    def ended(self, timeout=240):
        """Exit statuses."""
        return [process.wait(timeout) for process in self.processes]

    def said(self, i):
        return self.errors[i].read_text()

    def reach(self, step, timeout=200):
        """Waits until the metrics have this step."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if steps_of(self.out)[-1:] and steps_of(self.out)[-1] >= step:
                return
            if all(process.poll() is not None for process in self.processes):
                break
            time.sleep(0.05)
        raise AssertionError([self.said(i) for i in range(len(self.errors))])


def environment(devices):
    count = "--xla_force_host_platform_device_count="
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": re.sub(rf"{count}\d+", f"{count}{devices}", os.environ["XLA_FLAGS"]),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "PYTHONPATH": str(ROOT),
    }


def rows_of(out):
    """metrics.jsonl without the clock."""
    path = out / "metrics.jsonl"
    found = metrics.read(path) if path.exists() else []
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


def steps_of(out):
    return [row["step"] for row in rows_of(out)]
