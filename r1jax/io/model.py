# SPDX-License-Identifier: Apache-2.0
"""A model folder of our own, and the one way to open any model: ours, Hugging Face's or a GGUF.

model.json      the architecture, which weights are FP8 blocks, the config.json it came with
weights/        one Orbax checkpoint
tokenizer.json  tokenizer_config.json
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from r1jax.config import DenseConfig, ModelConfig, from_config_dict, to_config_dict
from r1jax.data.text import TextTokenizer, load_tokenizer
from r1jax.io import checkpoint, hf_load
from r1jax.io.gguf import GGUFFile
from r1jax.io.hf_config import read_config, write_config
from r1jax.io.hf_names import places
from r1jax.io.hf_save import tensors
from r1jax.io.shards import MODEL, MTP, Draft, Shards, Source, read_json, write_shards
from r1jax.nn.build import blank
from r1jax.nn.param import filled, has_blocks, leaves
from r1jax.ops.quant import BLOCK, BlockScaled
from r1jax.parallel import hosts

DEEPSEEK_V3_LAYERS = 61
MARKER, WEIGHTS = "model.json", "weights"
KINDS: dict[str, type] = {"decoder": ModelConfig, "dense": DenseConfig}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Model:
    """A model and what belongs to it.

    Attributes:
        cfg: the architecture.
        module: the weights.
        tokenizer: None if the source has none.
        hf_config: the config.json it came with; None for a model that r1jax trained.
    """

    cfg: ModelConfig | DenseConfig
    module: nnx.Module
    tokenizer: TextTokenizer | None
    hf_config: Mapping[str, Any] | None = None


def silent(done: int, total: int) -> None:
    """Reports no progress."""


def open_model(
    path: str | Path,
    *,
    dtype: str = "stored",
    mesh: jax.sharding.Mesh | None = None,
    ignore: tuple[str, ...] = (),
    progress: Progress = silent,
) -> Model:
    """Opens a folder of ours, a Hugging Face folder or a GGUF file.

    Args:
        path: of the folder or file.
        dtype: "stored", "float32" or "bfloat16", as in `hf_load.load`; a folder of ours is taken
            as it is.
        mesh: where the arrays go; None: the default device.
        ignore: fields of config.json that need not be known.
        progress: called with (bytes read, bytes in all).

    Raises:
        ValueError: there is no model, or something in it is wrong; file and tensor are named.
    """
    path = Path(path)
    if (path / MARKER).is_file():
        return _open_ours(path, mesh)
    source = open_source(path)
    cfg = read_config(source.config, where=str(path / "config.json"), ignore=ignore)
    tokenizer = _tokenizer(source, cfg)
    module = hf_load.load(source, cfg, dtype=dtype, mesh=mesh, progress=progress)
    return Model(cfg, module, tokenizer, dict(source.config))


def in_fp8(model: Model) -> Model:
    """The model with DeepSeek's FP8 recipe for its products; its values stay as they are.

    `infer.generate.prepared` makes its weights into blocks, those that were kept as stored into
    themselves; a pass without that dequantises them and makes blocks of the values.
    """
    cfg = replace(model.cfg, fp8=replace(model.cfg.fp8, enabled=True))
    values = {name: variable.get_value() for name, variable in leaves(model.module).items()}
    return replace(model, cfg=cfg, module=filled(blank(cfg), values))


def open_source(path: Path) -> Source:
    """The checkpoint that lies at `path`."""
    if path.is_file() and path.suffix == ".gguf":
        return GGUFFile.open(path)
    if path.is_file():
        raise ValueError(f"{path}: is a file; expected a model folder or a .gguf file")
    if not path.is_dir():
        kind = "file" if path.suffix == ".gguf" else "model folder"
        hint = "; r1jax quickstart makes it" if path.parent.name == "quickstart" else ""
        raise ValueError(f"{path}: there is no such {kind}{hint}")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: has neither {MARKER} (r1jax) nor config.json (Hugging Face)")
    return Shards(path)


def _tokenizer(source: Source, cfg: ModelConfig | DenseConfig) -> TextTokenizer | None:
    if isinstance(source, GGUFFile):
        tokenizer = TextTokenizer(*source.tokenizer())
    elif any((source.path / name).is_file() for name in ("tokenizer.json", "tokenizer.json.gz")):
        tokenizer = load_tokenizer(source.path)
    else:
        return None
    _fits(tokenizer, cfg, source.path)
    return tokenizer


def _fits(tokenizer: TextTokenizer, cfg: ModelConfig | DenseConfig, where: Path) -> None:
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{cfg.vocab_size}: it is another model's tokenizer"
        )


def save_model(path: str | Path, model: Model) -> None:
    """Writes a model folder of ours; it appears whole or not at all. Of several processes each
    writes the arrays that it holds.

    Raises:
        ValueError: something is there already, or it cannot be written; the model is `prepared`.
    """
    _refuse_blocks(path, model)
    with Draft(path) as folder:
        values = {name: v.get_value() for name, v in leaves(model.module).items()}
        scaled = sorted(name for name, v in values.items() if isinstance(v, BlockScaled))
        kind = next(k for k, cls in KINDS.items() if isinstance(model.cfg, cls))
        record = {
            "program": "r1jax",
            "kind": kind,
            "config": to_config_dict(model.cfg).to_dict(),
            "scaled": scaled,
            "dtypes": {name: jnp.dtype(_stored(v).dtype).name for name, v in values.items()},
            "hf_config": model.hf_config,
        }
        checkpoint.save(folder / WEIGHTS, 0, _tree(values), meta={"config": record["config"]})
        if not hosts.is_first():
            return
        if model.tokenizer is not None:
            model.tokenizer.save(folder)
        (folder / MARKER).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _refuse_blocks(path: str | Path, model: Model) -> None:
    if has_blocks(model.module):
        raise ValueError(
            f"{path}: the model's weights are in FP8 blocks for decoding and cannot be written; "
            "write the model that was prepared"
        )


def _stored(value: Any) -> Any:
    return value.values if isinstance(value, BlockScaled) else value


def _tree(values: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into the checkpoint: block-scaled weights in their two parts."""

    def parts(value):
        return dict(values=value.values, scale=value.scale)

    return {k: parts(v) if isinstance(v, BlockScaled) else v for k, v in values.items()}


