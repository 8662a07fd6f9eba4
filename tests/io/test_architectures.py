# SPDX-License-Identifier: Apache-2.0
"""Four architectures against transformers: logits, gradients and greedy text of random checkpoints.

The arrays were made by `tests/golden/architectures_from_transformers.py`; the weights are drawn
again here, so neither torch nor a checkpoint is needed.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from r1jax.infer.generate import Sampling, generate
from r1jax.io.hf_config import read_config, write_config
from r1jax.io.hf_load import load
from r1jax.io.hf_names import places
from r1jax.io.hf_save import tensors
from r1jax.io.shards import Shards
from r1jax.nn.param import leaves
from r1jax.ops.loss import token_logp
from tests.golden.architectures_from_transformers import directions, trained, weights

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "architectures.json").read_text())["cases"]
few = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("deepseek_yarn", "qwen3") else pytest.mark.slow)
        for name in CASES
    ],
)
# Two float32 systems that sum in other orders; the demand is 1e-4.
LOGITS = 2e-5
# Gradients pass through twice as many sums; the demand is 1e-3.
GRADIENT = 1e-4
# An expert that no token chose has the gradient 0 in one system and may have none in the other.
NOTHING = 1e-6


@functools.cache
def golden():
    return dict(np.load(GOLDEN / "architectures.npz"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{case: (config, model)} of checkpoints written as transformers would have saved them."""
    found = {}
    for name, case in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(case["config"]))
        shapes = {k: tuple(v) for k, v in case["shapes"].items()}
        save_file(weights(shapes, case["seed"]), folder / "model.safetensors")
        cfg = read_config(case["config"])
        found[name] = cfg, load(Shards(folder), cfg)
    return found


@jax.jit
def logits(model, tokens, positions, segments):
    return model(tokens, positions, segments).hidden_BTD @ model.head_DN()


def rows(name, side):
    """(tokens, positions, segments) of the golden batch, padded on one side or not at all."""
    tokens, pads = golden()[f"{name}/tokens"], golden()[f"{name}/pads"]
    at = np.arange(tokens.shape[1])
    valid = np.ones(tokens.shape, bool)
    if side == "left":
        valid = at >= pads[:, None]
    elif side == "right":
        valid = at < tokens.shape[1] - pads[:, None]
    positions = np.maximum(valid.cumsum(1) - 1, 0).astype(np.int32)
    return tokens.astype(np.int32), positions, valid.astype(np.int32)


@pytest.mark.parametrize("side", ["logits", "left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_logits(checkpoints, name, side):
    tokens, positions, segments = rows(name, side)
    out = np.asarray(logits(checkpoints[name][1], tokens, positions, segments))
    wanted = golden()[f"{name}/{side}"]
    out = out * segments[..., None]
    assert np.abs(out - wanted).max() <= LOGITS * np.abs(wanted).max()
    assert np.abs(wanted).max() > 1


@few
def test_gradients(checkpoints, name):
    cfg, model = checkpoints[name]
    tokens, positions, segments = rows(name, "logits")

    @jax.jit
    @jax.grad
    def gradient(m):
        hidden = m(tokens, positions, segments).hidden_BTD[:, :-1]
        return -token_logp(hidden, m.head_DN(), tokens[:, 1:])[0].mean()

    found = dict(tensors(gradient(model), cfg))
    shapes = {k: tuple(v) for k, v in CASES[name]["shapes"].items()}
    along = directions(shapes, CASES[name]["seed"])
    g = golden()
    for i, key in enumerate(trained(shapes)):
        norm, dot = g[f"{name}/gradient_norm"][i], g[f"{name}/gradient_dot"][i]
        near = pytest.approx
        assert np.linalg.norm(found[key]) == near(norm, rel=GRADIENT, abs=NOTHING), key
        # The product of n random signs carries the error of the norm, not of itself.
        assert (found[key] * along[key]).sum() == near(dot, abs=GRADIENT * norm * 30 + NOTHING), key
    for key in (k for k in g if k.startswith(f"{name}/gradient/")):
        whole = found[key.split("/gradient/")[1]]
        assert np.abs(whole - g[key]).max() <= GRADIENT * np.abs(g[key]).max(), key


@few
def test_greedy_text(checkpoints, name):
    tokens, pads = golden()[f"{name}/tokens"], golden()[f"{name}/pads"]
    prompts = [row[n:].tolist() for row, n in zip(tokens, pads, strict=True)]
    out = generate(checkpoints[name][1], prompts, Sampling(temperature=0.0, max_tokens=64))
    assert out == golden()[f"{name}/greedy"].tolist()


@pytest.mark.parametrize("name", CASES)
def test_export_is_what_was_imported(checkpoints, name):
    cfg, model = checkpoints[name]
    case = CASES[name]
    shapes = {k: tuple(v) for k, v in case["shapes"].items()}
    wanted = weights(shapes, case["seed"])
    found = dict(tensors(model, cfg))
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[k], wanted[k]) for k in wanted)
    assert read_config(write_config(cfg, dtype="float32")) == cfg


def test_names_are_those_of_the_checkpoints():
    for case in CASES.values():
        assert {p.name for p in places(read_config(case["config"]))} == set(case["shapes"])


def test_every_bias_matters(checkpoints):
    """The golden router biases choose other experts than none would."""
    _, model = checkpoints["deepseek_yarn"]
    assert (leaves(model)["moe_layers.feed_forward.router.bias"][...] < 0).any()
    without = jax.tree.map(lambda x: x, model)
    without.moe_layers.feed_forward.router.bias[...] = jnp.zeros((2, 8))
    batch = rows("deepseek_yarn", "logits")
    assert np.abs(logits(model, *batch) - logits(without, *batch)).max() > 0.05
