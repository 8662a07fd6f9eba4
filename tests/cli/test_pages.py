# SPDX-License-Identifier: Apache-2.0
"""A long run asks for large pages by starting anew, once, as the same command."""

import os
import subprocess
import sys

import pytest

from r1jax.cli import console, main, pages

glibc = pytest.mark.skipif(
    "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}), reason="glibc's own variable"
)
CODE = """
import os, pathlib, sys
from r1jax.cli import pages
pages.SETTING = pathlib.Path(sys.argv[1])
if "deaf" in sys.argv:
    os.environ.pop(pages.NAME, None)
print(os.getpid(), os.environ.get(pages.NAME), *sys.argv[2:])
pages.ask()
print("on")
"""


def said(tmp_path, setting: str, before: str | None, *more: str) -> list[list[str]]:
    """The lines of a process that asks: (id, variable, arguments), again if it starts anew."""
    (tmp_path / "enabled").write_text(setting)
    env = {k: v for k, v in os.environ.items() if k != pages.NAME}
    env |= {} if before is None else {pages.NAME: before}
    command = [sys.executable, "-c", CODE, str(tmp_path / "enabled"), "train", "--config=a b"]
    command += more
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return [line.split(" ", 2) for line in run.stdout.splitlines()]


@glibc
@pytest.mark.parametrize("before", [None, "glibc.malloc.arena_max=4"])
def test_it_starts_anew_once_as_the_same_command(before, tmp_path):
    first, second, last = said(tmp_path, "always [madvise] never", before)
    asked = "glibc.malloc.hugetlb=1"
    assert first[1:] == [str(before), "train --config=a b"]
    assert second[1:] == [asked if before is None else f"{before}:{asked}", "train --config=a b"]
    assert first[0] == second[0], "another process"
    assert last == ["on"]


@glibc
def test_a_variable_that_does_not_arrive_is_not_set_for_ever(tmp_path):
    """The kernel takes it from a process with privileges of its file."""
    first, second, last = said(tmp_path, "always [madvise] never", None, "deaf")
    assert first[:2] == second[:2] == [first[0], "None"]
    assert last == ["on"]


@pytest.mark.parametrize(
    ("setting", "before"),
    [
        ("always madvise [never]", None),
        ("[always] madvise never", None),
        ("always [madvise] never", "glibc.malloc.hugetlb=0"),
    ],
)
def test_it_goes_on_where_that_is_said_or_changes_nothing(setting, before, tmp_path):
    first, last = said(tmp_path, setting, before)
    assert first[1:] == [str(before), "train --config=a b"]
    assert last == ["on"]


def test_without_such_a_setting_it_goes_on(monkeypatch, tmp_path):
    monkeypatch.delenv(pages.NAME, raising=False)
    monkeypatch.setattr(pages, "SETTING", tmp_path / "none")
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started anew"))
    pages.ask()


@glibc
def test_what_cannot_start_anew_goes_on_also_without_streams(monkeypatch, tmp_path):
    tried = []

    def execv(*command):
        tried.append(command)
        raise FileNotFoundError

    (tmp_path / "enabled").write_text("always [madvise] never")
    for name in (pages.NAME, pages.ASKED):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(pages, "SETTING", tmp_path / "enabled")
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "stdout", None)
    pages.ask()
    assert len(tried) == 1


@pytest.mark.parametrize(
    ("run", "command", "asks"),
    [(console, "train", True), (console, "info", False), (main, "train", False)],
)
def test_the_long_verbs_of_the_console_ask(run, command, asks, monkeypatch, capsys):
    """And nobody who calls `main`: his process is his own."""
    asked = []
    monkeypatch.setattr(pages, "ask", lambda: asked.append(True))
    monkeypatch.setattr(os, "_exit", lambda _: None)  # should another test's program compile
    monkeypatch.setattr(sys, "argv", ["r1jax", command, "--no-such-flag"])
    assert run() == 2
    assert asked == [True] * asks
    assert "error" in capsys.readouterr().err
