# SPDX-License-Identifier: Apache-2.0
"""`r1jax train` in two processes of four devices: one run of eight, whatever happens to it.

Real processes, joined as on two machines; collectives by gloo.
"""

import dataclasses
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from r1jax.config import MeshConfig, StartConfig
from r1jax.io import checkpoint
from r1jax.io.model import export_model, open_model
from r1jax.train.runs import run_trainer
from tests.parallel.test_runs import RUNS, folder, values  # noqa: F401  (a fixture)
from tests.parallel.together import Run, config_file, environment, free_port, rows_of
from tests.train import tiny

# Sums of other processes, or of another number of them, are taken in another order.
FLOAT32 = 1e-5
OFTEN = 1e-3  # seconds between checkpoints: one a step
STEPS, KILLED = 8, 3


def longer(run, steps, **changes):
    """The run with so many steps."""
    part = "sft" if run.trainer == "sft" else run.trainer
    part = "pairs" if run.trainer in ("dpo", "reward_model") else part
    stage = dataclasses.replace(getattr(run, part), steps=steps)
    return dataclasses.replace(run, **{part: stage}, **changes)


def same(a, b, *, exactly=False):
    """Metrics of two runs, all rows and all numbers."""
    assert [(x["stage"], x["step"]) for x in a] == [(x["stage"], x["step"]) for x in b]
    assert len(a) > 0
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x.keys() - {"stage"}:
            if exactly:
                np.testing.assert_array_equal(x[name], y[name], err_msg=name)
            elif name != "sampler_error":  # rounding alone
                np.testing.assert_allclose(
                    x[name], y[name], rtol=FLOAT32, atol=FLOAT32, err_msg=name
                )


def same_models(a, b, tolerance):
    ours, theirs = values(a), values(b)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert np.abs(value - theirs[name]).max() <= tolerance, name


def files_of(out):
    """The steps of the checkpoints of each stage."""
    return {p.name: checkpoint.steps(p) for p in (out / "checkpoints").iterdir()}


def test_two_processes_stop_together_and_one_goes_on(tmp_path, folder):  # noqa: F811
    """SIGTERM to one: both save the same step and end with 0; eight devices of one process end it
    as if nothing had been."""
    run = longer(RUNS["sft"](folder, "dense"), 20, mesh=MeshConfig(fsdp=8))
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    with Run(config_file(tmp_path / "run.py", run), cut) as two:
        two.reach(1)
        two.processes[1].send_signal(signal.SIGTERM)
        assert two.ended() == [0, 0], [two.said(0), two.said(1)]
        assert all("interrupted; the same command resumes" in two.said(i) for i in range(2))
        assert two.said(1).count("\n") == 1  # the first process alone tells what happens
    done = rows_of(cut)
    assert 0 < len(done) < 20
    assert files_of(cut) == {"sft": [len(done)]}
    assert not (cut / ".lock").exists()
    run_trainer(run, cut)
    run_trainer(run, whole)
    same(rows_of(cut), rows_of(whole))
    same_models(cut, whole, FLOAT32)


@pytest.fixture(scope="module", params=["sft", "grpo"])
def two(request, tmp_path_factory, folder):  # noqa: F811
    """(the run, its config file, the folder of a run in two processes that nothing interrupts)."""
    path = tmp_path_factory.mktemp(request.param)
    # A mixture of experts takes too long to compile with a sampler.
    run, mesh = RUNS[request.param](folder, "moe"), MeshConfig(fsdp=2, expert=4)
    if request.param == "grpo":
        run, mesh = RUNS["grpo"](folder, "dense"), MeshConfig(fsdp=8)
    # Experts change devices of both processes.
    often = 3 if request.param == "sft" else 0
    run = longer(run, STEPS, mesh=mesh, checkpoint_every=OFTEN, rebalance_every=often)
    config = config_file(path / "run.py", run)
    with Run(config, path / "whole") as both:
        assert both.ended() == [0, 0], [both.said(0), both.said(1)]
    return run, config, path / "whole"


@pytest.fixture(scope="module")
def killed(two):
    """What SIGKILL to both leaves, some steps later than the first."""
    out = two[2].with_name("killed")
    with Run(two[1], out) as both:
        both.reach(KILLED)
        for process in both.processes:
            process.kill()
    assert KILLED <= len(rows_of(out)) < STEPS + (two[0].trainer == "grpo")
    return out


