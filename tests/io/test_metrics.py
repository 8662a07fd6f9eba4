# SPDX-License-Identifier: Apache-2.0
"""Metrics files: what is written is read, and a resumed file is the uninterrupted one."""

import json
import logging
import math

import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.io.metrics import MetricsWriter, read


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(stage="grpo", step=np.int32(3), reward=0.5, note="é", ok=True, none=None)
        writer.write(
            stage="grpo",
            step=4,
            reward=np.float32(0.1),
            kl=jnp.float32(1 / 3),
            count=jnp.int32(7),
            half=jnp.bfloat16(0.1),
            expert_load=jnp.asarray([[0.1, 0.2], [1, 2]], jnp.float32),
        )
    first, second = read(path)
    assert list(first) == ["stage", "step", "reward", "note", "ok", "none"]
    assert (first["step"], first["reward"], first["note"], first["ok"]) == (3, 0.5, "é", True)
    assert second["reward"] == 0.1, "the shortest decimal of the float32, not 0.10000000149011612"
    assert np.float32(second["kl"]) == np.float32(1 / 3), "and yet the same float32"
    assert second["expert_load"] == [[0.1, 0.2], [1.0, 2.0]]
    assert second["count"] == 7
    assert jnp.bfloat16(second["half"]) == jnp.bfloat16(0.1)


def test_numbers_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(
            stage="s", step=1, a=math.nan, b=np.float32("inf"), c=jnp.asarray([1.0, jnp.nan])
        )
    row = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert row == {"stage": "s", "step": 1, "a": None, "b": None, "c": [1.0, None]}
    (row,) = read(path)
    assert math.isnan(row["a"])
    assert math.isnan(row["b"])
    assert math.isnan(row["c"][1])


def write_all(writer, rows):
    for stage, step in rows:
        writer.write(stage=stage, step=step, loss=step / 7)


ROWS = [("sft", 1), ("sft", 2), ("sft", 2), ("grpo", 1), ("grpo", 2), ("sft_2", 1)]


@pytest.mark.parametrize("saved_after", range(len(ROWS) + 1))
@pytest.mark.parametrize("killed_after", range(len(ROWS) + 1))
def test_a_resumed_file_equals_the_uninterrupted_one(tmp_path, saved_after, killed_after):
    if killed_after < saved_after:
        return
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path) as writer:
        write_all(writer, ROWS[:saved_after])
        position = writer.position
        write_all(writer, ROWS[saved_after:killed_after])
    with path.open("a") as file:
        file.write('{"stage": "gr')  # a torn line
    with MetricsWriter(path, position=position) as writer:
        write_all(writer, ROWS[saved_after:])
    with MetricsWriter(tmp_path / "whole.jsonl") as writer:
        write_all(writer, ROWS)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_rows_are_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path / "m.jsonl")
    writer.write(stage="s", step=1)
    assert len(read(tmp_path / "m.jsonl")) == 1
    assert writer.position == (tmp_path / "m.jsonl").stat().st_size
    writer.close()
    writer.close()


def test_without_a_position_whole_rows_are_kept(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"stage": "s", "step": 1}\n{"stage"')
    with MetricsWriter(path) as writer:
        writer.write(stage="s", step=2)
    assert [row["step"] for row in read(path)] == [1, 2]


def test_a_file_shorter_than_its_checkpoint_knew_is_said(tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    path.write_text('{"stage": "s", "step": 1}\n')
    with caplog.at_level(logging.WARNING, logger="r1jax"), MetricsWriter(path, position=999):
        pass
    assert "rows were lost" in caplog.text
    assert len(read(path)) == 1


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl:2 is not a row"):
        read(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"m\.jsonl:1"):
        read(path)
