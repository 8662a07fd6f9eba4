# SPDX-License-Identifier: Apache-2.0
"""Rows of text: what is written is read, whatever the text holds."""

import pytest

from r1jax.io import jsonl


def test_round_trip(tmp_path):
    """Line separators of Unicode are text, not ends of lines."""
    rows = [{"text": "a\u2028b\u2029c\x85d\ne\x0c"}, {"text": "", "n": 1, "deep": {"x": [None]}}]
    path = tmp_path / "below" / "rows.jsonl"
    jsonl.write(path, rows)
    assert jsonl.read(path) == rows
    assert [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]
    jsonl.write(path, [])
    assert jsonl.read(path) == []


def test_the_last_line_may_lack_its_end(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}')
    assert jsonl.read(tmp_path / "rows.jsonl") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("text", "said"), [('{"a": 1}\n{"a"', "rows.jsonl:2 is not JSON"), ("[1]\n", ":1 must hold")]
)
def test_wrong_lines_are_named(tmp_path, text, said):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said):
        jsonl.read(tmp_path / "rows.jsonl")
