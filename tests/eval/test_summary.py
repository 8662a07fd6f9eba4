# SPDX-License-Identifier: Apache-2.0
"""The summary says where its figures come from, and is written whole."""

import json
import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.eval.summary import host, versions, with_provenance, write_summary
from r1jax.io import outdir


def test_provenance_and_plain_numbers(tmp_path):
    stage = {"name": "rl_1", "pass_at_1": jnp.float32(0.1), "steps": np.int64(3), "greedy": np.nan}
    summary = write_summary(tmp_path, {"stages": [stage], "note": ("a", None), "seed": 7})
    back = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert back == summary
    assert back["stages"] == [{"name": "rl_1", "pass_at_1": 0.1, "steps": 3, "greedy": None}]
    assert back["note"] == ["a", None]
    assert back["seed"] == 7
    assert back["versions"]["jax"] == jax.__version__
    assert back["versions"]["python"] == platform.python_version()


def test_a_written_summary_means_finished(tmp_path):
    outdir.claim(tmp_path / "run", {"a": 1})
    write_summary(tmp_path / "run", {"stages": [], "seed": 0})
    assert outdir.inspect(tmp_path / "run", {"a": 1}) == "finished"


def test_provenance_once_recorded_is_kept():
    first = with_provenance({"stages": [], "seed": 0, "host": {"processor": "elsewhere"}})
    assert with_provenance(first) == first
    assert first["host"] == {"processor": "elsewhere"}


def test_host_and_versions_are_filled():
    assert host()["cores"] >= 1
    assert host()["processor"]
    assert host().get("memory_gib", 1) > 0
    assert {"r1jax", "jax", "jaxlib", "flax", "optax", "python"} <= versions().keys()
    assert all(versions().values())


def test_a_summary_that_nobody_could_repeat_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lacks seed"):
        write_summary(tmp_path, {"stages": []})
    assert not list(tmp_path.iterdir())
