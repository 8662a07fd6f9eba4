# SPDX-License-Identifier: Apache-2.0
"""Plans, compiled for the CPU's virtual devices, and for a TPU where its compiler is there."""

import dataclasses
import importlib.util
import io
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from r1jax.cli.plan_table import write_plan, write_search
from r1jax.config import FP8Config, GRPOConfig, MeshConfig, OptimConfig, PlanConfig, SamplingConfig
from r1jax.eval.plan_picture import draw
from r1jax.nn.build import build
from r1jax.nn.count import decode_flops, forward_flops, size, train_flops
from r1jax.nn.param import as_used, leaves
from r1jax.parallel import costs
from r1jax.parallel.hlo import parse
from r1jax.parallel.mesh import make_mesh
from r1jax.parallel.topology import Chip, Topology, devices
from r1jax.parallel.topology import parse as parse_name
from r1jax.train import plan_search
from r1jax.train.failure import StageFailed
from r1jax.train.plan import Plan, compiled, filled, mesh_for, plan, turns, used
from r1jax.train.plan_report import report, verdict
from tests.nn import tiny

CHIP = Chip(hbm=1e9, bf16=1e11, fp8=1e11, memory=1e10, link=1e9, network=1e9, dimensions=1)
EIGHT = Topology("eight", "cpu", CHIP, (8,))
MODEL = tiny.model_config(
    vocab_size=16,
    hidden_size=16,
    moe=dataclasses.replace(tiny.model_config().moe, n_routed_experts=8, n_group=2, topk_group=1),
)
CFG = PlanConfig(
    model=MODEL,
    mesh=MeshConfig(fsdp=4, expert=2),
    rows_per_device=1,
    length=16,
    grpo=GRPOConfig(prompts=4, group_size=2),
    sampling=SamplingConfig(prompt_length=8, max_new_tokens=8),
)


@pytest.fixture(scope="module")
def trained() -> Plan:
    return plan(CFG, EIGHT, "train", chips=jax.devices())


def test_memory_is_split_into_what_the_state_holds(trained):
    """Parameters twice over in Adam's moments; all that can be cut is cut over eight devices."""
    s = size(MODEL)
    whole = 4 * (s.parameters + s.mtp)
    parts = trained.arguments
    assert parts["optimizer"] == pytest.approx(2 * parts["parameters"], rel=0.02)
    assert whole / 8 <= parts["parameters"] < whole / 2, "what is small or odd lies on all"
    assert parts["batch"] == 5 * 4 * CFG.length, "one row a device, of five arrays"
    assert trained.argument_bytes == pytest.approx(sum(parts.values()), rel=0.05)
    assert trained.fits


def test_what_a_report_holds(trained):
    facts = report(trained, CFG)
    json.dumps(facts)
    assert facts["fits"] is True
    assert facts["devices"] == 8
    assert facts["tokens"] == 8 * CFG.length
    assert facts["model_flops"] == facts["tokens"] * train_flops(MODEL, CFG.length)
    both = facts["arguments_gb"] + facts["temporaries_gb"]
    assert facts["hbm_per_chip_gb"] == pytest.approx(both)
    assert sum(b for axes in facts["collectives_gb"].values() for b in axes.values()) == (
        pytest.approx(facts["collective_gb"])
    )
    moved = {axis for axes in facts["collectives_gb"].values() for axis in axes}
    assert {"fsdp+expert", "expert"} <= moved <= {"fsdp+expert", "expert", "fsdp", "none"}
    # Small experts on a CPU compute every expert for every token: 4 times the routed arithmetic.
    assert 1.0 < facts["counted_flops"] / facts["model_flops"] < 4.0
    seconds = facts["seconds"]
    assert seconds["compute"] == pytest.approx(facts["counted_flops"] / 8 / CHIP.bf16)
    assert seconds["overlapped"] == max(list(seconds.values())[:4])
    assert facts["mfu"]["serial"] <= facts["mfu"]["scheduled"] <= facts["mfu"]["overlapped"] <= 1.0
    assert facts["mfu"]["serial"] < facts["mfu"]["overlapped"]
    for kind, spent in facts["collectives_seconds"].items():
        assert spent["waited"] == pytest.approx(spent["sent"]), f"{kind}: a CPU's wait at once"
    assert any("buffer" in line for line in facts["assumptions"])


def test_tables_and_pictures(trained, tmp_path):
    facts = report(trained, CFG)
    short = report(trained._replace(costs=None, times=None, stacked=None, schedule=None), CFG)
    for one in (facts, short):
        out = io.StringIO()
        write_plan(one, out)
        text = out.getvalue()
        assert "mesh fsdp 4 × expert 2" in text
        assert ("MFU" in text) == (one is facts)
        assert all(len(line) <= 120 for line in text.splitlines())
        draw(one, tmp_path / "plan.svg")
        picture = (tmp_path / "plan.svg").read_text()
        assert "optimizer" in picture
        assert ("arithmetic" in picture) == (one is facts)


