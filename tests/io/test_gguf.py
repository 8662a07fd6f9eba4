# SPDX-License-Identifier: Apache-2.0
"""GGUF files as checkpoints: exact tensors, llama.cpp's order of rotary pairs undone, bad files."""

import numpy as np
import pytest

from r1jax.io.gguf import GGUFFile

gguf = pytest.importorskip("gguf")
HEADS, KV, HEAD, DIM, FFN, VOCAB = 4, 2, 8, 32, 64, 5


def interleaved(w, heads):
    """llama.cpp's order, by a loop: row 2i of a head is its row i, row 2i + 1 its row i + half."""
    out, size = np.empty_like(w), w.shape[0] // heads
    for h in range(heads):
        for i in range(size // 2):
            out[h * size + 2 * i] = w[h * size + i]
            out[h * size + 2 * i + 1] = w[h * size + size // 2 + i]
    return out


def write(path, architecture="llama", extra=()):
    """A file of one layer; returns the tensors as Hugging Face has them."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    q, k = draw(HEADS * HEAD, DIM), draw(KV * HEAD, DIM)
    embed, up = draw(VOCAB, DIM), draw(FFN, DIM).astype(np.float16)
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in (
        ("embedding_length", DIM),
        ("feed_forward_length", FFN),
        ("block_count", 1),
        ("attention.head_count", HEADS),
        ("attention.head_count_kv", KV),
        ("context_length", 64),
        *extra,
    ):
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "ab", "1", "<|end|>"])
    writer.add_token_merges(["a b"])
    writer.add_token_types([1, 1, 1, 1, 3])
    writer.add_eos_token_id(4)
    llama = architecture == "llama"
    writer.add_tensor("token_embd.weight", embed)
    writer.add_tensor("blk.0.attn_q.weight", interleaved(q, HEADS) if llama else q)
    writer.add_tensor("blk.0.attn_k.weight", interleaved(k, KV) if llama else k)
    writer.add_tensor("blk.0.ffn_up.weight", up)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    layer = "model.layers.0."
    return {
        "model.embed_tokens.weight": embed,
        f"{layer}self_attn.q_proj.weight": q,
        f"{layer}self_attn.k_proj.weight": k,
        f"{layer}mlp.up_proj.weight": up,
    }


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_tensors_and_config(tmp_path, architecture):
    path = tmp_path / "m.gguf"
    wanted = write(path, architecture)
    found = GGUFFile.open(path)
    assert found.shapes().keys() == wanted.keys()
    for name, array in wanted.items():
        assert found.shapes()[name] == (array.dtype.name, array.shape)
        np.testing.assert_array_equal(found.read(name), array)
    assert found.config["model_type"] == architecture
    assert found.config["num_key_value_heads"] == KV
    assert found.config["tie_word_embeddings"] is True
    assert found.config["rms_norm_eps"] == pytest.approx(1e-5)


def test_tokenizer(tmp_path):
    write(tmp_path / "m.gguf")
    tokenizer, config = GGUFFile.open(tmp_path / "m.gguf").tokenizer()
    assert tokenizer.encode("ab1<|end|>").ids == [2, 3, 4]
    assert config["eos_token"] == "<|end|>"


def test_what_is_not_known_is_named(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, "mamba")
    with pytest.raises(ValueError, match="mamba"):
        GGUFFile.open(path)
    write(path, extra=[("expert_count", 8)])
    with pytest.raises(ValueError, match="expert_count"):
        GGUFFile.open(path)


def test_damaged_files(tmp_path):
    path = tmp_path / "m.gguf"
    write(path)
    whole = path.read_bytes()
    for n in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"m\.gguf"):
            GGUFFile.open(path)
    path.write_bytes(whole[:8] + b"\xff" * 16 + whole[24:])
    with pytest.raises(ValueError, match=r"m\.gguf"):
        GGUFFile.open(path)
