# SPDX-License-Identifier: Apache-2.0
"""Where completions begin and end, by the tokenizer and the chat template of a model."""

import jax
import numpy as np
import pytest

from r1jax.config import MeshConfig, StartConfig
from r1jax.data.template import R1, parse
from r1jax.data.text import TextTokenizer
from r1jax.data.tokenizer import task_tokenizer
from r1jax.io.model import Model, export_model, save_model
from r1jax.nn.param import leaves
from r1jax.parallel.mesh import entered
from r1jax.train.start import ending_of, open_start
from r1jax.train.trained import task_words
from tests.nn import tiny
from tests.train.tiny import VOCAB

ASKS = "{{ messages[-1]['content'] }} <|Assistant|>"
CFG = tiny.dense_config(qwen2=True, vocab_size=VOCAB, num_layers=1)


def decoded(template, text):
    """A completion as the sampler reads it, its end included."""
    words = TextTokenizer(task_tokenizer().inner, {"chat_template": template, "eos_token": "<eos>"})
    ids = words.encode(f"{text} <eos>")
    return ending_of(Model(CFG, None, words)).decode(ids)


@pytest.mark.parametrize(
    ("text", "formed", "answer"),
    [
        ("1 + 1 </think> <answer> 2 </answer>", True, "2"),
        ("so <answer> 2 </answer>", False, ""),  # the thought never ends: no answer of it counts
        ("<think> 1 + 1 </think> <answer> 2 </answer>", False, ""),  # it is opened twice
    ],
)
def test_a_thought_that_the_prompt_opened_is_part_of_the_text(text, formed, answer):
    """DeepSeek-R1's own template ends in `<think>`."""
    found = parse(decoded(ASKS + " <think>\n", text), R1)
    assert (found.well_formed, found.answer) == (formed, answer)


def test_a_model_that_opens_its_thoughts_itself_is_read_as_it_writes():
    text = "<think> 1 + 1 </think> <answer> 2 </answer>"
    assert parse(decoded(ASKS, text), R1).well_formed
    assert not parse(decoded(ASKS, text.removeprefix("<think>")), R1).well_formed


def test_the_text_is_without_its_end():
    assert decoded(ASKS, "<think> 1") == "<think> 1"
    assert decoded(None, "1") == "1"


@pytest.mark.parametrize("write", [save_model, pytest.param(export_model, marks=pytest.mark.slow)])
def test_a_start_is_the_same_on_a_mesh(tmp_path, write):
    """A folder of ours, or of Hugging Face, whose parts go where the mesh wants them."""
    write(tmp_path / "start", Model(CFG, tiny.model(CFG), task_words(R1)))
    found = {}
    for mesh in (MeshConfig(), MeshConfig(data=4, fsdp=2)):
        with entered(mesh):
            start = open_start(StartConfig(path=str(tmp_path / "start")))
            model = leaves(start.state.model())
            found[mesh.devices] = {name: np.asarray(v.get_value()) for name, v in model.items()}
            spread = {len(v.get_value().sharding.device_set) for v in model.values()}
            assert spread == {mesh.devices}
    jax.tree.map(np.testing.assert_array_equal, found[1], found[8])