def test_what_does_not_fit_is_said_in_one_line(trained):
    small = trained._replace(topology=EIGHT._replace(chip=CHIP._replace(hbm=trained.used - 1e3)))
    line = verdict(small, CFG)
    assert not small.fits
    assert "does not fit" in line
    assert "\n" not in line
    cases = {
        "micro_batches=2": dict(rows_per_device=2),
        "rows_per_device": dict(rows_per_device=1),
    }
    for word, change in cases.items():
        assert word in verdict(small, dataclasses.replace(CFG, **change))
    tight = trained._replace(topology=EIGHT._replace(chip=CHIP._replace(hbm=1e3)))
    assert "arguments alone" in verdict(tight, CFG)
    assert "mesh.fsdp" in verdict(tight, CFG)
    assert "sampling.layout=training" in verdict(tight._replace(what="decode"), CFG)


class Short:
    """A lowered program that the compiler finds too large, in one of its wordings."""

    def __init__(self, said):
        self.said = said

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.said)


@pytest.mark.parametrize(
    "said",
    [
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (108.00G) exceeds available HBM (95.73G). HLO module: jit_f.",
        "Ran out of memory in memory space hbm. Used 108.00G of 95.74G hbm. Exceeded hbm capacity",
    ],
)
def test_what_the_compiler_says_of_a_program_too_large(said):
    assert compiled(Short(said)) == (None, 108 * 2**30)
    with pytest.raises(StageFailed, match="INTERNAL: RET_CHECK"):
        compiled(Short("INTERNAL: RET_CHECK failure"))


@pytest.mark.slow
def test_decoding_holds_caches_and_no_moments():
    found = plan(CFG, EIGHT, "decode", chips=jax.devices())
    assert set(found.arguments) == {"parameters", "cache"}
    slots = (CFG.grpo.prompts + 8) * 8  # of prompts, and of rows
    assert found.arguments["cache"] >= 4 * slots * size(MODEL).cache_values / 8
    assert found.tokens == 8
    assert found.model_flops == 8 * decode_flops(MODEL, 16)
    assert found.fits


