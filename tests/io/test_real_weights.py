# SPDX-License-Identifier: Apache-2.0
"""A trained checkpoint says what it says elsewhere. It is not part of the package: without it
nothing runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from r1jax.infer.generate import Sampling, generate
from r1jax.io.model import open_model
from tests.nn import tiny

STORIES = Path(__file__).parents[3] / "shared" / "data" / "stories260K"
pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not there")


@pytest.fixture(scope="module")
def stories():
    return open_model(STORIES).module


def test_golden_logits(stories):
    golden = np.load(STORIES / "golden_logits_fp32.npz")
    found = tiny.logits(stories, *tiny.whole_rows(golden["ids"][None]))[0]
    assert np.abs(found - golden["logits"]).max() <= 1e-5 * np.abs(golden["logits"]).max()


def test_golden_text(stories):
    ids = json.loads((STORIES / "golden_greedy.json").read_text())["greedy_ids"]
    how = Sampling(temperature=0.0, max_tokens=len(ids) - 1)
    assert generate(stories, [ids[:1]], how) == [ids[1:]]
