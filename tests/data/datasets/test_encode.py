# SPDX-License-Identifier: Apache-2.0
"""Tokens of records: what is learnt is the assistant's turns and their end, under any template."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from r1jax.data.datasets import (
    Conversation,
    Labelled,
    Message,
    Preference,
    conversation_examples,
    encode_conversation,
    encode_labelled,
    encode_preference,
    encode_question,
    encode_turns,
    opened_thought,
    preference_examples,
)
from r1jax.data.packing import pack
from r1jax.data.text import TextTokenizer, load_tokenizer

DEEPSEEK = Path(__file__).parents[4] / "shared" / "data" / "tokenizers" / "deepseek_r1"

CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TRIMMING = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }} </s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# As DeepSeek-R1's: earlier reasoning is left out, and the prompt opens the next.
THINKING = (
    "{% for m in messages %}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' %}<s>{{ c.split('</think>')[-1] }}</s>"
    "{% else %}[user]{{ c }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s><think>\n{% endif %}"
)
# As Qwen3's: a turn without a thought has an empty one.
EMPTY_THOUGHT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{% if m['role'] == 'assistant' and "
    "'</think>' not in m['content'] %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
# As the quickstart's runs: the last turn alone.
LAST = "[user] {{ messages[-1]['content'] }} <s>"


def tokenizer(template, **config):
    """Every byte a token, `<s>` and `</s>` besides."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    return TextTokenizer(inner, {"eos_token": "</s>", "chat_template": template} | config)


def talk(*said):
    return tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said))


def learnt(words, example):
    """(all of an example, what of it is learnt) as text."""
    ids, mask = example
    return words.decode(ids), words.decode([i for i, m in zip(ids, mask, strict=True) if m])


@pytest.mark.parametrize(
    ("template", "whole", "part"),
    [
        (CHATML, "<s>user\nq</s>\n<s>assistant\na</s>", "a</s>"),
        (TRIMMING, "[user] q </s>[assistant] a </s>", " a </s>"),
        (LAST, "[user] q <s>a</s>", "a</s>"),
        (
            EMPTY_THOUGHT,
            "<s>user\nq</s><s>assistant\n<think>\n\n</think>\n\na</s>",
            "<think>\n\n</think>\n\na</s>",
        ),
        (None, "qa</s>", "a</s>"),
    ],
)
def test_the_answer_and_its_end_are_learnt(template, whole, part):
    words = tokenizer(template)
    assert learnt(words, encode_conversation(talk("q", "a"), words)) == (whole, part)


def test_the_prompt_is_what_the_model_is_asked_with():
    for template in (CHATML, TRIMMING, LAST, None):
        words = tokenizer(template)
        asked = encode_question("q", words)
        ids, mask = encode_conversation(talk("q", "a"), words)
        assert ids[: len(asked)] == asked
        assert mask == [0.0] * len(asked) + [1.0] * (len(ids) - len(asked))


def test_every_turn_of_the_assistant_is_learnt_and_nothing_after_the_last():
    words = tokenizer(CHATML)
    system = (Message("system", "be brief"),)
    ids, mask = encode_conversation((*system, *talk("q", "a", "r", "b", "s")), words)
    whole, part = learnt(words, (ids, mask))
    assert part == "a</s>b</s>"
    assert whole == (
        "<s>system\nbe brief</s>\n<s>user\nq</s>\n<s>assistant\na</s>\n"
        "<s>user\nr</s>\n<s>assistant\nb</s>"
    )
    assert ids == words.encode(whole, bos=False), "the same tokens as the text in one piece"


def test_packed_the_end_is_a_target():
    words = tokenizer(CHATML)
    packed = pack([encode_conversation(talk("q", "a"), words)], length=64, pad_id=0)
    targets = packed.targets_NT[packed.mask_NT > 0].tolist()
    assert words.decode(targets) == "a</s>"


def test_a_thought_that_the_prompt_opens_is_not_opened_twice():
    words = tokenizer(THINKING)
    for content in ("<think>\nt\n</think>\n\na", "t\n</think>\n\na"):
        whole, part = learnt(words, encode_conversation(talk("q", content), words))
        assert whole == "[user]q<s><think>\nt\n</think>\n\na</s>"
        assert part == "t\n</think>\n\na</s>"
    with pytest.raises(ValueError, match="opens a thought"):
        encode_conversation(talk("q", "a"), words)


