# SPDX-License-Identifier: Apache-2.0
"""The bench and the tuner, on CPU at tiny shapes: what they print, write and refuse."""

import dataclasses
import json

import pytest
from jax.errors import JaxRuntimeError

from pallas_kernels import Backend, bench, candidates, cases, shapes, tuning

SIMULATED = Backend("tpu", "v5p", interpret=True)


def test_a_row_for_each_op(capsys):
    assert (
        bench.main(["--json", "--repeats", "1", "--op", "fp8_matmul", "--op", "grouped_matmul"])
        == 0
    )
    rows = json.loads(capsys.readouterr().out)
    assert [row["op"] for row in rows] == ["fp8_matmul", "grouped_matmul"]
    for row in rows:
        assert row["ms"] > 0
        assert row["xla_ms"] > 0
        assert 0 < row["of_bound"] < 1
        assert row["error"] < 2.0**-8  # of the quantised operands, rounded to bfloat16
    lines = bench.table(rows).splitlines()
    assert lines[0].split()[:3] == ["op", "shape", "impl"]
    assert len({line.index("tiny") for line in lines[1:]}) == 1
    assert "no kernel" in bench.table([{**rows[0], "unsupported": "no kernel"}])


def test_what_has_no_memory_leaves_the_others(capsys, monkeypatch):
    """A row that fails says so, XLA's own failing leaves the op's figures."""

    def fails(*_):
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: 28.89GiB\nand a trace")

    def without(case, **changed):
        named, make = cases.OPS[case]
        return named, lambda shape: dataclasses.replace(make(shape), **changed)

    monkeypatch.setitem(cases.OPS, "fp8_wgrad", without("fp8_wgrad", call=lambda _: fails))
    monkeypatch.setitem(cases.OPS, "fp8_dgrad", without("fp8_dgrad", xla=fails))
    ops = ("--op", "fp8_wgrad", "--op", "fp8_dgrad")
    assert bench.main(["--json", "--repeats", "1", *ops]) == 0
    failed, rest = json.loads(capsys.readouterr().out)
    assert failed["unsupported"] == "RESOURCE_EXHAUSTED: 28.89GiB"
    assert rest["ms"] > 0
    assert rest["xla_ms"] is None
    assert "28.89GiB" in bench.table([failed, rest])


def test_what_is_refused(capsys):
    assert bench.main(["--shape", "huge"]) == 2
    assert "no shape huge" in capsys.readouterr().err
    assert bench.main(["tune", "--op", "fp8_matmul"]) == 1
    assert "needs a TPU" in capsys.readouterr().err
    assert bench.main(["--device", "abacus"]) == 2


def test_the_tuner_writes_what_tuning_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    tiles, took = bench.tune("fp8_matmul", "tiny", SIMULATED, 1)
    assert took > 0
    assert json.loads((tmp_path / "v5p.json").read_text()) == {
        "fp8_matmul": {"b128 k256 m64 n128 t0": list(tiles)}
    }


@pytest.mark.parametrize(
    ("op", "backend"),
    [(op, SIMULATED) for op in cases.OPS]
    + [(op, Backend("gpu", "h100")) for op in ("fp8_matmul", "fp8_dgrad", "fp8_wgrad")],
)
def test_the_tuner_writes_under_the_key_the_op_looks_up(op, backend, monkeypatch):
    asked = []

    def choose(name, dims, backend, heuristic):
        asked.append((name, tuning.key(dims)))
        return heuristic()

    monkeypatch.setattr(tuning, "choose", choose)
    named, make = cases.OPS[op]
    case = make(named["tiny"])
    bench.jax.eval_shape(case.call(backend), *case.arrays)
    name, dims, _ = case.gpu_tiles if backend.name == "gpu" else case.tiles
    assert asked == [(name, tuning.key(dims))]


def test_candidates_divide_and_end():
    m, k, n = shapes.MATMUL["v3-dense-up"]
    found = list(candidates.matmul((m, n, k), 128, 1))
    assert 10 < len(found) < 200
    assert all(k % tk == 0 and tk % 128 == 0 for _, _, tk in found)
    assert all(k % tk == 0 for _, tk in candidates.quantize(m, k, 128))
