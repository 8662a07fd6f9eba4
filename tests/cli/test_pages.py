# SPDX-License-Identifier: Apache-2.0
"""A long run asks for large pages by starting anew, once, as the same command."""

import os
import subprocess
import sys

import pytest

from r1jax.cli import main, pages

glibc = pytest.mark.skipif(
    "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}), reason="glibc's own variable"
)
CODE = """
import os, pathlib, sys
from r1jax.cli import pages
pages.SETTING = pathlib.Path(sys.argv[1])
print(os.getpid(), os.environ.get(pages.NAME), *sys.argv[2:])
pages.ask()
print("on")
"""


def said(tmp_path, setting: str, before: str | None) -> list[list[str]]:
    """The lines of a process that asks: (id, variable, arguments), again if it starts anew."""
    (tmp_path / "enabled").write_text(setting)
    env = {k: v for k, v in os.environ.items() if k != pages.NAME}
    env |= {} if before is None else {pages.NAME: before}
    command = [sys.executable, "-c", CODE, str(tmp_path / "enabled"), "train", "--config=a b"]
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


@pytest.mark.parametrize(
    ("command", "given", "asks"),
    [("train", None, True), ("info", None, False), ("train", ["train", "--no-such-flag"], False)],
)
def test_the_long_verbs_of_the_command_ask(command, given, asks, monkeypatch, capsys):
    """And nobody who calls `main` with arguments: his process is his own."""
    asked = []
    monkeypatch.setattr(pages, "ask", lambda: asked.append(True))
    monkeypatch.setattr(sys, "argv", ["r1jax", command, "--no-such-flag"])
    assert main(given) == 2
    assert asked == [True] * asks
    assert "error" in capsys.readouterr().err
