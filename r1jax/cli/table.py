# SPDX-License-Identifier: Apache-2.0
"""The stage table: one row per stage, by rich on a terminal, as aligned text elsewhere."""

from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from r1jax.eval.summary import cons_key

_NOTHING = "–"
_CAPTION = "On held-out problems; shares in percent, tokens per answer.\n\n"
_OF_TRAINING = 3  # columns that are not of a measurement


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


# summary key, heading, how a number is shown; k of cons@k is the summary's
COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("parameters", "params", _count),
    ("steps", "steps", _count),
    ("seconds", "seconds", lambda value: f"{value:.1f}"),
    ("pass_at_1", "pass@1", _percent),
    ("greedy", "greedy", _percent),
    ("cons_at_", "cons@", _percent),
    ("format_rate", "format", _percent),
    ("mean_tokens", "tokens", lambda value: f"{value:.1f}"),
    ("reflection_rate", "refl.", _percent),
    ("self_correction_rate", "self-corr.", _percent),
    ("heldout_accuracy", "ranked right", _percent),
)


def cells(stage: Mapping[str, Any], cons: str = "cons_at_16") -> list[str]:
    """One row of the table; what a stage did not measure (absent, None or NaN) is a dash.

    Args:
        cons: the key of the majority vote's figure, see `eval.summary.cons_key`.
    """
    row = [str(stage.get("name", _NOTHING))]
    for key, _, shown in COLUMNS:
        value = stage.get(cons if key == "cons_at_" else key)
        number = isinstance(value, int | float) and value == value
        row.append(shown(value) if number else _NOTHING)
    return row


def write_table(summary: Mapping[str, Any], file: TextIO) -> None:
    """Writes the stages of a summary to `file`: a rich table to a terminal, else plain text.

    Columns that no stage has a number for are left out.
    """
    stages = summary.get("stages", [])
    cons = cons_key(stages)
    rows = [cells(stage, cons) for stage in stages]
    headings = ["stage", *(heading for _, heading, _ in COLUMNS)]
    headings = [h + cons.removeprefix("cons_at_") if h == "cons@" else h for h in headings]
    headings, *rows = _told([headings, *rows])
    if len(headings) > 1 + _OF_TRAINING:
        file.write(_CAPTION)
    if file.isatty():
        table = Table(*headings, box=None, pad_edge=False, header_style="bold")
        for number, column in enumerate(table.columns):
            column.justify = "right" if number else "left"
            column.no_wrap = True
        for row in rows:
            table.add_row(*row)
        Console(file=file).print(table)
        return
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in [headings, *rows]:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        file.write("  ".join([first, *rest]).rstrip() + "\n")


def _told(rows: list[list[str]]) -> list[list[str]]:
    """The table, its headings first, without the columns of dashes."""
    columns = zip(*rows, strict=True)
    kept = [c for i, c in enumerate(columns) if not i or any(cell != _NOTHING for cell in c[1:])]
    return [list(row) for row in zip(*kept, strict=True)]
