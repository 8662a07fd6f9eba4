# SPDX-License-Identifier: Apache-2.0
"""`r1jax plan` as a user types it; nothing here needs the TPU compiler."""

import importlib.util
import json
import re

import pytest

from r1jax.cli import main
from r1jax.config import MeshConfig
from r1jax.parallel.costs import Collective, Costs, Loop
from r1jax.parallel.roofline import Times
from r1jax.parallel.schedule import Scheduled
from r1jax.parallel.stacks import Stacked
from r1jax.parallel.topology import parse
from r1jax.train.failure import StageFailed
from r1jax.train.plan import Plan

CONFIG = "--config=configs/v3_671b.py"
GROUP = (tuple(range(8)),)


def found(name="v5p-1024", *, temporaries=20e9):
    """A plan such as the compiler's numbers make, of a step on 512 devices."""
    return Plan(
        topology=parse(name),
        what="train",
        mesh=MeshConfig(fsdp=64, expert=8),
        arguments={"parameters": 5_400_000_000, "optimizer": 10_600_000_000, "batch": 300_000},
        argument_bytes=16.1e9,
        temporary_bytes=temporaries,
        host_bytes=0,
        stacked=Stacked(9e9, 5e9),
        tokens=512 * 4 * 4096,
        model_flops=2e18,
        compile_seconds=137.0,
        processor_seconds=233.0,
        costs=Costs(
            flops={"bf16": 2.6e18 / 512},
            traffic=9e12,
            collectives=[Collective("all-gather", GROUP, 150e9, 61.0, "jit(step)/gather")],
            loops=[Loop("attention", 16, 8.5, 1e12)],
            opaque={"my_kernel": 3.0},
        ),
        times=Times(11.06, 3.25, 0.5, 0.0),
        schedule=Scheduled(12.5, {"all-gather": 0.5}, {"all-gather": 0.25}, [3.25, 0.5, 0.0]),
    )


@pytest.fixture(autouse=True)
def _installed(monkeypatch):
    """Whether or not libtpu is: nothing here runs it."""
    monkeypatch.setenv("TPU_LIBRARY_PATH", "libtpu.so")


@pytest.fixture
def compiled(monkeypatch):
    """Stands in for the compiler: what was asked of it."""
    asked = []

    def plan(cfg, topology, what):
        asked.append((cfg, topology, what))
        return found(temporaries=300e9 if cfg.rows_per_device > 4 else 20e9)

    monkeypatch.setattr("r1jax.train.plan.plan", plan)
    monkeypatch.setattr("r1jax.train.plan_search.plan", plan)
    return asked


def refused(capsys, *args):
    """The one line of a command that is refused."""
    assert main(["plan", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((CONFIG, "--topology=v5p-1000"), "near: v5p-896, v5p-1024, v5p-1152"),
        ((CONFIG, "--topology=v7-8"), "known chips"),
        ((CONFIG, "--topology=v5p-1024", "--what=serve"), "invalid choice"),
        ((CONFIG,), "--topology"),
        ((CONFIG, "--topology=v5p-1024", "--out=x.jsonl"), "--search"),
        ((CONFIG, "--topology=v5p-1024", "--picture=x.doc"), ".png"),
        ((CONFIG, "--topology=v5p-1024", "--search=0"), "at least one"),
        (("--config=configs/quickstart.py", "--topology=v5p-1024"), "PlanConfig"),
        (("--config=none.py", "--topology=v5p-1024"), "no such file"),
        ((CONFIG, "--topology=v5p-1024", "--config.mesh.expert=3"), "does not divide 512"),
        ((CONFIG, "--topology=v5p-1024", "--config.mesh.fsdp=64"), "set mesh.fsdp=512"),
        ((CONFIG, "--topology=v5p-1024", "--config.mesh.exprt=64"), "mesh.expert"),
        ((CONFIG, "--topology=v5p-1024", "--config.length=999999"), "max_position"),
        ((CONFIG, "--topology=v5p-1024", "--config.micro_batches=3"), "divisible"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(capsys, args, said):
    assert said in refused(capsys, *args)


def test_without_the_compiler_it_says_what_to_install(capsys, monkeypatch):
    find = importlib.util.find_spec
    without = lambda name, *more: None if name == "libtpu" else find(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    assert "pip install libtpu" in refused(capsys, CONFIG, "--topology=v5p-1024")


def test_a_plan_is_a_table_or_one_object(capsys, compiled, tmp_path):
    args = [
        "plan",
        CONFIG,
        "--topology=v5p-1024",
        "--config.mesh.fsdp=64",
        "--config.mesh.expert=8",
    ]
    assert main(args) == 0
    out, err = capsys.readouterr()
    for word in ("parameters", "expert", "MFU", "1.300 times", "16 of", "my_kernel"):
        assert word in out.replace("8.5 of 16", "16 of")
    assert re.search(r"all-gather, and waited for +0.5 s, 0.25 s\n", out)
    assert re.search(r"as scheduled +12.5 s, 671,089 tokens/s, MFU 68.1 %\n", out)
    assert "fits: 36.1 of 102.8 GB" in err
    cfg, topology, what = compiled[-1]
    assert (cfg.mesh.expert, topology.devices, what) == (8, 512, "train")
    picture = tmp_path / "plan.png"
    assert main([*args, "--json", f"--picture={picture}"]) == 0
    facts = json.loads(capsys.readouterr().out)
    names = "fits hbm_per_chip_gb arguments_gb temporaries_gb collective_gb model_flops"
    for name in (*names.split(), "counted_flops", "compile_seconds"):
        assert name in facts
    assert facts["counted_flops"] == pytest.approx(2.6e18)
    assert facts["collectives_gb"] == {"all-gather": {"expert": 150.0}}
    assert facts["mfu"]["overlapped"] == pytest.approx(2e18 / (11.06 * 512 * 459e12))
    assert picture.stat().st_size > 10_000


def test_what_does_not_fit_is_status_1_and_says_what_helps(capsys, compiled):
    args = ["plan", CONFIG, "--topology=v5p-1024", "--config.rows_per_device=6", "--json"]
    assert main(args) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["fits"] is False
    assert err.splitlines()[-1].endswith("micro_batches=2 computes half as many rows at a time")
    assert "213.3 too many" in err


def test_a_compiler_that_fails_is_one_line_and_status_1(capsys, monkeypatch):
    def plan(*_):
        raise StageFailed("the compiler cannot do this step: INTERNAL")

    monkeypatch.setattr("r1jax.train.plan.plan", plan)
    assert main(["plan", CONFIG, "--topology=v5p-1024"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "r1jax: failed: the compiler cannot do this step: INTERNAL"


def test_a_search_prints_the_best_and_goes_on(capsys, compiled, tmp_path):
    args = ["plan", CONFIG, "--topology=v5p-1024", "--search=3", f"--out={tmp_path / 'a.jsonl'}"]
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert "3 of 3 settings fit" in err
    assert len(compiled) == 3
    assert main([*args, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert len(compiled) == 3
    assert len(again["tried"]) == 3
    assert again["best"][0]["fits"]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as status:
        main(["plan", "--help"])
    assert status.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("libtpu", "v5p-1024", "decode", "--search", "Exit status"))
    assert all(len(line) <= 90 for line in text.splitlines())