@pytest.mark.slow
def test_two_processes_are_one(tmp_path, two):
    """The same metrics and the same model as eight devices of one process."""
    run_trainer(two[0], tmp_path / "one")
    same(rows_of(tmp_path / "one"), rows_of(two[2]))
    same_models(tmp_path / "one", two[2], FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 4), (1, 8), (2, 2)])
def test_a_killed_run_goes_on(tmp_path, two, killed, processes, devices):
    """In the same processes bit for bit; in others to the rounding of sums."""
    run, _, whole = two
    out = shutil.copytree(killed, tmp_path / "out")
    mesh = run.mesh
    if processes * devices < 8:
        mesh = MeshConfig(fsdp=4) if mesh.expert == 1 else MeshConfig(expert=4)
    config = config_file(tmp_path / "run.py", dataclasses.replace(run, mesh=mesh))
    with Run(config, out, processes=processes, devices=devices) as again:
        assert again.ended() == [0] * processes, again.said(0)
        assert "resumed at step" in again.said(0)
    exactly = (processes, devices) == (2, 4)
    same(rows_of(out), rows_of(whole), exactly=exactly)
    same_models(out, whole, 0.0 if exactly else FLOAT32)


@pytest.mark.slow
def test_both_go_on_from_a_checkpoint_that_both_can_read(tmp_path, two, killed):
    """Pieces of the newest are cut short, which one process alone needs."""
    run, config, whole = two
    out = shutil.copytree(killed, tmp_path / "out")
    step = checkpoint.steps(out / "checkpoints" / run.trainer)[-1]
    pieces = out / "checkpoints" / run.trainer / f"{step:08d}" / "tree" / "ocdbt.process_1" / "d"
    for piece in pieces.iterdir():
        piece.write_bytes(piece.read_bytes()[: piece.stat().st_size // 2])
    with Run(config, out) as again:
        assert again.ended() == [0, 0], [again.said(0), again.said(1)]
        assert f"resumed at step {step - 1}" in again.said(0)
    same(rows_of(out), rows_of(whole), exactly=True)
    same_models(out, whole, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "dpo", "reward_model"])
def test_the_other_trainers_in_two_processes(tmp_path, folder, name):  # noqa: F811
    run = dataclasses.replace(RUNS[name](folder, "dense"), mesh=MeshConfig(fsdp=8))
    config = config_file(tmp_path / "run.py", run)
    with Run(config, tmp_path / "two") as both:
        assert both.ended() == [0, 0], [both.said(0), both.said(1)]
    run_trainer(run, tmp_path / "one")
    same(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"))
    same_models(tmp_path / "one", tmp_path / "two", FLOAT32)


@pytest.mark.slow
def test_each_process_reads_its_part_of_a_checkpoint(tmp_path, folder):  # noqa: F811
    """Of Hugging Face's layout, in FP8 blocks; experts are dealt out over both."""
    export_model(tmp_path / "hf", open_model(folder / "moe"), dtype="fp8")
    run = longer(RUNS["sft"](folder, "moe"), 2, mesh=MeshConfig(fsdp=2, expert=4))
    run = dataclasses.replace(run, start=StartConfig(path=str(tmp_path / "hf"), remat=False))
    with Run(config_file(tmp_path / "run.py", run), tmp_path / "two") as both:
        assert both.ended() == [0, 0], [both.said(0), both.said(1)]
    run_trainer(run, tmp_path / "one")
    same(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"))
    same_models(tmp_path / "one", tmp_path / "two", FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_nobody_waits_for_ever_for_those_who_do_not_come(process):
    code = f"""
from r1jax.parallel import hosts
hosts.start(hosts.Launch("localhost:{free_port()}", 2, {process}), timeout=2)"""
    how = dict(env=environment(1), capture_output=True, text=True, timeout=60)
    ended = subprocess.run([sys.executable, "-c", code], **how)
    assert ended.returncode == 1
    assert "in 2 s; start the same command for each of them" in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "who", "how"),
    [
        ("sft", 0, signal.SIGKILL),
        ("sft", 1, signal.SIGKILL),
        ("sft", 0, signal.SIGSTOP),
        ("sft", 1, signal.SIGSTOP),
        ("grpo", 1, signal.SIGKILL),
    ],
)
def test_who_is_left_ends_and_says_where(tmp_path, folder, name, who, how):  # noqa: F811
    """Within a minute, whichever of two dies or is stopped."""
    run = longer(RUNS[name](folder, "dense"), 1000, mesh=MeshConfig(fsdp=4))
    with Run(config_file(tmp_path / "run.py", run), tmp_path / "out", devices=2) as both:
        both.reach(2)
        both.processes[who].send_signal(how)
        begun, left = time.monotonic(), 1 - who
        assert both.processes[left].wait(60) == 1
        assert time.monotonic() - begun < 60
        fate = "is dead" if how == signal.SIGKILL else "gives no sign of life"
        where = f"process {who} {fate}; last heard of in stage {name}, step "
        assert where in both.said(left)
        assert f"process {left} was in stage {name}, step " in both.said(left)


HANGS = """
if me == {who}:
    import time
    from r1jax.data import corpus
    rows_at = corpus.rows_at
    def slow(packed, step, **how):
        time.sleep(1000 * (step == 3))
        return rows_at(packed, step, **how)
    corpus.rows_at = slow
"""


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_process_that_hangs_ends_all(tmp_path, folder, who):  # noqa: F811
    """Its watchdog's thread lives: it is the work that does not go on."""
    run = longer(RUNS["sft"](folder, "dense"), 1000, mesh=MeshConfig(fsdp=4))
    config = config_file(tmp_path / "run.py", run)
    how = dict(devices=2, flags=["--patience=4"], before=HANGS.format(who=who))
    with Run(config, tmp_path / "out", **how) as both:
        both.reach(3)
        begun = time.monotonic()
        assert both.ended(60) == [1, 1]
        assert time.monotonic() - begun < 30
        for i in range(2):
            assert f"process {who} hangs in stage sft, step 3, working" in both.said(i)


@pytest.mark.slow
def test_wrong_input_is_one_line_on_all(tmp_path, folder):  # noqa: F811
    """Also where one process alone sees that it is wrong: nobody waits for it."""
    run = dataclasses.replace(RUNS["sft"](folder, "dense"), mesh=MeshConfig(fsdp=4))
    cases = (
        (dataclasses.replace(run, mesh=MeshConfig()), "", "takes 1 devices, 4 are there"),
        (run, "import sys; sys.argv.append(f'--seed={me}')", "the config, --out or --force of"),
        (run, "import os; os.chdir('/') if me else None", "the config, --out or --force of"),
        (run, UNREADABLE, "sft.jsonl cannot be read"),
        (run, OTHER_ROWS, "sft.jsonl of process 1 is another than process 0's"),
        (run, OTHER_MODEL, "/dense of process 1 is another than process 0's"),
        (tiny.recipe(), "", "is the whole recipe, which runs in one process"),
    )
    for i, (case, before, said) in enumerate(cases):
        config, out = config_file(tmp_path / f"{i}.py", case), tmp_path / f"out{i}"
        out = out if "chdir" not in before else type(out)("runs", "never")
        with Run(config, out, devices=2, before=before, errors=tmp_path / f"e{i}") as both:
            assert both.ended(100) == [2, 2], [both.said(0), both.said(1)]
            assert all(said in both.said(k) for k in range(2)), [both.said(0), both.said(1)]
        assert not (out / "metrics.jsonl").exists()


UNREADABLE = """
if me == 1:
    from r1jax.train import runs
    def refuses(path, skip):
        raise ValueError(f"{path} cannot be read")
    # As if it came from the library, which it does: wrong input, not a fault.
    refuses = type(refuses)(refuses.__code__.replace(co_filename=runs.__file__), globals())
    runs.conversations = refuses
"""

OTHER_ROWS = """
if me == 1:
    from r1jax.train import runs
    read = runs.conversations
    def turned(path, skip):
        rows = read(path, skip=skip)
        return runs.dataclasses.replace(rows, items=rows.items[::-1])
    runs.conversations = turned
"""

OTHER_MODEL = """
if me == 1:
    from r1jax.nn.param import filled, leaves
    from r1jax.train import start
    read = start.open_model
    def trained_on(path, **how):
        found = read(path, **how)
        values = {name: v.get_value() for name, v in leaves(found.module).items()}
        values["norm.weight"] += 1e-3
        return start.dataclasses.replace(found, module=filled(found.module, values))
    start.open_model = trained_on
"""
