# SPDX-License-Identifier: Apache-2.0
"""Times a JAX training loop and counts what XLA compiles and runs, all from outside it."""

import collections
import contextlib
import pathlib
import tempfile
import time
from collections.abc import Iterator

import jax
import work

COMPILED_EVENT = "/jax/core/compile/backend_compile_duration"
PROFILED_STEPS = 4


def watch_compilations() -> list[float]:
    """Starts a list of the times (`time.perf_counter`) at which compilations end."""
    ended: list[float] = []

    def listen(event: str, _seconds: float, **_metadata: object) -> None:
        if event == COMPILED_EVENT:
            ended.append(time.perf_counter())

    jax.monitoring.register_event_duration_secs_listener(listen)
    return ended


@contextlib.contextmanager
def count_programs(steps: int) -> Iterator[dict[str, float]]:
    """Profiles the body, `steps` training steps, and fills a dict when it ends.

    Every launch counts, jitted functions and single eager operations alike: each is a compiled
    program of its own.

    Args:
        steps: how many training steps the body runs.

    Yields:
        An empty dict; afterwards `total` holds launches per step and each other key, a function
        known to `jax.jit`, its share.

    Raises:
        RuntimeError: the profile shows no launch, so the runtime names its events otherwise.
    """
    counts: dict[str, float] = {}
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            yield counts
        profile = next(pathlib.Path(folder).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(profile))
        names = [e.name for plane in data.planes for line in plane.lines for e in line.events]
    seen = collections.Counter(names)
    launches = sum(n for name, n in seen.items() if "::ExecuteHelper" in name)
    if not launches:
        raise RuntimeError("the profile shows no launched program: its event names have changed")
    counts["total"] = launches / steps
    # The runtime opens two nested events for each call of a jitted function.
    for name, n in seen.most_common():
        if name.startswith("PjitFunction("):
            counts[name[len("PjitFunction(") : -1]] = n / 2 / steps


def measured_steps(system: str, compiled: list[float]) -> Iterator[int]:
    """Yields once for each step the caller has to run, and prints the report after the last.

    A step lasts from one pull to the next. Steps that are timed come first, then a few that are
    profiled, since a profile slows them down.

    Args:
        system: name and version, for the report.
        compiled: the list of `watch_compilations`.

    Yields:
        The step's number, from 0.
    """
    stamps = [time.perf_counter()]
    for step in range(work.STEPS):
        yield step
        stamps.append(time.perf_counter())
    with count_programs(PROFILED_STEPS) as launched:
        yield from range(work.STEPS, work.STEPS + PROFILED_STEPS)
    work.report(system, stamps, compiled=compiled, programs=launched)
