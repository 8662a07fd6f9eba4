# SPDX-License-Identifier: Apache-2.0
"""Progress and the stage table, on a terminal and elsewhere."""

import io
import logging

import pytest

from r1jax.cli.display import LiveDisplay, LogToDisplay, PlainDisplay, open_display, shown
from r1jax.cli.table import cells, write_table
from r1jax.train.progress import Silent


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def act(display, clock=None):
    """What a program tells in two short stages."""
    display.stage("pretrain", 3)
    for step in (1, 2, 3):
        if clock:
            clock.now += 1.5
        display.step(step, loss=1.0 / step, lr=1e-3)
    display.message("pass@1 12.0 % [not markup]")
    display.stage("rl_1", 0)
    display.step(1, reward=0.5)
    display.close()
    display.close()


@pytest.mark.parametrize(
    ("stream", "term", "kind"),
    [
        (io.StringIO, "xterm", PlainDisplay),
        (Terminal, "xterm", LiveDisplay),
        (Terminal, "dumb", PlainDisplay),
    ],
)
def test_the_display_fits_the_stream(monkeypatch, stream, term, kind):
    monkeypatch.setenv("TERM", term)
    assert type(open_display(stream())) is kind


def test_plain_lines_are_few_and_tell_where_it_is():
    out, clock = io.StringIO(), Clock()
    act(PlainDisplay(out, interval=2.0, clock=clock), clock)
    assert out.getvalue().splitlines() == [
        "[00:00] pretrain: 3 steps; the first step waits for the compiler",
        "[00:03] pretrain 2/3  loss 0.5",
        "[00:04] pretrain 3/3  loss 0.333",
        "[00:04] pass@1 12.0 % [not markup]",
        "[00:04] rl_1",
    ]


@pytest.mark.parametrize("no_color", [False, True])
def test_live_display(monkeypatch, no_color):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    act(LiveDisplay(out))
    text = out.getvalue()
    assert "pretrain" in text
    assert "3/3" in text
    assert "loss 0.333" in text
    assert "[not markup]" in text
    colours = [f"\x1b[{code}" in text for code in ("38;", "32m", "36m", "33m")]
    assert any(colours) != no_color


def test_a_live_display_that_never_began_can_be_closed():
    out = Terminal()
    LiveDisplay(out).close()
    assert "\x1b[?25l" not in out.getvalue(), "the cursor was not hidden"


def test_silent_takes_everything():
    act(Silent())


def test_warnings_of_the_library_are_shown():
    out = io.StringIO()
    log = logging.getLogger("r1jax.test_display")
    handler = LogToDisplay(PlainDisplay(out))
    log.addHandler(handler)
    log.warning("checkpoint %s passed over", "x")
    log.info("chatter")
    log.removeHandler(handler)
    assert "warning: checkpoint x passed over" in out.getvalue()
    assert "chatter" not in out.getvalue()


def test_numbers_are_short():
    assert shown({"a": 1.0, "kl": 1e-5, "reward": 0.51234}) == "reward 0.512  kl 1e-05"
    assert shown({"b": 12, "a": 0.123456}) == "b 12  a 0.123"
    assert shown({}) == ""
    assert len(shown({f"k{i}": i for i in range(20)}).split("  ")) == 5


STAGES = [
    {
        "name": "cold_start",
        "parameters": 812_345,
        "steps": 400,
        "seconds": 61.234,
        "pass_at_1": 0.3125,
        "greedy": 0.4,
        "cons_at_16": 0.5,
        "format_rate": 1.0,
        "mean_tokens": 41.26,
        "reflection_rate": None,
        "self_correction_rate": float("nan"),
    },
    {"name": "qwen2"},
]


def test_cells():
    assert cells(STAGES[0]) == [
        "cold_start", "812,345", "400", "61.2", "31.2", "40.0", "50.0", "100.0",
        "41.3", "–", "–", "–",
    ]  # fmt: skip
    assert cells(STAGES[1]) == ["qwen2"] + 11 * ["–"]


def test_the_table_shows_the_votes_of_as_many_samples_as_were_drawn():
    out = io.StringIO()
    write_table({"stages": [{"name": "rl_1", "cons_at_4": 0.25}]}, out)
    assert "cons@4" in out.getvalue()
    assert "25.0" in out.getvalue()


def test_the_plain_table_is_aligned():
    out = io.StringIO()
    write_table({"stages": STAGES}, out)
    caption, _, head, first, second = out.getvalue().splitlines()
    assert "percent" in caption
    assert head.split()[:3] == ["stage", "params", "steps"]
    column = head.index("pass@1") + len("pass@1")
    assert first[:column].endswith("31.2")
    assert second[:column].endswith("–")
    assert "\x1b" not in out.getvalue()
    assert "refl." not in head, "no stage has measured it"


def test_a_run_that_measured_nothing_is_not_said_to_be_on_held_out_problems():
    out = io.StringIO()
    sft = {"name": "sft", "parameters": 10, "steps": 2, "seconds": 1.5}
    write_table({"stages": [sft]}, out)
    assert out.getvalue().split() == [
        "stage",
        "params",
        "steps",
        "seconds",
        "sft",
        "10",
        "2",
        "1.5",
    ]
    out = io.StringIO()
    write_table({"stages": [sft | {"heldout_accuracy": 0.75}]}, out)
    assert "held-out" in out.getvalue()
    assert out.getvalue().splitlines()[-1].endswith("        75.0")


def test_the_table_on_a_terminal_and_without_stages(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    out = Terminal()
    write_table({"stages": STAGES}, out)
    assert "31.2" in out.getvalue()
    write_table({}, io.StringIO())
