# SPDX-License-Identifier: Apache-2.0
"""A GGUF file (llama.cpp) seen as a Hugging Face checkpoint; needs the extra `gguf`."""

import re
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

LAYER = re.compile(r"blk\.(\d+)\.(.+)")
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# config.json field: metadata key under the architecture's name.
FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "head_dim": "attention.key_length",
}
PERMUTED = ("llama",)  # llama.cpp interleaves the rotary halves of these
CONTROL, USER_DEFINED = 3, 4  # token types
# Digits one by one, then bytes: what the pre-tokenizers named here do before the byte-pair merges.
SPLITS = {"smollm": True, "default": False, "gpt-2": False}


class GGUFFile:
    """One GGUF file with the interface of `io.shards.Source`.

    Attributes:
        path: of the file.
        config: what its metadata say, as a config.json.
    """

    def __init__(self, path: Path, reader: Any):
        self.path, self._reader = path, reader
        self._meta = {name: _value(field) for name, field in reader.fields.items()}
        self._tensors = {self._name(t.name): t for t in reader.tensors}
        self.config = self._config()

    @classmethod
    def open(cls, path: str | Path) -> "GGUFFile":
        """Reads metadata and the table of tensors.

        Raises:
            ValueError: the extra is not installed, the file is damaged, or holds an architecture or
                a tensor that is not known.
        """
        try:
            import gguf
        except ImportError as error:
            raise ValueError("reading a .gguf file needs: pip install 'r1jax[gguf]'") from error
        path = Path(path)
        _plausible(path)
        try:
            reader = gguf.GGUFReader(path)
            end = path.stat().st_size
            short = [t.name for t in reader.tensors if t.data_offset + t.n_bytes > end]
        except Exception as error:  # the library raises whatever its arrays raise
            text = " ".join(str(error).split())[:200]
            raise ValueError(f"{path}: is no GGUF file that can be read: {text}") from error
        if short:
            raise ValueError(f"{path}: {short[0]} lies beyond the end of the file")
        return cls(path, reader)

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """{name: (dtype, shape)} in the order of the file."""
        return {
            name: (_stored_dtype(t).name, tuple(int(n) for n in reversed(t.shape)))
            for name, t in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor as Hugging Face has it, quantised types as float32."""
        import gguf

        tensor = self._tensors[name]
        dtype, shape = _stored_dtype(tensor), self.shapes()[name][1]
        try:
            if dtype == np.float32:
                array = gguf.dequantize(tensor.data, tensor.tensor_type)
            else:
                array = np.asarray(tensor.data).view(dtype)
        except Exception as error:
            raise ValueError(f"{self.path}: {name} cannot be dequantised: {error}") from error
        array = np.ascontiguousarray(array, dtype).reshape(shape)
        kind = name.rsplit(".", 2)[-2]
        if self._architecture in PERMUTED and kind in ("q_proj", "k_proj"):
            field = "num_attention_heads" if kind == "q_proj" else "num_key_value_heads"
            array = _halves(array, self.config[field])
        return array

    def file_of(self, name: str) -> Path:
        """The file itself."""
        return self.path

    @property
    def _architecture(self) -> str:
        return str(self._meta.get("general.architecture"))

    def _name(self, theirs: str) -> str:
        """Hugging Face's name of a tensor."""
        if theirs in NAMES:
            return NAMES[theirs]
        if match := LAYER.fullmatch(theirs):
            part, _, end = match[2].rpartition(".")
            if part in LAYER_NAMES and end in ("weight", "bias"):
                return f"model.layers.{match[1]}.{LAYER_NAMES[part]}.{end}"
        raise ValueError(f"{self.path}: the tensor {theirs} is not known to r1jax")

    def _config(self) -> dict[str, Any]:
        kind = self._architecture
        if kind not in ("llama", "qwen2", "qwen3"):
            raise ValueError(
                f"{self.path}: general.architecture={kind!r} is not supported; llama, qwen2, qwen3 "
                "are"
            )
        for name in ("expert_count", "rope.scaling.type"):
            if self._meta.get(f"{kind}.{name}") not in (None, 0, "none"):
                raise ValueError(f"{self.path}: {kind}.{name} is not supported in a GGUF file")
        read = {f: self._meta.get(f"{kind}.{key}") for f, key in FIELDS.items()}
        embedding = self._tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise ValueError(f"{self.path}: the tensor token_embd.weight is missing")
        return {
            "model_type": kind,
            "torch_dtype": "float32",
            "hidden_act": "silu",
            "vocab_size": int(embedding.shape[-1]),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "bos_token_id": self._meta.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._meta.get("tokenizer.ggml.eos_token_id"),
            **{name: value for name, value in read.items() if value is not None},
        }

    def tokenizer(self) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
        """(tokenizer, tokenizer_config) of the metadata: byte-level BPE.

        Raises:
            ValueError: another kind of tokenizer, or another way of splitting text.
        """
        meta = {
            key.removeprefix("tokenizer.ggml."): value
            for key, value in self._meta.items()
            if key.startswith("tokenizer.ggml.")
        }
        if meta.get("model") != "gpt2":
            kind = meta.get("model")
            raise ValueError(f"{self.path}: tokenizer.ggml.model={kind!r}: expected gpt2")
        split = meta.get("pre", "default")
        if split not in SPLITS:
            raise ValueError(
                f"{self.path}: tokenizer.ggml.pre={split!r} is not known; {sorted(SPLITS)} are"
            )
        tokens = meta["tokens"]
        merges = [tuple(merge.split(" ", 1)) for merge in meta.get("merges", [])]
        out = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = [pre_tokenizers.Digits(individual_digits=True)] if SPLITS[split] else []
        out.pre_tokenizer = pre_tokenizers.Sequence([*digits, bytes_])
        out.decoder = decoders.ByteLevel()
        kinds = meta.get("token_type", [])
        marked = [t for t, k in zip(tokens, kinds, strict=False) if k in (CONTROL, USER_DEFINED)]
        out.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in marked])
        config = {"add_bos_token": bool(meta.get("add_bos_token", False))}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
            number = meta.get(f"{key}_token_id")
            config[f"{name}_token"] = None if number is None else tokens[number]
        config["chat_template"] = self._meta.get("tokenizer.chat_template")
        return out, config


def _value(field: Any) -> Any:
    """The value of a metadata field: a number, text, or a list of them."""
    value = field.contents()
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _stored_dtype(tensor: Any) -> np.dtype:
    """float16 and bfloat16 as they are; all else becomes float32."""
    names = {"F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
    return names.get(tensor.tensor_type.name, np.dtype(np.float32))


def _halves(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from interleaved rotary pairs (llama.cpp) to halves (Hugging Face)."""
    pairs = matrix.reshape(heads, -1, 2, *matrix.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(matrix.shape))


def _plausible(path: Path) -> None:
    """Refuses what cannot be one before the library allocates by its counts."""
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if len(head) < 24 or head[:4] != b"GGUF":
        raise ValueError(f"{path}: is no GGUF file: it does not begin with GGUF")
    _, n_tensors, n_fields = struct.unpack("<IQQ", head[4:])
    size = path.stat().st_size
    if (n_tensors + n_fields) * 12 > size:  # each takes more than that in the header
        raise ValueError(f"{path}: is damaged: it claims {n_tensors} tensors in {size} bytes")