def test_what_the_prompt_opens():
    """`<think>` and what follows it; not a thought that is closed, nor one in the question."""
    templates = (THINKING, CHATML, EMPTY_THOUGHT, "<think>{{ messages[0]['content'] }}", None)
    found = [opened_thought(tokenizer(template)) for template in templates]
    assert found == ["<think>\n", "", "", "", ""]
    assert opened_thought(tokenizer("{{ raise_exception('no') }}")) == ""


def test_turns_that_the_template_rewrites_are_learnt_in_rows_of_their_own():
    words = tokenizer(THINKING)
    turns = talk("q", "t</think>a", "r", "u</think>b")
    first, second = (learnt(words, row) for row in encode_turns(turns, words))
    assert first == ("[user]q<s><think>\nt</think>a</s>", "t</think>a</s>")
    assert second == ("[user]q<s>a</s>[user]r<s><think>\nu</think>b</s>", "u</think>b</s>")
    with pytest.raises(ValueError, match="rewrites earlier turns: 2 rows"):
        encode_conversation(turns, words)


def test_deepseek_r1s_own_template():
    if not DEEPSEEK.is_dir():
        pytest.skip(f"{DEEPSEEK} is not there")
    words = load_tokenizer(DEEPSEEK)
    ids, mask = encode_conversation(talk("1 + 1?", "<think>\neasy\n</think>\n\n2"), words)
    whole, part = learnt(words, (ids, mask))
    assert ids[0] == words.bos_id
    assert ids.count(words.bos_id) == 1
    assert ids[-1] == words.eos_ids[0]
    assert whole.count("<think>") == 1
    assert part.endswith("easy\n</think>\n\n2<｜end▁of▁sentence｜>")
    asked = encode_question("1 + 1?", words)
    assert ids[: len(asked)] == asked


def test_the_question_may_have_a_system_turn_and_an_instruction():
    words = tokenizer(CHATML)
    ids = encode_question("q", words, system="s", instruction="box it")
    assert words.decode(ids) == ("<s>system\ns</s>\n<s>user\nq\n\nbox it</s>\n<s>assistant\n")


@pytest.mark.parametrize(
    ("turns", "words", "said"),
    [
        (talk("q"), tokenizer(CHATML), "no turn of the assistant's"),
        (talk("q", "a</s>b"), tokenizer(CHATML), "holds the end-of-sequence"),
        (talk("q", "a"), tokenizer(CHATML, eos_token=None), "names no eos_token"),
        (talk("q", "a", "r", "b"), tokenizer(None), "no chat_template"),
        (talk("q", "a"), tokenizer("{{ raise_exception('no') }}"), "template fails: no"),
    ],
)
def test_what_cannot_be_encoded_is_refused(turns, words, said):
    with pytest.raises(ValueError, match=said):
        encode_conversation(turns, words)


def test_an_end_that_is_written_already_is_not_written_twice():
    words = tokenizer(CHATML)
    assert encode_conversation(talk("q", "a</s>"), words) == encode_conversation(
        talk("q", "a"), words
    )


def test_preferences_and_labels():
    words = tokenizer(CHATML)
    found = encode_preference(Preference(talk("q"), "good", "bad"), words)
    assert found.prompt == encode_question("q", words)
    assert [words.decode(ids) for ids in found[1:]] == ["good</s>", "bad</s>"]
    prompt, completion, label = encode_labelled(Labelled(talk("q"), "good", 1.0), words)
    assert (prompt, completion, label) == (found.prompt, found.chosen, 1.0)
    trimmed = Preference(talk("q"), "same", " same")
    with pytest.raises(ValueError, match="the same tokens"):
        encode_preference(trimmed, tokenizer(TRIMMING))


def test_what_is_too_long_is_counted_and_named():
    words = tokenizer(CHATML)
    talks = [Conversation(talk("q", text)) for text in ("a", "b" * 40, "</s>c", "d")]
    with pytest.raises(
        ValueError, match="2 of 4 rows .*item 2: has 6. tokens, .* at most length=40"
    ):
        conversation_examples(talks, words, length=40)
    found = conversation_examples(talks, words, length=40, skip=True)
    assert [learnt(words, e)[1] for e in found.items] == ["a</s>", "d</s>"]
    assert [s.where for s in found.skipped] == ["item 2", "item 3"]
    with pytest.raises(ValueError, match="all 4 were skipped"):
        conversation_examples(talks, words, length=5, skip=True)
    pairs = [Preference(talk("q"), "good", "bad" * n) for n in (1, 20)]
    kept = preference_examples(pairs, words, length=50, skip=True)
    assert len(kept.items) == len(kept.skipped) == 1
