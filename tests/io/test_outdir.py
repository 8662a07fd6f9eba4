# SPDX-License-Identifier: Apache-2.0
"""Output folders: new, resumed, finished or refused; nothing deleted that is not ours."""

import json
import subprocess
import sys
import textwrap

import pytest

from r1jax.io import outdir

CONFIG = {"seed": 0, "model": {"hidden_size": 64}}
OTHER = {"seed": 0, "model": {"hidden_size": 128}}


def finished_run(path):
    outdir.claim(path, CONFIG)
    (path / "checkpoints" / "grpo").mkdir(parents=True)
    (path / "metrics.jsonl").write_text("{}\n")
    outdir.write_json(path / outdir.SUMMARY, {"stages": []})


def tree(path):
    return {p.relative_to(path).as_posix(): p.is_file() and p.read_bytes() for p in path.rglob("*")}


def test_new_then_resume_then_finished(tmp_path):
    out = tmp_path / "runs" / "a"
    assert outdir.inspect(out, CONFIG) == "new"
    assert not out.exists(), "inspect writes nothing"
    assert outdir.claim(out, CONFIG) == "new"
    assert outdir.inspect(out, CONFIG) == "resume"
    assert outdir.claim(out, CONFIG) == "resume"
    finished_run(out)
    before = tree(out)
    assert outdir.claim(out, CONFIG) == "finished"
    assert tree(out) == before


def test_an_empty_folder_is_new(tmp_path):
    (tmp_path / ".run.json.draft").write_text("{")  # of a run killed in its first moment
    assert outdir.claim(tmp_path, CONFIG) == "new"


def test_tuples_in_a_config_come_back_as_lists_and_still_match(tmp_path):
    outdir.claim(tmp_path, {"tasks": ("a", "b")})
    assert outdir.claim(tmp_path, {"tasks": ("a", "b")}) == "resume"


def test_another_config_is_refused_by_field_and_nothing_changes(tmp_path):
    finished_run(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"model\.hidden_size: saved 64, asked for 128"):
        outdir.claim(tmp_path, OTHER)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "summary.json", "run.json"])
def test_a_folder_that_is_not_ours_is_refused(tmp_path, force, name):
    (tmp_path / name).write_text('{"precious": 1}')
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="not a run of r1jax"):
        outdir.claim(tmp_path, CONFIG, force=force)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("config", [CONFIG, OTHER])
def test_force_deletes_only_what_a_run_wrote(tmp_path, config):
    finished_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert outdir.claim(tmp_path, config, force=True) == "new"
    assert {p.name for p in tmp_path.iterdir()} == {outdir.MARKER, "notes.txt"}
    assert outdir.claim(tmp_path, config) == "resume"


def test_force_follows_no_link_out_of_the_folder(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    outdir.claim(tmp_path / "run", CONFIG)
    (tmp_path / "run" / "checkpoints").symlink_to(elsewhere)
    outdir.claim(tmp_path / "run", CONFIG, force=True)
    assert (elsewhere / "precious").exists()


def test_a_deletion_that_was_interrupted_is_finished_not_resumed(tmp_path, monkeypatch):
    finished_run(tmp_path)

    def killed(out):
        (out / outdir.SUMMARY).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(outdir, "_clear", killed)
        with pytest.raises(KeyboardInterrupt):
            outdir.claim(tmp_path, CONFIG, force=True)
    assert (tmp_path / "checkpoints").exists()
    assert outdir.inspect(tmp_path, CONFIG) == "new"
    assert outdir.claim(tmp_path, CONFIG) == "new"
    assert not (tmp_path / "checkpoints").exists()


def test_paths_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc/no_such_folder"):
        with pytest.raises(ValueError, match=r"out='.*' cannot be used: .*; choose another --out"):
            outdir.claim(out, CONFIG)


HOLDER = """
    import sys, time
    from r1jax.io import outdir
    with outdir.held(sys.argv[1], {"seed": 0, "model": {"hidden_size": 64}}) as found:
        print(found, flush=True)
        time.sleep(600)
"""


def test_of_two_processes_one_is_refused_until_the_other_is_dead(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "new\n"
        before = tree(out)
        for force in (False, True):
            refused = pytest.raises(ValueError, match="another process is at work in it")
            with refused, outdir.held(out, CONFIG, force=force):
                pass
        assert tree(out) == before
        other.kill()
    with outdir.held(out, CONFIG) as found:
        assert found == "resume"
    assert {p.name for p in out.iterdir()} == {outdir.MARKER}


def test_the_lock_goes_with_its_context_and_a_finished_run_needs_none(tmp_path):
    with pytest.raises(KeyboardInterrupt), outdir.held(tmp_path, CONFIG):
        raise KeyboardInterrupt
    with outdir.held(tmp_path, CONFIG) as found:
        assert found == "resume"
        finished_run(tmp_path)
    before = tree(tmp_path)
    with outdir.held(tmp_path, CONFIG) as found, outdir.held(tmp_path, CONFIG):
        assert found == "finished"
        assert tree(tmp_path) == before


def test_a_lock_does_not_touch_a_folder_that_is_not_ours(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a run of r1jax"), outdir.held(tmp_path, CONFIG):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {"notes.txt"}


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    outdir.write_json(path, {"a": "é"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        outdir.write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        outdir.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": "é"}
