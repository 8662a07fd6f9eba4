# SPDX-License-Identifier: Apache-2.0
"""The tokenizer: nothing the tasks write is unknown, everything comes back."""

import time

import numpy as np
import pytest

from r1jax.data import PRIMER_RL, PRIMER_SFT, R1, TASKS, TraceMix, completion, prompt
from r1jax.data.tasks import HIGH, LOW
from r1jax.data.tokenizer import SPECIAL_TOKENS, TaskTokenizer, task_tokenizer

TOKENIZER = task_tokenizer()
# The longest that the default difficulty and TraceMix(max_tries=5) can write.
LONGEST_PROMPT = {"arithmetic": 13, "countdown": 11, "quadratic": 14}
LONGEST_COMPLETION = {"arithmetic": 169, "countdown": 137, "quadratic": 101}


def test_ids_are_fixed():
    assert [TOKENIZER.id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert (TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.unk_id) == (0, 1, 2, 3)
    assert TOKENIZER.vocab_size == 323
    integers = [TOKENIZER.id(str(n)) for n in range(LOW, HIGH + 1)]
    assert integers == list(range(TOKENIZER.vocab_size - len(integers), TOKENIZER.vocab_size))
    with pytest.raises(ValueError, match="145"):
        TOKENIZER.id("145")


@pytest.mark.parametrize("template", [R1, PRIMER_SFT, PRIMER_RL])
@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_text_comes_back_and_the_longest_are_known(name, template):
    rng, task = np.random.default_rng(0), TASKS[name]
    mix = TraceMix(first_right=0.1, checked=0.95, retry=0.95, retry_right=0.2)
    prompts, completions = [0], [0]
    for index in range(1000):
        problem = task.sample(rng, split=("train", "heldout")[index % 2])
        trace = task.cold_start(rng, problem, mix)
        asked, done = prompt(problem.question, template), completion(trace, template)
        raw = task.pretrain_text(rng)
        raws = [(part, []) for part in (raw.question, raw.given, raw.learnt) if part]
        texts = ((asked, prompts), (done, completions), *raws)
        for text, lengths in texts:
            ids = TOKENIZER.encode(text)
            assert TOKENIZER.unk_id not in ids
            assert TOKENIZER.decode(ids) == text
            assert len(ids) == len(text.split())
            lengths.append(len(ids))
    assert max(prompts) == LONGEST_PROMPT[name]
    assert LONGEST_COMPLETION[name] * 0.8 < max(completions) <= LONGEST_COMPLETION[name]


def test_unknown_words_and_tags_without_spaces():
    assert TOKENIZER.encode("use seven 145") == [TOKENIZER.id("use"), 3, 3]
    assert TOKENIZER.encode("<think>try</think>") == TOKENIZER.encode("<think> try </think>")
    assert TOKENIZER.encode("") == []


def test_decode_options():
    ids = TOKENIZER.encode("<think> try 3 </think> <eos> <pad>")
    assert TOKENIZER.decode(ids, skip_special=True) == "try 3"
    batch_BT = np.array([ids, ids], np.int32)
    assert TOKENIZER.decode_batch(batch_BT, lengths=[5, 2]) == [
        "<think> try 3 </think> <eos>",
        "<think> try",
    ]
    assert TOKENIZER.decode_batch([ids], skip_special=True) == ["try 3"]
    assert TOKENIZER.decode(batch_BT[0]) == TOKENIZER.decode(ids)


def test_a_batch_decodes_fast():
    ids_BT = np.random.default_rng(0).integers(TOKENIZER.vocab_size, size=(128, 120))
    began = time.perf_counter()
    TOKENIZER.decode_batch(ids_BT)
    assert time.perf_counter() - began < 0.2  # about 2 ms on an idle core


def test_save_and_load(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    again = TaskTokenizer.load(tmp_path / "tokenizer.json")
    text = "<bos> <|User|> use 3 -5 to make 8 <|Assistant|> <think> 3 - -5 = 8 what"
    assert again.encode(text) == TOKENIZER.encode(text)
    assert again.vocab_size == TOKENIZER.vocab_size


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.json"):
        TaskTokenizer.load(tmp_path / "absent.json")
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(path)
    path.write_text(path.read_text().replace("<think>", "<muse>"))
    with pytest.raises(ValueError, match="<think>"):
        TaskTokenizer.load(path)