@pytest.mark.slow
def test_decoding_where_the_sampler_holds_its_weights():
    """Laid out for decoding all but experts are whole, and in what layers compute with; nothing is
    gathered that the training layout gathers."""
    wide = dataclasses.replace(MODEL, dtype="bfloat16", hidden_size=64)
    cfg = dataclasses.replace(CFG, model=wide, mesh=MeshConfig(expert=4, context=2))
    sampling = dataclasses.replace(CFG.sampling, layout="training")
    trained = dataclasses.replace(cfg, sampling=sampling)
    held, cut = (plan(c, EIGHT, "decode", chips=jax.devices()) for c in (cfg, trained))
    found = leaves(as_used(build(wide))).values()
    dealt = lambda v: 4 if "expert" in v.out_sharding else 1  # noqa: E731
    assert held.arguments["parameters"] == sum(v[...].nbytes // dealt(v) for v in found)
    assert cut.arguments["parameters"] < held.arguments["parameters"] / 2

    def gathered(found):
        return sum(c.sent for c in found.costs.collectives if "attention" in c.op_name)

    assert gathered(held) == 0 < gathered(cut)


@pytest.mark.slow
def test_decoding_with_redundant_experts():
    """A device of four holds three of twelve slots in place of two of eight experts."""
    cfg = dataclasses.replace(CFG, mesh=MeshConfig(expert=4, fsdp=2))
    more = dataclasses.replace(cfg, sampling=dataclasses.replace(CFG.sampling, redundant_experts=4))
    one, two = (plan(c, EIGHT, "decode", chips=jax.devices()) for c in (cfg, more))
    experts = [v for v in leaves(build(MODEL)).values() if "expert" in v.out_sharding]
    stacked = sum(v[...].nbytes for v in experts if "layers" in v.out_sharding)
    e, layers = MODEL.moe.n_routed_experts, MODEL.num_layers - MODEL.first_k_dense
    places = 4 * layers * 2 * (e + 4)  # an expert and a share for each slot
    grown = two.arguments["parameters"] - one.arguments["parameters"]
    assert grown == stacked // e + places
    odd = dataclasses.replace(more, sampling=dataclasses.replace(CFG.sampling, redundant_experts=3))
    with pytest.raises(ValueError, match="mesh.expert=4 must divide; set it to 4"):
        mesh_for(odd, EIGHT, "decode")


def test_the_turns_of_the_loop_over_pieces():
    """Each piece is sent once: one exchange stands outside the loop, and one in it is empty."""
    scopes = {
        False: "jit(step)/routed_experts/dispatch_rounds/dispatch/ragged_all_to_all",
        True: "jit(step)/routed_experts/dispatch_rounds/while/body/dispatch/ragged_all_to_all",
    }
    for pieces in (1, 8):
        assert turns(pieces)(scopes[True], None) == pieces
        inside, outside = (used(pieces)(scopes[i]) for i in (True, False))
        assert pieces * inside + outside == pieces
    assert turns(8)("jit(step)/attention/while", 16) == 8.5
    assert used(8)("jit(step)/attention/while/body/all_to_all") == 1.0


def test_the_share_of_a_dispatch_buffer_that_is_filled():
    """One row a device sends 8 pairs; the least buffer is made for 256."""
    whole = PlanConfig()
    mesh = MeshConfig(data=2, expert=256)
    assert filled(whole, mesh, "decode") == 8 / 256
    assert filled(whole, MeshConfig(fsdp=8, expert=64), "train") == 1 / 1.25
    assert filled(whole, MeshConfig(fsdp=512), "train") == 1.0
    half = dataclasses.replace(whole, grpo=dataclasses.replace(whole.grpo, prompts=16))
    assert filled(half, mesh, "decode") == 4 / 256, "every other device has no row"


@pytest.mark.slow
def test_grpo_holds_a_reference():
    found = plan(CFG, EIGHT, "grpo", chips=jax.devices())
    assert found.arguments["reference"] == pytest.approx(found.arguments["parameters"], rel=0.02)
    assert 1.0 < found.costs.total_flops * 8 / found.model_flops < 6.0


def test_a_dense_decoder_costs_what_count_says():
    """Products of a compiled forward pass and gradient against `nn.count`, to the operation."""
    cfg = tiny.dense_config(qwen2=False)
    model, length = tiny.model(cfg), 16
    ids = jnp.ones((2, length), jnp.int32)

    def loss(model):
        return (model(ids, ids, ids).hidden_BTD @ model.head_DN()).sum()

    s = size(cfg)
    norms = 2 * cfg.hidden_size * (2 * cfg.num_layers + 1)  # counted as matmul weights there
    forward = 2 * length * (s.flops - norms + s.attention_flops * length)

    def counted(fn):
        text = jax.jit(fn).lower(model).compile().as_text()
        return costs.measure(parse(text), costs.Rules(1, costs.half)).total_flops

    assert counted(loss) == forward
    assert counted(jax.grad(loss, allow_int=True)) == pytest.approx(3 * forward, rel=0.12)
    assert forward_flops(cfg, length) == s.flops + s.attention_flops * (length + 1) / 2


def test_meshes_are_chosen_checked_and_named():
    pod = EIGHT._replace(name="v5p-16")
    chosen = mesh_for(dataclasses.replace(CFG, mesh=MeshConfig()), pod, "train")
    assert chosen.devices == 8
    assert mesh_for(CFG, pod, "train") == CFG.mesh
    for mesh, said in (
        (MeshConfig(fsdp=4), "mesh fsdp 4 = 4 devices, but v5p-16 has 8; set mesh.fsdp=8"),
        (MeshConfig(expert=3), "does not divide 8"),
        (MeshConfig(tensor=8), "model.intermediate_size=12 must be divisible"),
    ):
        with pytest.raises(ValueError, match="mesh") as error:
            mesh_for(dataclasses.replace(CFG, mesh=mesh), pod, "train")
        assert said in str(error.value)


def test_slices_hold_copies_where_half_of_the_memory_is_left_to_a_step():
    """671B and its MTP module: 12 bytes a value are 32 GB on each of 256 chips."""
    one = MeshConfig()
    whole = PlanConfig(optim=OptimConfig(moment_dtype="bfloat16"), mesh=one, rows_per_device=1)
    copies, pieces = MeshConfig(slices=2, fsdp=4, expert=64), MeshConfig(fsdp=8, expert=64)
    assert mesh_for(whole, parse_name("2xv6e-256"), "train") == pieces
    assert mesh_for(whole, parse_name("2xv5p-512"), "train") == copies
    assert mesh_for(whole, parse_name("2xv5p-256"), "train").fsdp == 4, "64 GB on each of 128"
    settings = list(plan_search.candidates(whole, parse_name("2xv6e-256"), "train"))
    assert {1, 2} == {c.mesh.slices for c in settings}


def test_a_search_keeps_what_it_finds_and_goes_on(tmp_path, monkeypatch, trained):
    compiled = []

    def fake(cfg, topology, what):
        compiled.append(cfg)
        if len(compiled) == 3:
            raise RuntimeError("killed")
        if len(compiled) == 5:
            raise StageFailed("the compiler cannot do this step: a bug of its own")
        return trained._replace(mesh=cfg.mesh, temporary_bytes=1e6 * len(compiled))

    monkeypatch.setattr(plan_search, "plan", fake)
    out, said = tmp_path / "runs" / "found.jsonl", []
    how = dict(out=out, tries=4, say=said.append)
    with pytest.raises(RuntimeError, match="killed"):
        plan_search.search(CFG, EIGHT, "train", **how)
    assert len(out.read_text().splitlines()) == 2
    with out.open("a") as lines:
        lines.write('{"cut off')
    found = plan_search.search(CFG, EIGHT, "train", **how)
    assert len(found) == 4
    assert len(compiled) == 3 + 2, "the two that were known are not compiled again"
    assert found[0]["mesh"] == CFG.mesh.sizes() or len({json.dumps(f["mesh"]) for f in found}) > 1
    speeds = [f["tokens_per_second"]["scheduled"] for f in found if f["fits"]]
    assert speeds == sorted(speeds, reverse=True)
    assert len(speeds) == 3
    assert "bug of its own" in found[-1]["failed"], "it goes on, and the failure is kept"
    shown = io.StringIO()
    write_search(found, shown)
    assert "fails" in shown.getvalue()
    assert sum("known" in line for line in said) == 2


def test_candidates_start_with_the_config_and_all_go_with_the_pod():
    found = list(plan_search.candidates(CFG, EIGHT, "train"))
    assert found[0].mesh == CFG.mesh
    assert len(set(found)) == len(found) > 5
    assert all(c.mesh.devices == 8 for c in found)


libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler (libtpu) is not installed"
)


