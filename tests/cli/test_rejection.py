# SPDX-License-Identifier: Apache-2.0
"""rejection-sample as a user types it: from files of questions to traces, killed and gone on."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from r1jax.cli import main
from r1jax.config import laptop, to_config_dict
from r1jax.data.datasets import conversations, preferences
from r1jax.data.text import TextTokenizer
from r1jax.data.tokenizer import task_tokenizer
from r1jax.io import outdir
from r1jax.io.model import Model, export_model
from tests.cli.test_models import refused, said
from tests.nn import tiny

TEMPLATE = "{{ messages[-1]['content'] }} <|Assistant|>"
ASKED = ["compute 1 + 2", "compute 3 + 4", "compute 5 + 6"]
NUMBER = re.compile(r"-?\d+")
DRAW = ["--samples=24", "--rows=24", "--max-tokens=8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a tiny model that ends its answers soon."""
    tasks = task_tokenizer()
    cfg = tiny.dense_config(qwen2=True, vocab_size=tasks.vocab_size, num_layers=1)
    words = TextTokenizer(tasks.inner, {"chat_template": TEMPLATE}, eos_ids=range(100, 220))
    out = tmp_path_factory.mktemp("models") / "hf"
    export_model(out, Model(cfg, tiny.model(cfg), words))
    return out


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(folder, tmp_path_factory):
    """Questions whose references are what the model happens to say, and one nobody answers."""
    out = tmp_path_factory.mktemp("data")
    guess = written(out / "guess.jsonl", [{"question": q, "answer": "1"} for q in ASKED])
    command = ["rejection-sample", folder, guess, "--dataset=questions", *DRAW]
    assert main([*map(str, command), "--out", str(out / "guesses")]) == 0
    rows = [json.loads(x) for p in (out / "guesses/samples").glob("*.jsonl") for x in p.open()]
    answers = {r["item"]: r["text"] for r in rows if r["ended"] and NUMBER.fullmatch(r["text"])}
    assert set(answers) == {0, 1, 2}
    answers[2] = "987654"
    return written(
        out / "questions.jsonl",
        [{"question": q, "answer": answers[i]} for i, q in enumerate(ASKED)],
    )


