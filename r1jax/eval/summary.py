# SPDX-License-Identifier: Apache-2.0
"""`summary.json`: the figures of a run, and what somebody needs to judge or repeat them.

{"stages": [{"name", "parameters", "steps", "seconds", "pass_at_1", …}, …],
 "seed": 0, "versions": {"r1jax": …, "jax": …}, "host": {"processor": …, "cores": …}, …}
"""

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from r1jax import __version__
from r1jax.io import outdir
from r1jax.io.metrics import plain

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """The version of Python and of each package that has a say in the figures."""
    found = {name: _version(name) for name in _PACKAGES}
    return {"r1jax": __version__, **found, "python": platform.python_version()}


def host() -> dict[str, str | int | float]:
    """The machine: processor, cores this process may use, memory in GiB, platform."""
    usable = len(os.sched_getaffinity(0)) if platform.system() == "Linux" else os.cpu_count()
    found = {"processor": _processor(), "cores": usable or 1, "platform": platform.platform()}
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system: the figure is left out
        return found
    return found | {"memory_gib": round(size / 2**30, 1)}


def with_provenance(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary with `versions` and `host`; numpy and jax numbers become plain ones.

    A number that is not finite becomes None, as in the metrics.
    """
    return plain({"versions": versions(), "host": host(), **summary})


def cons_key(stages: Iterable[Mapping[str, Any]]) -> str:
    """`cons_at_k` with the k that the stages were measured with."""
    keys = (key for stage in stages for key in stage if key.startswith("cons_at_"))
    return next(keys, "cons_at_16")


def write_summary(out_dir: str | Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Writes OUT/summary.json, all or nothing. Written last: it says that the run is finished.

    Args:
      out_dir: the output folder, which exists.
      summary: at least `stages` and `seed`; `with_provenance` is applied to it.

    Returns:
      the summary as written.

    Raises:
      ValueError: `stages` or `seed` is missing: nobody could repeat the run.
    """
    missing = [key for key in ("stages", "seed") if key not in summary]
    if missing:
        raise ValueError(f"the summary lacks {', '.join(missing)}")
    complete = with_provenance(summary)
    outdir.write_json(Path(out_dir) / outdir.SUMMARY, complete)
    return complete


def read_summary(out_dir: str | Path) -> dict[str, Any]:
    """The summary that a finished run left in its folder.

    Raises:
      ValueError: the file is damaged.
    """
    return outdir.read_json(Path(out_dir) / outdir.SUMMARY)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from the source tree
        return "not installed"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()
