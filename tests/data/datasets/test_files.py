# SPDX-License-Identifier: Apache-2.0
"""Reading rows: whatever is in a file, good rows come out whole and bad ones by file and line."""

import gzip
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.data.datasets import Rows, Skipped, fields, read, read_rows
from r1jax.data.datasets.records import joined
from tests.data.datasets.test_chats import tried


def text_of(row):
    return fields.text(row, "a")


def written(tmp_path, raw, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return path


# Any text that UTF-8 can carry, U+2028 and carriage returns among it.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
ENDS = st.sampled_from(["\n", "\r\n", "\n\n", "\n \r\n\n"])


@given(st.lists(TEXTS, min_size=1), ENDS, st.booleans(), st.booleans())
def test_what_is_written_is_read(tmp_path_factory, texts, end, bom, packed):
    """Blank lines, carriage returns, a byte order mark and gzip do not change the rows."""
    raw = end.join(json.dumps({"a": text}, ensure_ascii=False) for text in texts).encode()
    raw = b"\xef\xbb\xbf" * bom + raw
    path = written(tmp_path_factory.mktemp("x"), gzip.compress(raw) if packed else raw)
    assert read(path, text_of) == Rows(tuple(texts))


@given(st.lists(TEXTS, min_size=1), st.booleans())
def test_a_json_list_is_read_under_any_name(tmp_path_factory, texts, indented):
    raw = json.dumps([{"a": text} for text in texts], indent=2 if indented else None)
    assert read(written(tmp_path_factory.mktemp("x"), f" \n{raw}"), text_of).items == tuple(texts)


@given(st.binary(max_size=200))
def test_no_bytes_at_all_escape_as_another_error(tmp_path_factory, raw):
    """Any file is read, refused in one line, or its rows are skipped; nothing else is raised."""
    folder = tmp_path_factory.mktemp("x")
    for name in ("x.jsonl", "x.parquet"):
        path = written(folder, raw, name)
        found, refusal = tried(lambda path=path: read(path, text_of, skip=True))
        if refusal:
            assert len(refusal.splitlines()) == 1
            assert name in refusal
        else:
            assert len(found.items) > 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
READERS = {
    "text": text_of,
    "number": lambda row: fields.text_or_number(row, "a"),
    "texts": lambda row: fields.texts(row, "a"),
    "share": lambda row: fields.share(row, "a"),
    "prompt": lambda row: fields.prompt(row, "a"),
    "answer": lambda row: fields.answer(row["a"], "a"),
}


@given(JSON, st.sampled_from(sorted(READERS)))
def test_no_value_at_all_escapes_a_field_as_another_error(value, name):
    _, refusal = tried(lambda: READERS[name]({"a": value}))
    assert not refusal or "'a" in refusal
    assert len(refusal) < 400, "a fault is named, not copied"


HUGE = "9" * 5000
BAD = {
    '{"a": "x"': "is not JSON",
    "{'a': 1}": "is not JSON",
    '["x"]': "must hold a JSON object, got list",
    '"x"': "must hold a JSON object, got str",
    "17": "must hold a JSON object, got int",
    '{"a": 1}': "field 'a' must be text, got 1",
    '{"a": null}': "field 'a' is missing",
    '{"b": "x"}': "field 'a' is missing",
    '{"a": "  "}': "field 'a' is empty",
    '{"a": ["x"]}': "field 'a' must be text, got list",
    '{"a": NaN}': "NaN is no JSON value",
    f'{{"a": {HUGE}}}': "Exceeds the limit",
    f'{{"a": {HUGE[:4000]}}}': "field 'a' must be text, got int",
    '{"a": "\\ud800"}': "half a character",
    '{"a": "x\xff"}'.encode("latin-1"): "utf-8",
    "[" * 100_000: "nested too deeply",
}


@pytest.mark.parametrize("bad", BAD, ids=lambda b: str(b[:12]))
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, bad):
    good, raw = b'{"a": "x"}\n', bad.encode() if isinstance(bad, str) else bad
    path = written(tmp_path, good + b"\n" + raw + b"\r\n" + good)
    with pytest.raises(ValueError, match="1 of 3 rows cannot be used") as refusal:
        read(path, text_of)
    assert "rows.jsonl:3: " in str(refusal.value)
    assert BAD[bad] in str(refusal.value)
    assert len(str(refusal.value)) < 500
    found = read(path, text_of, skip=True)
    assert found.items == ("x", "x")
    (skipped,) = found.skipped
    assert skipped.where == f"{path}:3"
    assert BAD[bad] in skipped.reason


def test_many_bad_rows_are_counted_and_few_named(tmp_path):
    path = written(tmp_path, '{"a": "x"}\n' + '{"a": 0}\n{\n"s"\n[]\n' + "{}\n" * 5)
    with pytest.raises(ValueError, match=r"9 of 10 rows .*:2: .*:3: .*:4: .*; and 6 more") as error:
        read(path, text_of)
    assert ":5:" not in str(error.value)
    found = read(path, text_of, skip=True)
    assert len(found.skipped) == 9
    assert found.places == (f"{path}:1",)


def test_a_fault_of_all_rows_is_named_once(tmp_path):
    path = written(tmp_path, "{}\n" * 9)
    with pytest.raises(ValueError, match=r"rows.jsonl:1: [^:]*; and 8 more; mend .*data.skip=true"):
        read(path, text_of)


@pytest.mark.parametrize("raw", ["", "\n\n", "[]", "\ufeff", '{"a": 1}'])
def test_no_row_to_use_is_refused_even_when_skipping(tmp_path, raw):
    with pytest.raises(ValueError, match="holds no rows to use"):
        read(written(tmp_path, raw), text_of, skip=True)


def test_files_that_are_none(tmp_path):
    whole = gzip.compress(b'{"a": "x"}\n' * 1000)
    for path, word in [
        (tmp_path / "absent.jsonl", "no such file"),
        (tmp_path, "is a folder"),
        (written(tmp_path, whole[:-12], "cut.jsonl.gz"), "cannot be read"),
        (written(tmp_path, b"\x1f\x8bnonsense", "bad.gz"), "cannot be read"),
        (written(tmp_path, '[{"a": "x"},', "cut.json"), "is not a JSON list"),
    ]:
        with pytest.raises(ValueError, match=word) as error:
            read(path, text_of, skip=True)
        assert str(path) in str(error.value)


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow", reason="needs the extra parquet")
    import pyarrow
    import pyarrow.parquet

    rows = [{"a": "x", "b": [{"c": "1"}]}, {"a": None, "b": []}, {"a": "z", "b": None}]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [row for _, row in read_rows(path)] == rows
    found = read(path, text_of, skip=True)
    assert found.items == ("x", "z")
    assert found.skipped == (Skipped(f"{path} row 2", "field 'a' is missing"),)
    with pytest.raises(ValueError, match="is no readable Parquet file"):
        read(written(tmp_path, b"PAR1 not", "x.parquet"), text_of)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'r1jax\[parquet\]'"):
        read(written(tmp_path, b"PAR1", "x.parquet"), text_of)


def test_several_files_as_one():
    bad = Skipped("f:1", "is wrong")
    assert joined([Rows((1, 2), (bad,)), Rows((3,))]) == Rows((1, 2, 3), (bad,))


def test_a_folder_is_told_by_the_data_in_it(tmp_path):
    for name in ("run.json", "pairs.jsonl", "traces.jsonl"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(
        ValueError, match=r"is a folder; name a file in it: pairs.jsonl, traces.jsonl$"
    ):
        read_rows(tmp_path)