@libtpu
@pytest.mark.slow
def test_the_need_of_a_program_too_large_holds_its_arguments():
    """20 GiB that 48 of temporaries are made of fit a v5p; 40 more beside them do not."""
    mesh = make_mesh(MeshConfig(fsdp=4), devices(parse_name("v5p-8")))
    on_all = NamedSharding(mesh, PartitionSpec())

    def array(gib):
        return jax.ShapeDtypeStruct((gib, 1 << 15, 1 << 13), jnp.float32, sharding=on_all)

    def fn(x, more):
        y = jnp.sin(x)
        return (jnp.sort(y, axis=0) * y).sum() + more.sum()

    program, _ = compiled(jax.jit(fn).lower(array(20), array(1)))
    temporary = program.memory_analysis().temp_size_in_bytes
    _, needs = compiled(jax.jit(fn).lower(array(20), array(40)))
    assert needs == pytest.approx(temporary + 60 * 2**30, rel=0.02)


@libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("pod", "mesh"),
    [
        ("v5e-4", MeshConfig(fsdp=2, expert=2)),
        ("tpu7x-8", MeshConfig(fsdp=4, expert=2)),  # cores of their own run its collectives
        ("2xv5e-4", MeshConfig(fsdp=4, expert=2)),  # half of each group is on the other slice
    ],
)
def test_a_step_is_compiled_for_a_tpu_that_is_not_there(pod, mesh):
    wide = dataclasses.replace(MODEL, num_layers=2, dtype="bfloat16", remat=True)
    cfg = dataclasses.replace(CFG, model=wide, mesh=mesh)
    found = plan(cfg, parse_name(pod), "train")
    assert found.fits
    assert found.arguments["optimizer"] > found.arguments["parameters"]
    facts = report(found, cfg)
    assert "ragged-all-to-all" in facts["collectives_gb"]
    assert facts["collectives_gb"]["all-gather"]["fsdp"] > 0
    assert 1.0 < facts["counted_flops"] / facts["model_flops"] < 3.0
    assert (facts["seconds"]["network"] > 0) == pod.startswith("2x")


@libtpu
@pytest.mark.slow
def test_a_token_in_fp8_reads_its_weights_once():
    """A byte a value, by the recipe's kernels; XLA would make float32 of all of them first."""
    mla = dict(num_heads=8, q_lora_rank=512, kv_lora_rank=512)
    mla |= dict(qk_nope_head_dim=128, qk_rope_head_dim=128, v_head_dim=128)
    moe = dataclasses.replace(MODEL.moe, moe_intermediate_size=512)
    wide = dict(hidden_size=1024, intermediate_size=4096, num_layers=2, mtp_depth=0, moe=moe)
    wide |= dict(dtype="bfloat16", mla=dataclasses.replace(MODEL.mla, **mla))
    wide |= dict(fp8=FP8Config(enabled=True, block=128))
    model = dataclasses.replace(MODEL, **wide)
    cfg = dataclasses.replace(CFG, model=model, mesh=MeshConfig(expert=4, fsdp=2))
    found = plan(cfg, parse_name("tpu7x-8"), "decode")
    held = found.arguments["parameters"]
    dealt = lambda v: 4 if "expert" in v.out_sharding else 1  # noqa: E731
    assert held < 1.1 * sum(v[...].size / dealt(v) for v in leaves(build(model)).values())
    assert found.costs.traffic < 1.2 * held
