# SPDX-License-Identifier: Apache-2.0
"""Systems taking turns: every run in a fresh process, a round starting one system later than the
last, so that a busy hour stretches all of them."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

PEERS = pathlib.Path(__file__).parent / "peers"
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    # Large pages for every system: without them a step of r1jax waits for the kernel to hand out
    # its working memory, a page of 4 KB after another (experiments/log/006_…).
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def run(python: str, script: str, flags: Sequence[str] = ()) -> dict:
    """Runs one system once; returns its report with the load before and after it."""
    before = os.getloadavg()[0]
    done = subprocess.run(
        [python, str(PEERS / script), *flags],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{script} failed under {python}:\n{done.stderr[-2000:]}")
    load = [round(before, 2), round(os.getloadavg()[0], 2)]
    return json.loads(done.stdout.splitlines()[-1]) | {"load": load}


def rounds(
    pythons: Mapping[str, str | None],
    n: int,
    script_of: Callable[[str], str],
    *,
    flags: Sequence[str] = (),
    tell: Callable[[dict], str],
) -> dict[str, list[dict]]:
    """The reports of `n` rounds, by system; one without a Python is left out.

    Args:
        pythons: {system: interpreter}.
        n: of rounds.
        script_of: the file under `peers/` of a system.
        flags: for every script.
        tell: a line about a report, printed as it comes.
    """
    systems = [(name, python) for name, python in pythons.items() if python]
    results: dict[str, list[dict]] = {name: [] for name, _ in systems}
    for i in range(n):
        shift = i % len(systems)
        for name, python in systems[shift:] + systems[:shift]:
            report = run(python, script_of(name), flags)
            print(f"{report['system']}: load {report['load']}, {tell(report)}", file=sys.stderr)
            results[name].append(report)
    return results
