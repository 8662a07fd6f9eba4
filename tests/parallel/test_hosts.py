# SPDX-License-Identifier: Apache-2.0
"""Two processes of four devices each are one of eight."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from r1jax.parallel import hosts

ROOT = Path(__file__).resolve().parents[2]
# Other processes sum up in another order; two updates of Adam at a rate of 1e-3.
FLOAT32 = 2e-5


def test_alone_nothing_is_joined(monkeypatch):
    for name in hosts.CLUSTERS:
        monkeypatch.delenv(name, raising=False)
    assert hosts.start() is False
    with pytest.raises(ValueError, match="go together, got 'a:1', None, 0"):
        hosts.start("a:1", process=0)


def test_rows_are_dealt_out_evenly(monkeypatch):
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 4)
    monkeypatch.setattr(hosts.jax, "process_index", lambda: 2)
    assert hosts.rows_of_host(8) == slice(4, 6)
    with pytest.raises(ValueError, match="batch_size=6 must be divisible by the 4 processes"):
        hosts.rows_of_host(6)


def run(processes, out):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={8 // processes}"
    env = os.environ | dict(
        XLA_FLAGS=f"{flags} --xla_backend_optimization_level=0", PYTHONPATH=str(ROOT)
    )
    script = [sys.executable, "-m", "tests.parallel.host_process", address, str(processes)]
    started = [
        subprocess.Popen(
            [*script, str(i), str(out)], env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for i in range(processes)
    ]
    errors = [p.communicate(timeout=500)[1] for p in started]
    assert [p.returncode for p in started] == [0] * processes, errors
    with np.load(out) as found:
        return [found[name] for name in found.files]


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """Each feeds its own rows; experts are dealt out over both."""
    together, alone = run(2, tmp_path / "two.npz"), run(1, tmp_path / "one.npz")
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=FLOAT32, atol=FLOAT32)
