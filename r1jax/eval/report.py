# SPDX-License-Identifier: Apache-2.0
"""`report.html`: a run in one page that needs nothing else, neither a network nor a script.

Model output is untrusted text: every string is escaped, and the page forbids scripts and foreign
loads.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from r1jax.eval import figures
from r1jax.eval.summary import cons_key

Rows = Sequence[Mapping[str, Any]]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_NOTHING = "–"


def _share(value: float) -> str:
    return f"{100 * value:.1f}"


# summary key, heading, how it is shown
_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("parameters", "parameters", lambda value: f"{value:,.0f}"),
    ("steps", "steps", lambda value: f"{value:,.0f}"),
    ("seconds", "seconds", lambda value: f"{value:,.1f}"),
    ("pass_at_1", "pass@1", _share),
    ("greedy", "greedy", _share),
    ("cons_at_", "cons@", _share),  # of as many samples as there are
    ("format_rate", "format", _share),
    ("mean_tokens", "tokens", lambda value: f"{value:.1f}"),
    ("reflection_rate", "reflection", _share),
    ("self_correction_rate", "self-correction", _share),
)


def write_report(
    out_dir: str | Path, summary: Mapping[str, Any], metrics: Rows, samples: Rows
) -> Path:
    """Writes OUT/report.html and returns its path.

    Args:
      out_dir: the output folder, which exists.
      summary: as in `summary.json`; any part may be missing.
      metrics: the rows of `metrics.jsonl`; stages with `reward` are RL, others with `loss`
        supervised.
      samples: answers to one held-out question each: `question`, `before`, `after`,
        `before_correct`,
        `after_correct`.
    """
    stages, model = summary.get("stages", []), summary.get("config", {}).get("model", {})
    moe_layers = model["num_layers"] - model["first_k_dense"] if model else None
    body = [
        _head(summary, metrics),
        _section("Stages", _TABLE_NOTE, _table(stages)),
        _section("Held-out pass@1", _BARS_NOTE, _figure(figures.bars(stages))),
        _section("Reinforcement learning", _RL_NOTE, _figure(figures.rl_curves(metrics))),
        _section("Supervised stages", _LOSS_NOTE, _figure(figures.losses(metrics))),
        _section("Expert load", _LOAD_NOTE, _figure(figures.expert_load(metrics, moe_layers))),
        _section("Before and after", _SAMPLES_NOTE, "".join(map(_sample, samples))),
        _footer(summary),
    ]
    style = resources.files("r1jax.eval").joinpath("report.css").read_text(encoding="utf-8")
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>r1jax report</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n{''.join(body)}</body>\n</html>\n"
    )
    path = Path(out_dir) / "report.html"
    # Lone surrogates cannot be written; a model may have produced any text.
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def write_picture(path: str | Path, summary: Mapping[str, Any], metrics: Rows) -> Path:
    """Writes one wide PNG: pass@1 by stage, and reward, length and reflection over RL."""
    figures.picture(path, summary, metrics)
    return Path(path)


_TABLE_NOTE = (
    "Measured on held-out problems after each stage; shares in percent. pass@1 is the mean over "
    "samples at temperature 1, cons@16 the majority of 16. Self-correction is the share of answers "
    "that end right among those whose first try was wrong."
)
_BARS_NOTE = (
    "The mean over samples at temperature 1, in percent. Students are in the second colour."
)
_RL_NOTE = "As recorded, and smoothed within each stage; a dashed line begins the next."
_LOSS_NOTE = "Training loss per stage."
_LOAD_NOTE = (
    "Tokens each routed expert received, relative to an even share: orange above it, blue below, "
    "blank where the load is even. Time runs from left to right."
)
_SAMPLES_NOTE = "Greedy answers to the first held-out questions, not picked, before and after RL."


def _section(title: str, note: str, content: str) -> str:
    if not content:
        return ""
    return f"<section>\n<h2>{escape(title)}</h2>\n<p>{escape(note)}</p>\n{content}</section>\n"


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>\n" if svg else ""


def _head(summary: Mapping[str, Any], metrics: Rows) -> str:
    cards = "".join(
        f'<div class="card"><b>{escape(figure)}</b><span>{escape(caption)}</span></div>\n'
        for figure, caption in headlines(summary, metrics)
    )
    return (
        "<header>\n<h1>The R1 recipe, end to end</h1>\n"
        "<p>One run of r1jax: every stage, measured on problems none of them was trained on.</p>\n"
        f'<div class="cards">\n{cards}</div>\n</header>\n'
    )


def headlines(summary: Mapping[str, Any], metrics: Rows) -> list[tuple[str, str]]:
    """(figure, caption) of what the run came to; what was not measured is left out."""
    stages = [s for s in summary.get("stages", []) if isinstance(s, Mapping)]
    found = []
    before, after = _around_rl(stages, metrics)
    for key, caption in (("pass_at_1", "pass@1"), ("self_correction_rate", "self-correction")):
        pair = [_shown(stage, key, _share) for stage in (before, after)]
        if _NOTHING not in pair:
            change = f"{before.get('name')} to {after.get('name')}"
            found.append((f"{pair[0]} → {pair[1]} %", f"{caption}, {change}"))
    students = [s for s in _students(stages) if _number(s.get("pass_at_1"))]
    if students:
        reached = " · ".join(_share(s["pass_at_1"]) for s in students)
        names = ", ".join(str(s.get("name")) for s in students)
        found.append((f"{reached} %", f"pass@1 of the students {names}"))
    seconds = sum(s["seconds"] for s in stages if _number(s.get("seconds")))
    if seconds:
        size = _shown(stages[0], "parameters", lambda value: f"{value:,.0f}")
        found.append((_duration(seconds), f"training of the stages below; {size} parameters"))
    return found


def _around_rl(stages: Rows, metrics: Rows) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The stage that RL started from and the last RL stage; {} where there is none."""
    rl = {row["stage"] for row in figures.rl_rows(metrics)}
    at = [i for i, stage in enumerate(stages) if stage.get("name") in rl]
    if not at:
        return {}, {}
    return (stages[at[0] - 1] if at[0] else {}), stages[at[-1]]