def _open_ours(path: Path, mesh: jax.sharding.Mesh | None) -> Model:
    record = read_json(path / MARKER)
    try:
        cfg = _config(path, KINDS[record["kind"]], record["config"])
        scaled, dtypes = set(record["scaled"]), record["dtypes"]
        empty = leaves(blank(cfg))
        shapes = {name: jax.tree.leaves(v)[0].shape for name, v in empty.items()}
        wanted = {
            name: jax.ShapeDtypeStruct(s, dtypes[name], sharding=hf_load.lies(empty[name], s, mesh))
            for name, s in shapes.items()
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / MARKER}: is damaged: {error!r}") from error
    layouts = {place.path: place.layout for place in places(cfg)}
    for name in scaled:
        layout, shape = layouts[name], shapes[name]
        lead = shape[: len(shape) - len(layout.shape)]
        blocks = tuple(-(-n // BLOCK) for n in layout.matrix)
        everywhere = None if mesh is None else jax.NamedSharding(mesh, jax.P())
        scale = jax.ShapeDtypeStruct(lead + blocks, jnp.float32, sharding=everywhere)
        wanted[name] = BlockScaled(wanted[name], scale, layout)
    tree = checkpoint.restore(path / WEIGHTS, 0, _tree(wanted))
    values = {k: BlockScaled(**v, layout=layouts[k]) if k in scaled else v for k, v in tree.items()}
    tokenizer = load_tokenizer(path) if (path / "tokenizer.json").is_file() else None
    return Model(cfg, filled(blank(cfg), values), tokenizer, record["hf_config"])


def _config(path: Path, kind: type, saved: Any) -> ModelConfig | DenseConfig:
    try:
        return from_config_dict(kind, saved)
    except ValueError as error:
        raise ValueError(
            f"{path / MARKER}: was written by an older version of r1jax, whose config was another "
            f"({error}); make the folder again"
        ) from error


def export_model(path: str | Path, model: Model, *, dtype: str = "stored") -> int:
    """Writes a Hugging Face folder; it appears whole or not at all.

    transformers knows a multi-token-prediction layer as number 61 only and calls any other an
    unexpected key, so that of a model of another depth lies in `mtp.safetensors`, which it does not
    open and `open_model` does.

    Args:
        path: of the folder.
        model: what to write.
        dtype: "stored", "float32", "bf16" or "fp8", as in `hf_save.tensors`.

    Returns:
        bytes of all tensors.

    Raises:
        ValueError: as `save_model`.
    """
    _refuse_blocks(path, model)
    with Draft(path) as folder:
        seen: set[str] = set()
        total = 0
        for stem, keep in _files(model.cfg).items():
            found = tensors(model.module, model.cfg, dtype=dtype, keep=keep)
            total += write_shards(folder, _kinds_seen(found, seen), stem=stem)
        config = dict(model.hf_config or write_config(model.cfg, dtype="float32"))
        config.pop("quantization_config", None)
        if "float8_e4m3fn" in seen:
            config["quantization_config"] = {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [BLOCK, BLOCK],
            }
        name = "dtype" if "dtype" in config and "torch_dtype" not in config else "torch_dtype"
        if dtype != "stored" or model.hf_config is None:
            config[name] = "float32" if seen == {"float32"} else "bfloat16"
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if model.tokenizer is not None:
            model.tokenizer.save(folder)
    return total


def _files(cfg: ModelConfig | DenseConfig) -> dict[str, Callable[[str], bool]]:
    """{stem of files: which tensors lie in them}."""
    if isinstance(cfg, DenseConfig) or not cfg.mtp_depth or cfg.num_layers == DEEPSEEK_V3_LAYERS:
        return {MODEL: lambda name: True}
    prefix = f"model.layers.{cfg.num_layers}."
    return {
        MODEL: lambda name: not name.startswith(prefix),
        MTP: lambda name: name.startswith(prefix),
    }


def _kinds_seen(items: Iterable[tuple[str, Any]], seen: set[str]):
    """The tensors as they pass, their dtypes noted."""
    for name, array in items:
        seen.add(array.dtype.name)
        yield name, array
