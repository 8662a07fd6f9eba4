# SPDX-License-Identifier: Apache-2.0
"""Was it made by the config that asks for it, and if not, in which fields do the two differ?"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ABSENT = "nothing"
_SHOWN = 5


def config_difference(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """The leaves in which two nested configs differ, as `path.to.field: saved x, asked for y`.

    Compared as JSON has them: a tuple equals the list with its elements.
    """
    old, new = (dict(_leaves(json.loads(json.dumps(c)))) for c in (saved, asked))
    return [
        f"{key}: saved {old.get(key, _ABSENT)}, asked for {new.get(key, _ABSENT)}"
        for key in sorted(old.keys() | new.keys())
        if key not in old or key not in new or old[key] != new[key]
    ]


def check_config(saved: Mapping[str, Any], asked: Mapping[str, Any], *, where: str | Path) -> None:
    """Refuses what another config made. On how many devices it was made does not matter.

    Raises:
      ValueError: one line that names the place, the differing fields and the way out.
    """
    kinds = _kind(saved), _kind(asked)
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{where} holds {kinds[0]}, not {kinds[1]}; choose another --out, or use --force"
        )
    different = config_difference(*(_elsewhere(config) for config in (saved, asked)))
    if not different:
        return
    other = "another config"
    if "rejection_sample" not in asked and any(f": saved {_ABSENT}," in d for d in different):
        other += ", with an older version of r1jax that lacks some of its fields"
    # What can be set back is named first.
    named = sorted(different, key=lambda d: f": saved {_ABSENT}," in d)[:_SHOWN]
    more = f"; and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
    raise ValueError(
        f"{where} was made by {other} ({'; '.join(named)}{more}); "
        "set them back, choose another --out, or use --force"
    )


def _elsewhere(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config without its devices; whether some only sample is more than where it is run."""
    found = {name: value for name, value in config.items() if name != "mesh"}
    if "sampler" in found:
        found["sampler"] = {"data": "some" if found["sampler"]["data"] else 0}
    return found


def _kind(config: Mapping[str, Any]) -> str:
    if "rejection_sample" in config:
        return "traces of rejection sampling"
    if "trainer" in config:
        return f"a run of the trainer {config['trainer']}"
    return "a run of the recipe"


def _leaves(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not (isinstance(config, dict) and config):
        return [(prefix, config)]
    return [
        leaf
        for key, value in config.items()
        for leaf in _leaves(value, f"{prefix}.{key}" if prefix else key)
    ]
