# SPDX-License-Identifier: Apache-2.0
"""Tokenizers, chat templates in a sandbox, and text that streams in whole characters."""

import json
from datetime import date
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from r1jax.data.text import BROKEN, UNDATED, TextTokenizer, load_tokenizer

DEEPSEEK = Path(__file__).parents[3] / "shared" / "data" / "tokenizers" / "deepseek_r1"
needs_deepseek = pytest.mark.skipif(not DEEPSEEK.is_dir(), reason="DeepSeek-R1's tokenizer absent")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_level(**config):
    """Every byte a token, `<s>` and `</s>` besides."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    names = dict(bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)
    return TextTokenizer(inner, names | config)


def sentence_pieces():
    """Words that begin with ▁, bytes where there is no word: a space is dropped at the start."""
    words = ["<unk>", "▁once", "▁upon", "▁a", "time", "▁", "a", "b"]
    pieces = words + [f"<0x{b:02X}>" for b in range(256)]
    scores = [(w, -float(i)) for i, w in enumerate(pieces)]
    inner = tokenizers.Tokenizer(models.Unigram(scores, 0, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return TextTokenizer(inner)


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    parts = [stream.push(i) for i in ids]
    return parts, stream.flush()


@settings(max_examples=60)
@given(text=st.text(max_size=30))
@pytest.mark.parametrize("make", [byte_level, sentence_pieces])
def test_streams_whole_characters(make, text):
    tokenizer = make()
    ids = tokenizer.encode(text, bos=False)
    parts, rest = streamed(tokenizer, ids)
    assert "".join(parts) + rest == tokenizer.decode(ids)
    if BROKEN not in tokenizer.decode(ids):
        assert not any(BROKEN in part for part in parts)


@settings(max_examples=60)
@given(ids=st.lists(st.integers(0, 255), max_size=40))
def test_streams_any_garbage(ids):
    tokenizer = byte_level()
    parts, rest = streamed(tokenizer, ids)
    # Other windows may make other numbers of U+FFFD of broken bytes; what is whole stays.
    whole = lambda text: text.replace(BROKEN, "")  # noqa: E731
    assert whole("".join(parts) + rest) == whole(tokenizer.decode(ids))


def test_an_emoji_comes_out_whole_and_at_once():
    tokenizer = byte_level()
    parts, rest = streamed(tokenizer, tokenizer.encode("a🐉b", bos=False))
    assert parts == ["a", "", "", "", "🐉", "b"]
    assert rest == ""
    parts, rest = streamed(tokenizer, tokenizer.encode("🐉", bos=False)[:2])
    assert parts == ["", ""]
    assert set(rest) == {BROKEN}


def test_never_two_bos():
    tokenizer = byte_level(add_bos_token=True)
    assert tokenizer.encode("a")[0] == tokenizer.bos_id
    assert tokenizer.encode("<s>a").count(tokenizer.bos_id) == 1
    assert tokenizer.encode("a", bos=False)[0] != tokenizer.bos_id
    assert byte_level().encode("a")[0] != tokenizer.bos_id
    ids = tokenizer.chat_ids([{"role": "user", "content": "x"}])
    assert ids.count(tokenizer.bos_id) == 1


def test_chat():
    turns = [{"role": "user", "content": "hi <b>"}, {"role": "assistant", "content": "x"}]
    assert byte_level().chat(turns) == "<s>[user] hi <b>\n[assistant] x\n[assistant]"
    assert not byte_level().chat(turns, add_generation_prompt=False).endswith("[assistant]")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no system turn') }}",
        "{{ messages[7]['content'] + 1 }}",
        "{% for %}",
    ],
)
def test_templates_are_sandboxed(template):
    with pytest.raises(ValueError, match="template"):
        byte_level(chat_template=template).chat([{"role": "user", "content": "x"}])


def test_there_and_back(tmp_path):
    first = byte_level(add_bos_token=True)
    first.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.config == first.config
    assert again.encode("é🐉") == first.encode("é🐉")
    assert (again.bos_id, again.eos_ids) == (first.bos_id, first.eos_ids)


def test_newer_layouts(tmp_path):
    byte_level(chat_template=None).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("T")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    found = load_tokenizer(tmp_path)
    assert found.chat_template == "T"
    assert {3, 5} < set(found.eos_ids)


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    byte_level().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<ghost>"}')
    with pytest.raises(ValueError, match="<ghost>"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no chat_template"):
        byte_level(chat_template=None).chat([])


@needs_deepseek
def test_deepseek_r1():
    tokenizer = load_tokenizer(DEEPSEEK)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (1,))
    think = [tokenizer.tokenizer.token_to_id(t) for t in ("<think>", "</think>")]
    assert think == [128798, 128799]
    turns = [{"role": "system", "content": "S."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.chat(turns)
    assert text == "<｜begin▁of▁sentence｜>S.<｜User｜>Hi<｜Assistant｜>"
    ids = tokenizer.chat_ids(turns)
    assert ids[0] == 0
    assert ids.count(0) == 1
    assert tokenizer.encode("Hi")[0] == 0
    turns += [{"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"}]
    text = tokenizer.chat([*turns, {"role": "user", "content": "More"}])
    assert "hm" not in text  # reasoning of earlier turns is dropped
    assert "Hello<｜end▁of▁sentence｜><｜User｜>More<｜Assistant｜>" in text
    for sample in ("größer 🐉 漢字 \u0301", "def f(x):\n\treturn x**2", "12345 + 678"):
        ids = tokenizer.encode(sample, bos=False)
        assert tokenizer.decode(ids) == sample
        parts, rest = streamed(tokenizer, ids)
        assert "".join(parts) + rest == sample
        assert not any(BROKEN in part for part in parts)


def test_a_template_is_told_the_date_or_one_that_stays():
    words = byte_level(chat_template="{{ strftime_now('%Y-%m-%d') }}")
    assert words.chat([]) == date.today().isoformat()
    words.today = UNDATED
    assert words.chat([]) == "2024-07-26"