def test_from_questions_to_traces_and_on(folder, data, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["rejection-sample", folder, data, "--dataset=questions", *DRAW, "--out", out]
    table, _ = said(capsys, *command)
    traces = [json.loads(line) for line in (out / "traces.jsonl").open()]
    assert f"kept       {len(traces)}\n" in table
    assert {t["messages"][0]["content"] for t in traces} == set(ASKED[:2])
    answers = {json.loads(x)["question"]: json.loads(x)["answer"] for x in data.open()}
    for trace in traces:
        asked, said_ = trace["messages"]
        assert said_["content"].split()[-1] == answers[asked["content"]] == trace["answer"]
    assert len(conversations(out / "traces.jsonl").items) == len(traces)
    pairs = preferences(out / "pairs.jsonl").items
    assert {p.prompt[0].content for p in pairs} <= set(ASKED[:2])
    assert all(p.chosen.split()[-1:] != p.rejected.split()[-1:] for p in pairs)
    # Finished: nothing is done again, and the same is said.
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    again, err = said(capsys, *command, "--json")
    assert "nothing to do" in err
    assert json.loads(again)["kept"] == len(traces)
    left_out = ("overlapping", "repeated", "too_long", "not_drawn", "unreadable")
    counted = dict.fromkeys(left_out, 0) | {"read": 3, "sampled": 3}
    assert json.loads(again)["questions"] == counted
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert "seed: saved 0, asked for 1" in refused(capsys, *command, "--seed=1")
    # The data are part of what was asked.
    other = written(tmp_path / data.name, [{"question": "compute 7 + 8", "answer": "15"}])
    line = refused(capsys, *(other if x is data else x for x in command))
    assert "data.0: questions=questions.jsonl" in line
    # What is in evaluation sets is not asked.
    words = " ".join(ASKED[0].split())
    held_out = written(tmp_path / "eval.jsonl", [{"problem": words}])
    options = ["--decontaminate", held_out, "--ngram=3", "--force", "--json", "--seed=1"]
    found = json.loads(said(capsys, *command, *options)[0])
    assert found["questions"]["overlapping"] == 1
    assert found["sampled"] == 48


def test_problems_of_a_task_for_a_model_of_its_words(folder, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["rejection-sample", folder, "--dataset=task:arithmetic", *DRAW, "--out", out]
    table, err = said(capsys, *command, "--questions=2")
    assert "questions  2 read, 2 sampled" in table
    assert "malformed" in table, "answers to a task follow the template"
    assert "nothing was kept" in err
    assert (out / "traces.jsonl").read_text() == ""


def test_a_run_is_asked_as_it_was_trained(folder, tmp_path, capsys):
    """Length, template and difficulty without a flag; a small context leaves room for both."""
    grpo = laptop.grpo()
    start = dataclasses.replace(grpo.start, path=str(folder))
    sampling = dataclasses.replace(grpo.sampling, max_new_tokens=5)
    run = dataclasses.replace(grpo, start=start, sampling=sampling)
    outdir.claim(tmp_path / "run", to_config_dict(run).to_dict())
    (tmp_path / "run" / "model").symlink_to(folder)
    command = ["--dataset=task:arithmetic", "--questions=4", "--samples=2", "--json"]
    said(capsys, "rejection-sample", tmp_path / "run", *command, "--out", tmp_path / "a")
    rows = [json.loads(x) for p in (tmp_path / "a/samples").glob("*.jsonl") for x in p.open()]
    assert max(row["tokens"] for row in rows) == 5
    items = json.loads((tmp_path / "a/statistics.json").read_text())
    assert items["sampled"] == 8
    said(capsys, "rejection-sample", folder, *command, "--out", tmp_path / "b")
    rows = [json.loads(x) for p in (tmp_path / "b/samples").glob("*.jsonl") for x in p.open()]
    assert 5 < max(row["tokens"] for row in rows) <= tiny.dense_config(qwen2=True).max_position // 2


def test_bad_rows_are_refused_or_skipped_and_counted(folder, tmp_path, capsys):
    bad = written(tmp_path / "bad.jsonl", [{"question": "compute 1 + 2", "answer": "3"}, {"x": 1}])
    command = ["rejection-sample", folder, bad, "--dataset=questions", *DRAW]
    command += ["--out", tmp_path / "run"]
    assert "bad.jsonl:2: field 'problem' or 'question' is missing" in refused(capsys, *command)
    assert not (tmp_path / "run").exists()
    table, err = said(capsys, *command, "--skip-bad-rows")
    assert "1 unreadable" in table
    assert "skipped" in err
    assert "bad.jsonl:2" in err


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ([], "no DATA given"),
        (["DATA"], "say what"),
        (["DATA", "--dataset=gsm9k"], "gsm9k"),
        (["DATA", "--dataset=gsm8k"], "questions.jsonl:1: field 'answer' has no line"),
        (["none.jsonl", "--dataset=gsm8k"], "none.jsonl: no such file"),
        (["nope=DATA"], "'nope' must be one of"),
        (["DATA", "--dataset=task:arithmetic"], "takes no DATA"),
        (["--dataset=task:chess"], "task:chess"),
        (["questions=DATA", "--decontaminate", "none"], "none: no such file"),
        (["questions=DATA", "--ngram=0"], "n=0"),
        (["questions=DATA", "--samples=0"], "samples=0"),
        (["questions=DATA", "--keep=0"], "keep=0"),
        (["questions=DATA", "--questions=0"], "--questions=0"),
        (["questions=DATA", "--temperature=-1"], "temperature=-1"),
        (["questions=DATA", "--top-p=2"], "top_p=2"),
        (["questions=DATA", "--language=xx"], "--language=xx"),
        (["questions=DATA", "--template=r2"], "r2"),
        (["questions=DATA", "--share=gsm8k=1"], "name each of questions"),
        (["questions=DATA", "--share=questions=x"], "write NAME=X"),
        (["questions=DATA", "--share=questions=-1"], "positive"),
        (["questions=DATA", "--max-tokens=999"], "--max-tokens=999 leaves"),
        (["questions=DATA", "--out=."], "not a run of r1jax"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(
    folder, data, tmp_path, monkeypatch, capsys, args, word
):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "something", [])
    args = [a.replace("DATA", str(data)) for a in args]
    out = [] if any(a.startswith("--out") for a in args) else ["--out=new"]
    assert word in refused(capsys, "rejection-sample", folder, *args, *out)
    assert [p.name for p in tmp_path.iterdir()] == ["something"]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as status:
        main(["rejection-sample", "--help"])
    assert status.value.code == 0
    text = capsys.readouterr().out
    for word in ("traces.jsonl", "--decontaminate", "task:arithmetic", "examples:"):
        assert word in text
    assert all(len(line) <= 90 for line in text.splitlines())


@pytest.mark.slow
def test_killed_at_random_moments_it_leaves_the_same_traces(folder, data, tmp_path):
    """SIGKILL, ten times in one run; then the files are those of a run nobody disturbed."""
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    program = "import sys; from r1jax.cli import main; sys.exit(main())"
    options = ["--dataset=questions", "--samples=400", "--rows=8", "--max-tokens=8", "--keep=9"]
    command = [sys.executable, "-c", program, "rejection-sample", str(folder), str(data), *options]

    def start(name):
        return subprocess.Popen(
            [*command, "--out", str(tmp_path / name)], env=env, stdout=subprocess.DEVNULL
        )

    assert start("whole").wait() == 0
    rng, kills, samples = random.Random(0), 0, tmp_path / "killed" / "samples"
    while kills < 10:
        process = start("killed")
        before = len(list(samples.glob("*.jsonl")))
        # Not before it has gone on: most moments are those of starting, where nothing is at stake.
        while process.poll() is None and len(list(samples.glob("*.jsonl"))) <= before:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.15)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 5, "the run ended too early to be killed often"
    assert start("killed").wait() == 0
    for name in ("traces.jsonl", "statistics.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (tmp_path / "whole" / "traces.jsonl").stat().st_size > 0


STORIES = Path(__file__).parents[3] / "shared" / "data" / "stories260K"


def stories_tokenizer(vocab):
    """The pieces of llama2.c's tokenizer, the best-scored pair merged first."""
    ids = {row["piece"]: row["id"] for row in vocab}
    pieces = [row["piece"] for row in vocab if row["id"] >= 259]
    splits = [(piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece))]
    merges = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
    inner = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Prepend(" ")
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    names = {"bos_token": "\n<s>\n", "eos_token": "\n</s>\n", "add_bos_token": True}
    return TextTokenizer(inner, names)


@pytest.mark.slow
def test_a_real_checkpoint_says_what_it_says(tmp_path, capsys):
    """stories260K, greedy: its golden text goes on behind the question."""
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is not there")
    folder = tmp_path / "stories"
    shutil.copytree(STORIES, folder)
    stories_tokenizer(json.loads((folder / "vocab.json").read_text())).save(folder)
    golden = json.loads((folder / "golden_greedy.json").read_text())["text"]
    question = "Once upon a time, there was"
    rows = [{"question": question, "answer": "7"}, {"question": "One day", "answer": "8"}]
    data = written(tmp_path / "q.jsonl", rows)
    command = ["rejection-sample", folder, data, "--dataset=questions", "--out", tmp_path / "run"]
    command += ["--temperature=0", "--samples=1", "--max-tokens=100", "--json"]
    found = json.loads(said(capsys, *command)[0])
    assert found["dropped"]["wrong"]["dropped"] == 2
    rows = [json.loads(x) for p in (tmp_path / "run/samples").glob("*.jsonl") for x in p.open()]
    (text,) = (row["text"] for row in rows if row["item"] == 0)
    assert len(text) > 150
    assert golden.startswith(question + text)