def _students(stages: Rows) -> list[Mapping[str, Any]]:
    """Stages of another model than the first one's."""
    return [s for s in stages if s.get("parameters") != stages[0].get("parameters")]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value


def _shown(stage: Mapping[str, Any], key: str, show: Callable[[float], str]) -> str:
    return show(stage[key]) if _number(stage.get(key)) else _NOTHING


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _table(stages: Rows) -> str:
    if not stages:
        return ""
    cons = cons_key(stages)
    k = cons.removeprefix("cons_at_")
    columns = [
        (cons, heading + k, show) if key == "cons_at_" else (key, heading, show)
        for key, heading, show in _COLUMNS
    ]
    head = "".join(f"<th>{escape(h)}</th>" for h in ("stage", *(h for _, h, _ in columns)))
    rows = [
        [escape(str(s.get("name", _NOTHING))), *(_shown(s, key, show) for key, _, show in columns)]
        for s in stages
    ]
    body = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}</table></div>\n'


def _sample(sample: Mapping[str, Any]) -> str:
    sides = "".join(
        f"<div><small><span>{when} RL</span>{_verdict(sample.get(f'{when}_correct'))}</small>"
        f"<pre>{_answer(str(sample.get(when, '')))}</pre></div>\n"
        for when in ("before", "after")
    )
    question = escape(str(sample.get("question", "")))
    return f'<div class="question">{question}</div>\n<div class="pair">\n{sides}</div>\n'


def _verdict(correct: Any) -> str:
    if correct is None:
        return ""
    verdict = "right" if correct else "wrong"
    return f'<span class="{verdict}">{verdict}</span>'


def _answer(text: str) -> str:
    """Escaped first; then tags are muted and the word `wait` is marked."""
    safe = escape(text)
    safe = re.sub(r"&lt;[/|a-zA-Z_]{1,40}&gt;", lambda m: f"<i>{m[0]}</i>", safe)
    return re.sub(r"\bwait\b", "<mark>wait</mark>", safe)


def _footer(summary: Mapping[str, Any]) -> str:
    lines = [("seed", {"": summary.get("seed", _NOTHING)})]
    lines += [(k, summary[k]) for k in ("versions", "host") if isinstance(summary.get(k), Mapping)]
    shown = ""
    for key, values in lines:
        text = ", ".join(f"{k} {v}".strip() for k, v in values.items())
        shown += f"<div>{escape(key)}: {escape(text)}</div>\n"
    return f"<footer>\n{shown}</footer>\n"
