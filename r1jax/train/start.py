# SPDX-License-Identifier: Apache-2.0
"""The model that a run starts from, as a state to train, and back into a model folder."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from r1jax.config import DenseConfig, ModelConfig, StartConfig
from r1jax.data.datasets import opened_thought
from r1jax.data.text import UNDATED, TextTokenizer
from r1jax.io.checkpoint import SMALL
from r1jax.io.model import Model, open_model, save_model
from r1jax.nn.build import blank
from r1jax.nn.param import RouterBias, filled, leaves
from r1jax.parallel import hosts
from r1jax.sharding import place
from r1jax.train.sampler import Ending
from r1jax.train.state import TrainState, laid
from r1jax.train.trained import is_run, open_run

VALUE_HEAD = "value_head.npz"  # beside the weights of a reward model


@dataclasses.dataclass(frozen=True)
class Start:
    """A model that is to be trained.

    Attributes:
        model: with its tokenizer; parameters float32.
        state: the same without an optimizer.
    """

    model: Model
    state: TrainState

    @property
    def cfg(self) -> ModelConfig | DenseConfig:
        """The architecture."""
        return self.model.cfg

    @property
    def tokenizer(self) -> TextTokenizer:
        """Its tokenizer."""
        return self.model.tokenizer

    @property
    def bias_speed(self) -> float:
        """γ of the balance rule; 0 for dense models."""
        return self.cfg.moe.bias_update_speed if isinstance(self.cfg, ModelConfig) else 0.0


def open_start(
    cfg: StartConfig, *, check: Callable[[ModelConfig | DenseConfig], None] = lambda _: None
) -> Start:
    """Opens the model of a config; on a mesh each device gets its part of a folder of weights. A
    stage of a recipe's run is read onto one device, and laid out then.

    Args:
        check: refuses architectures that do not go with the run, before arrays are laid out.

    Raises:
        ValueError: there is none, or it has no tokenizer; or as `check`.
    """
    path = Path(cfg.path)
    mesh = jax.sharding.get_mesh()
    mesh = None if mesh.empty else mesh
    if is_run(path):
        found = open_run(path, mesh=mesh)
    else:
        found = open_model(path, dtype="float32", mesh=mesh)
    if found.tokenizer is None:
        raise ValueError(f"start.path={cfg.path}: has no tokenizer.json, so no text can be read")
    changes: dict[str, Any] = {"remat": cfg.remat, "fp8": cfg.fp8}
    if cfg.dtype:
        changes["dtype"] = cfg.dtype
    if isinstance(found.cfg, ModelConfig):
        changes["moe"] = dataclasses.replace(found.cfg.moe, redundant_experts=cfg.redundant_experts)
    arch = dataclasses.replace(found.cfg, **changes)
    check(arch)
    # Weights in FP8 blocks are dequantised by this too.
    values = {name: v.get_value().astype(jnp.float32) for name, v in leaves(found.module).items()}
    state = state_of(filled(blank(arch), values))
    found.tokenizer.today = UNDATED
    return Start(dataclasses.replace(found, cfg=arch, module=state.model()), state)


def fingerprint(module: nnx.Module) -> int:
    """A checksum of what each of several processes holds whole, the gains of norms at least: of
    another model, or another state of it, they differ. Alone a process has nothing to compare."""
    if not hosts.several():
        return 0
    values = (v.get_value() for v in leaves(module).values())
    whole = (x for x in values if x.is_fully_replicated and x.nbytes <= SMALL)
    return functools.reduce(lambda crc, x: zlib.crc32(hosts.read(x).tobytes(), crc), whole, 0)


def state_of(module: nnx.Module) -> TrainState:
    """A state of the module as it is, without an optimizer; on a mesh laid out by its axes."""
    graphdef, params, router = nnx.split(module, nnx.Param, RouterBias)
    state = TrainState(jnp.int32(0), params, router, (), graphdef)
    return place(state, laid(state))


def ending_of(model: Model) -> Ending:
    """Where completions of a model end; the text is without that token.

    Where the chat template opens the thought, the text begins with what it wrote: without the tag
    no completion would be well formed, and an answer in a thought that never ends would count.

    Raises:
        ValueError: the model has no tokenizer, or one that names no end.
    """
    words = model.tokenizer
    if words is None or not words.eos_ids:
        raise ValueError("the model's tokenizer names no eos_token: no completion would ever end")
    ends, opened = set(words.eos_ids), opened_thought(words)

    def decode(ids: Sequence[int]) -> str:
        return opened + words.decode(ids[:-1] if ids and ids[-1] in ends else ids)

    pad = words.eos_ids[0] if words.pad_id is None else words.pad_id
    return Ending(words.eos_ids, pad, decode)


def save_trained(path: str | Path, start: Start, state: TrainState) -> None:
    """Writes the trained policy as a model folder, which `generate` and `export` open.

    The checkpoint's own config.json is kept, so an export has its layout.
    """
    save_model(path, dataclasses.replace(start.model, module=state.model()))


def save_reward_model(path: str | Path, start: Start, state: TrainState) -> None:
    """Writes a reward model: the folder of its decoder, with the value head beside the weights.

    The vocabulary head, which it does not need, is the one it started with.
    """
    trained = state.model()
    values = {name: v.get_value() for name, v in leaves(start.model.module).items()}
    values |= {name: v.get_value() for name, v in leaves(trained.decoder).items()}
    module = filled(blank(start.cfg), values)
    save_model(path, dataclasses.replace(start.model, module=module))
    head = {
        "weight": hosts.read(trained.value_head[...]),
        "bias": hosts.read(trained.value_bias[...]),
    }
    if hosts.is_first():
        np.savez(Path(path) / VALUE_HEAD, **head)


def read_value_head(path: str | Path, *, field: str) -> Mapping[str, np.ndarray]:
    """The value head of a reward model's folder.

    Args:
        field: of the config that holds the path, for the error.

    Raises:
        ValueError: it is no such folder.
    """
    file = Path(path) / VALUE_HEAD
    if not file.is_file():
        raise ValueError(
            f"{field}={path}: has no {VALUE_HEAD}, so it is no reward model; name a run "
            "of the trainer reward_model"
        )
    with np.load(file) as found:
        return {name: found[name] for name in ("weight", "bias")}
