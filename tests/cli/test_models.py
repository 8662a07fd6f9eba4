# SPDX-License-Identifier: Apache-2.0
"""The verbs about models as a user types them: import, export, generate, chat, info."""

import io
import json

import pytest

from r1jax.cli import main
from r1jax.data.text import TextTokenizer
from r1jax.data.tokenizer import task_tokenizer
from r1jax.infer.generate import Generation
from r1jax.io.model import Model, export_model
from r1jax.io.shards import Shards
from r1jax.nn.param import has_blocks
from tests.nn import tiny

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a tiny DeepSeek model that speaks the tasks' words."""
    tasks = task_tokenizer()
    cfg = tiny.model_config(vocab_size=tasks.vocab_size, max_position=64)
    tokenizer = TextTokenizer(tasks.inner, {"chat_template": TEMPLATE})
    out = tmp_path_factory.mktemp("models") / "hf"
    export_model(out, Model(cfg, tiny.model(cfg), tokenizer))
    return out


def said(capsys, *args):
    """(stdout, stderr) of a command that succeeds."""
    assert main(list(map(str, args))) == 0
    return tuple(capsys.readouterr())


def refused(capsys, *args):
    """The one line of a command that is refused."""
    assert main(list(map(str, args))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err


def test_there_and_back(folder, tmp_path, capsys):
    out, err = said(capsys, "import", folder, tmp_path / "ours")
    assert "written in" in err
    assert "parameters" in out
    said(capsys, "export", tmp_path / "ours", tmp_path / "back")
    one, other = Shards(folder), Shards(tmp_path / "back")
    assert one.shapes() == other.shapes()
    assert all(one.read(n).tobytes() == other.read(n).tobytes() for n in one.shapes())
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    assert "exists already" in refused(capsys, "export", folder, tmp_path / "back")


def test_info_counts_the_same_before_and_after_import(folder, tmp_path, capsys):
    before = json.loads(said(capsys, "info", folder, "--json")[0])
    said(capsys, "import", folder, tmp_path / "ours", "--dtype=bf16")
    after = json.loads(said(capsys, "info", tmp_path / "ours", "--json")[0])
    assert before["parameters"] == after["parameters"] > before["active_parameters"] > 0
    assert before != after, "the bytes are of another dtype"
    assert before["bytes_by_format"] == after["bytes_by_format"]
    assert "\nFP8  " in said(capsys, "info", folder)[0]


def test_info_of_the_released_model(capsys):
    out = said(capsys, "info", "--config=configs/v3_671b.py")[0]
    assert "671B (671,026,419,200)" in out
    assert "37.6B (37,552,297,472); 37B without the embedding" in out
    assert "576 values x 61 layers" in out


def test_generate_prints_the_answer_and_json_the_same(folder, capsys):
    command = ["generate", folder, "--prompt=1 + 2", "--temperature=0", "--max-tokens=8"]
    text, err = said(capsys, *command)
    assert "8 tokens" in err
    found = json.loads(said(capsys, *command, "--json")[0])
    assert found["text"] == text.removesuffix("\n")
    assert found["tokens"] == 8
    drafted = said(capsys, *command, "--draft=2", "--draft-always")
    assert drafted[0] == text, "greedy answers do not depend on drafting"
    assert "% accepted" in drafted[1]
    assert "nothing drafted" in said(capsys, *command, "--draft=2")[1]
    reranked = said(capsys, *command, "--draft=2", "--rerank=3")
    assert "best of 3 kept" in reranked[1]


@pytest.mark.slow
def test_generate_multiplies_in_fp8_if_asked(folder, tmp_path, capsys, monkeypatch):
    """A checkpoint's blocks are made ready once, before the first token."""
    said(capsys, "export", folder, tmp_path / "hf", "--dtype=fp8")
    seen = []

    class Watched(Generation):
        def __init__(self, model, *args, **kwargs):
            seen.append(has_blocks(model))
            super().__init__(model, *args, **kwargs)

    monkeypatch.setattr("r1jax.infer.generate.Generation", Watched)
    command = ["--prompt=1 + 2", "--temperature=0", "--max-tokens=4"]
    assert "4 tokens" in said(capsys, "generate", tmp_path / "hf", *command, "--fp8")[1]
    assert seen == [True]


def test_the_prompt_may_come_from_standard_input(folder, capsys, monkeypatch):
    command = ["generate", folder, "--temperature=0", "--max-tokens=4", "--raw"]
    text = said(capsys, *command, "--prompt=1 + 2")[0]
    monkeypatch.setattr("sys.stdin", io.StringIO("1 + 2"))
    assert said(capsys, *command, "--prompt=-")[0] == text


def test_a_conversation(folder, capsys, monkeypatch):
    lines = iter(["1 + 2", "3", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    out, err = said(capsys, "chat", folder, "--max-tokens=4", "--seed=3")
    assert err.count("4 tokens") == 2
    assert out.count("\n") == 2
    assert err.count("were in the cache") == 1, "the second turn does not feed the first again"


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["generate", "none", "--prompt=1"], "no such"),
        (["generate", "MODEL", "--prompt="], "no token"),
        (["generate", "MODEL", "--prompt=1", "--max-tokens=999"], "max_tokens"),
        (["generate", "MODEL", "--prompt=1", "--temperature=-1"], "temperature"),
        (["generate", "MODEL", "--prompt=1", "--top-p=0"], "top_p"),
        (["generate", "MODEL", "--prompt=1", "--draft=99"], "draft"),
        (["generate", "MODEL", "--prompt=1", "--rerank=4"], "set draft"),
        (["generate", "MODEL"], "--prompt"),
        (["import", "none", "somewhere"], "none"),
        (["import", "MODEL", "MODEL"], "exists already"),
        (["export", "MODEL", "somewhere", "--dtype=int4"], "int4"),
        (["info"], "--config"),
        (["info", "MODEL", "--config=x.py"], "--config"),
        (["info", "--config=none.py"], "no such file"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(folder, tmp_path, monkeypatch, capsys, args, word):
    monkeypatch.chdir(tmp_path)
    assert word in refused(capsys, *(folder if a == "MODEL" else a for a in args))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["import", "export", "generate", "chat", "info"])
def test_help_teaches(capsys, verb):
    with pytest.raises(SystemExit) as status:
        main([verb, "--help"])
    assert status.value.code == 0
    text = capsys.readouterr().out
    assert "MODEL" in text or "DST" in text
    assert all(len(line) <= 90 for line in text.splitlines())
