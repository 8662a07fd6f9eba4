# SPDX-License-Identifier: Apache-2.0
"""Counts of compiled programs by hand: products, loops, recomputation, collectives."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from r1jax.parallel import costs
from r1jax.parallel.groups import along, groups
from r1jax.parallel.hlo import parse

T, D, L = 64, 32, 7


def measured(fn, *args, devices=1):
    text = jax.jit(fn).lower(*args).compile().as_text()
    return costs.measure(parse(text), costs.Rules(devices, costs.half))


def layers(x_TD, w_LDD, body):
    return jax.lax.scan(body, x_TD, w_LDD)[0].sum()


def layer(x_TD, w_DD):
    return jnp.tanh(x_TD @ w_DD), None


ONE = 2 * T * D * D  # a layer, forward


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda x, w: x @ w[0], ONE),
        (lambda x, w: layers(x, w, layer), L * ONE),
        (jax.grad(lambda x, w: layers(x, w, layer), (0, 1)), 3 * L * ONE),
        (
            jax.grad(lambda x, w: layers(x, w, jax.checkpoint(layer, prevent_cse=False)), (0, 1)),
            4 * L * ONE,
        ),
        (
            lambda x, w: jax.lax.fori_loop(0, 3, lambda _, c: c + layers(c, w, layer), x),
            3 * L * ONE,
        ),
    ],
    ids=["product", "scan", "gradient", "remat", "nested"],
)
def test_products_times_the_turns_of_their_loops(fn, expected):
    found = measured(fn, jnp.ones((T, D)), jnp.ones((L, D, D)))
    assert found.total_flops == expected
    assert found.loops == []
    assert found.collectives == []


def test_a_loop_whose_count_is_data_is_reported_and_guessed():
    def blocks(x_TD, w_LDD, n):
        body = lambda i, c: c @ jax.lax.dynamic_index_in_dim(w_LDD, i, keepdims=False)  # noqa: E731
        return jax.lax.fori_loop(0, n, body, x_TD)

    found = measured(blocks, jnp.ones((T, D)), jnp.ones((L, D, D)), jnp.int32(3))
    (loop,) = found.loops
    assert (loop.bound, loop.turns) == (L, (L + 1) / 2)
    assert found.total_flops == (L + 1) / 2 * ONE


def test_a_conditional_runs_the_branch_with_more_arithmetic():
    def either(x_TD, w_LDD, which):
        deep = lambda: jnp.tanh(x_TD @ w_LDD[0]) @ w_LDD[1]  # noqa: E731
        return jax.lax.cond(which, deep, lambda: x_TD @ w_LDD[2])

    found = measured(either, jnp.ones((T, D)), jnp.ones((L, D, D)), True)
    assert found.total_flops == 2 * ONE


def test_traffic_of_a_scan_reads_a_slice_a_turn():
    """L turns read L slices of the weights, not L times all of them."""
    x, w = jnp.ones((4, D)), jnp.ones((L, D, D))
    found = measured(lambda x, w: layers(x, w, layer), x, w).traffic
    least = w.nbytes + 2 * L * x.nbytes  # every weight once; each layer reads and writes its x
    assert least <= found < 4 * least, "XLA:CPU copies the slice and does tanh by itself"
    assert found < L * w.nbytes


def test_collectives_by_kind_axis_and_bytes():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    both = PartitionSpec(("a", "b"))

    def body(x):  # [32, 32] float32 a device: 4,096 bytes
        x = jax.lax.all_to_all(x, "b", 0, 0, tiled=True)
        x = jax.lax.ppermute(x, "a", [(0, 1), (1, 0)])
        x = jax.lax.psum_scatter(x, "b", tiled=True)
        return jax.lax.psum(jax.lax.all_gather(x, ("a", "b"), tiled=True), "a")

    fn = jax.shard_map(body, mesh=mesh, in_specs=both, out_specs=both, check_vma=False)
    x = jax.ShapeDtypeStruct((256, 32), jnp.float32, sharding=NamedSharding(mesh, both))
    found = measured(fn, x, devices=8).collectives
    sizes = dict(a=2, b=4)
    assert {(c.kind, along(c.groups, sizes), c.sent) for c in found} == {
        ("all-to-all", ("b",), 4096 * 3 / 4),
        ("collective-permute", ("a",), 4096.0),
        ("reduce-scatter", ("b",), 4096 * 3 / 4),
        ("all-gather", ("a", "b"), 1024 * 7.0),
        ("all-reduce", ("a",), 2 * 8192 * 1 / 2),
    }


def test_a_collective_in_a_loop_counts_every_turn():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    spread = PartitionSpec("a")

    def body(x):
        return jax.lax.fori_loop(0, 5, lambda _, c: jax.lax.ppermute(c, "a", [(0, 1), (1, 0)]), x)

    fn = jax.shard_map(body, mesh=mesh, in_specs=spread, out_specs=spread, check_vma=False)
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, spread))
    (one,) = measured(fn, x, devices=8).collectives
    assert (one.kind, one.times, one.sent) == ("collective-permute", 5, 5 * 16 * 4)


# As XLA:TPU writes it: products are convolutions, a loop's count stands in its condition and may
# have been hoisted, an overlapped collective is copied into the fusions that hide it.
TPU = """\
HloModule jit_step, is_scheduled=true

%inner.1 (p.1: bf16[8,256], p.2: bf16[4,256,128]) -> bf16[8,128] {
  %p.1 = bf16[8,256]{1,0:T(8,128)(2,1)} parameter(0)
  %p.2 = bf16[4,256,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %b.1 = bf16[4,8,256]{2,1,0} broadcast(%p.1), dimensions={1,2}
  %conv.1 = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} convolution(%b.1, %p.2), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf, metadata={op_name="ragged_dot"}
  ROOT %r.1 = bf16[8,128]{1,0} reduce(%conv.1, %zero.1), dimensions={0}, to_apply=%add.1
}

%start.1 (p.3: bf16[64,128]) -> (bf16[64,128], bf16[256,128]) {
  %p.3 = bf16[64,128]{1,0} parameter(0)
  %all-gather.1 = bf16[256,128]{1,0} all-gather(%p.3), channel_id=9, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, use_global_device_ids=true, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %custom-call.1 = (bf16[64,128]{1,0}, bf16[256,128]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%piece.1 (p.4: bf16[64,128]) -> bf16[256,128] {
  %p.4 = bf16[64,128]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[256,128]{1,0} all-gather(%p.4), channel_id=9, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, use_global_device_ids=true, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"15"}}
}

%all-reduce-scatter.1 (p.5: bf16[256,128]) -> bf16[64,128] {
  %p.5 = bf16[256,128]{1,0:S(1)} parameter(0)
  %all-reduce.1 = bf16[256,128]{1,0} all-reduce(%p.5), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add.1
  ROOT %ds.1 = bf16[64,128]{1,0:S(1)} dynamic-slice(%all-reduce.1, %at.1, %at.1), dynamic_slice_sizes={64,128}
}

%body.1 (t.1: (s32[], bf16[256,256], s32[])) -> (s32[], bf16[256,256], s32[]) {
  %t.1 = (s32[]{:T(128)}, bf16[256,256]{1,0}, s32[]{:T(128)}) parameter(0)
  %g.1 = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  %g.2 = bf16[256,256]{1,0} get-tuple-element(%t.1), index=1
  %g.3 = s32[]{:T(128)} get-tuple-element(%t.1), index=2
  %two.1 = s32[]{:T(128)} constant(2)
  %next.1 = s32[]{:T(128)} add(%g.1, %two.1)
  %conv.2 = bf16[256,256]{1,0} convolution(%g.2, %g.2), dim_labels=bf_io->bf
  %rs.1 = bf16[64,128]{1,0:S(1)} fusion(%g.2), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %o.1 = (s32[]{:T(128)}, bf16[256,256]{1,0}, /*index=2*/s32[]{:T(128)}) tuple(%next.1, %conv.2, %g.3)
}

%condition.1 (t.2: (s32[], bf16[256,256], s32[])) -> pred[] {
  %t.2 = (s32[]{:T(128)}, bf16[256,256]{1,0}, s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%t.2), index=0
  %n.1 = s32[]{:T(128)} get-tuple-element(%t.2), index=2
  ROOT %lt.1 = pred[] compare(%i.1, %n.1), direction=LT
}

%outer.1 (t.3: (s32[], bf16[256,256], s32[])) -> (s32[], bf16[256,256], s32[]) {
  %t.3 = (s32[]{:T(128)}, bf16[256,256]{1,0}, s32[]{:T(128)}) parameter(0)
  %k.1 = s32[]{:T(128)} get-tuple-element(%t.3), index=0
  %m.1 = bf16[256,256]{1,0} get-tuple-element(%t.3), index=1
  %hoisted.1 = s32[]{:T(128)} get-tuple-element(%t.3), index=2
  %zero.2 = s32[]{:T(128)} constant(0)
  %one.1 = s32[]{:T(128)} constant(1)
  %up.1 = s32[]{:T(128)} add(%k.1, %one.1)
  %in.1 = (s32[], bf16[256,256], s32[]) tuple(%zero.2, %m.1, %hoisted.1)
  %while.1 = (s32[], bf16[256,256], s32[]) while(%in.1), condition=%condition.1, body=%body.1
  %w.1 = bf16[256,256]{1,0} get-tuple-element(%while.1), index=1
  ROOT %o.2 = (s32[], bf16[256,256], s32[]) tuple(%up.1, %w.1, %hoisted.1)
}

%condition.2 (t.4: (s32[], bf16[256,256], s32[])) -> pred[] {
  %t.4 = (s32[]{:T(128)}, bf16[256,256]{1,0}, s32[]{:T(128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%t.4), index=0
  %three.1 = s32[]{:T(128)} constant(3)
  ROOT %lt.2 = pred[] compare(%i.2, %three.1), direction=LT
}

ENTRY %main.1 (a.1: bf16[256,256], a.2: bf16[64,128], a.3: bf16[8,256], a.4: bf16[4,256,128]) -> bf16[256,256] {
  %a.1 = bf16[256,256]{1,0} parameter(0)
  %a.2 = bf16[64,128]{1,0} parameter(1)
  %a.3 = bf16[8,256]{1,0} parameter(2)
  %a.4 = bf16[4,256,128]{2,1,0} parameter(3)
  %zero.3 = s32[]{:T(128)} constant(0)
  %ten.1 = s32[]{:T(128)} constant(10)
  %in.2 = (s32[], bf16[256,256], s32[]) tuple(%zero.3, %a.1, %ten.1)
  %f.1 = (bf16[64,128]{1,0}, bf16[256,128]{1,0}) fusion(%a.2), kind=kCustom, calls=%start.1
  %f.2 = bf16[256,128]{1,0} fusion(%a.2), kind=kCustom, calls=%piece.1
  %f.3 = bf16[8,128]{1,0} fusion(%a.3, %a.4), kind=kOutput, calls=%inner.1, backend_config={"convolution_algorithm_config":{"is_ragged_dot":true,"num_groups_in_ragged_dot":"4"}}
  %k.2 = bf16[8,128]{1,0} custom-call(%a.3), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUw","cost_estimate":{"flops":"4096","transcendentals":"0","bytes_accessed":"64"}}}
  %i.3 = s32[1]{0} constant({5})
  %ragged-dot-none.7 = bf16[8,128]{1,0} custom-call(%i.3, %a.3, %a.4), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUw","cost_estimate":{"flops":"8192"}}}
  %mine.3 = bf16[8,128]{1,0} custom-call(%a.3), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUw"}}
  %while.2 = (s32[], bf16[256,256], s32[]) while(%in.2), condition=%condition.2, body=%outer.1
  ROOT %out.1 = bf16[256,256]{1,0} get-tuple-element(%while.2), index=1
}
"""  # noqa: E501


@pytest.mark.parametrize("filled", [1.0, 0.5])
def test_the_text_of_a_tpu_program(filled):
    found = costs.measure(parse(TPU), costs.Rules(8, costs.half, filled=filled))
    turns = 3 * (10 / 2)  # the inner loop counts to a hoisted 10 by twos
    ragged = filled * (2 * 8 * 256 * 128 + 8192)  # each row meets one group's matrix
    assert found.flops == {"bf16": turns * 2 * 256**3 + ragged + 4096}
    assert found.opaque == {"mine": 1.0}
    assert found.loops == []
    sizes = dict(data=2, fsdp=4)
    assert {(c.kind, along(c.groups, sizes), c.sent, c.times) for c in found.collectives} == {
        ("all-gather", ("fsdp",), 64 * 128 * 2 * 3.0, 1.0),
        ("reduce-scatter", ("fsdp",), turns * 256 * 128 * 2 * 3 / 4, turns),
    }


HIDDEN = """\
%start.1 (p.1: bf16[64,128]) -> (bf16[64,128], bf16[256,128]) {
  %p.1 = bf16[64,128]{1,0} parameter(0)
  %g.1 = bf16[256,128]{1,0} all-gather(%p.1), backend_config={"async_collective_fusion_config":{}}
  ROOT %c.1 = (bf16[64,128]{1,0}, bf16[256,128]{1,0}) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%piece.1 (p.2: bf16[64,128], p.3: bf16[256,128], p.4: f32[8,8]) -> (f32[8,8], bf16[64,128], bf16[256,128], bf16[256,128]) {
  %p.2 = bf16[64,128]{1,0} parameter(0)
  %p.3 = bf16[256,128]{1,0} parameter(1)
  %p.4 = f32[8,8]{1,0} parameter(2)
  %g.2 = bf16[256,128]{1,0} all-gather(%p.2), backend_config={"async_collective_fusion_config":{}}
  %e.1 = f32[8,8]{1,0} exponential(%p.4)
  ROOT %t.1 = (f32[8,8]{1,0}, bf16[64,128]{1,0}, bf16[256,128]{1,0}, bf16[256,128]{1,0}) tuple(%e.1, %p.2, %p.3, %g.2)
}

%done.1 (p.5: bf16[64,128], p.6: bf16[256,128]) -> bf16[256,128] {
  %p.5 = bf16[64,128]{1,0} parameter(0)
  %p.6 = bf16[256,128]{1,0} parameter(1)
  %g.3 = bf16[256,128]{1,0} all-gather(%p.5), backend_config={"async_collective_fusion_config":{}}
  ROOT %c.2 = bf16[256,128]{1,0} custom-call(%p.5, %p.6, %g.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a.1: bf16[64,128], a.2: f32[8,8]) -> bf16[256,128] {
  %a.1 = bf16[64,128]{1,0} parameter(0)
  %a.2 = f32[8,8]{1,0} parameter(1)
  %f.1 = (bf16[64,128]{1,0}, bf16[256,128]{1,0}) fusion(%a.1), kind=kCustom, calls=%start.1
  %s.1 = bf16[64,128]{1,0} get-tuple-element(%f.1), index=0
  %s.2 = bf16[256,128]{1,0} get-tuple-element(%f.1), index=1
  %f.2 = (f32[8,8]{1,0}, bf16[64,128]{1,0}, bf16[256,128]{1,0}, bf16[256,128]{1,0}) fusion(%s.1, %s.2, %a.2), kind=kCustom, calls=%piece.1
  %s.3 = bf16[64,128]{1,0} get-tuple-element(%f.2), index=1
  %s.4 = bf16[256,128]{1,0} get-tuple-element(%f.2), index=2
  ROOT %f.3 = bf16[256,128]{1,0} fusion(%s.3, %s.4), kind=kCustom, calls=%done.1
}
"""  # noqa: E501


def test_an_overlapped_collective_is_traffic_once():
    """Read a quarter, write the whole; the fusion that hides it is traffic for its own work."""
    found = costs.measure(parse(HIDDEN), costs.Rules(4, costs.half))
    assert found.traffic == (64 + 256) * 128 * 2 + 2 * 8 * 8 * 4
    (one,) = found.collectives
    assert one.sent == 3 * 64 * 128 * 2


@pytest.mark.parametrize(
    ("window", "dims", "expected"),
    [
        ("size=3 pad=1_1", (10, 3, 10), 28),  # the two ends miss one each
        ("size=4 pad=3_3 rhs_reversal=1", (1, 4, 4), 4),  # a product whose kernel axis is an output
        ("size=4 stride=3 lhs_dilate=4", (4, 4, 4), 4),  # a batch of products
        ("size=2 stride=2", (8, 2, 4), 8),
        ("size=3 rhs_dilate=2", (9, 3, 5), 15),
    ],
)
def test_a_convolution_counts_positions_that_meet_an_element(window, dims, expected):
    size, kernel, out = dims
    text = f"""ENTRY %main (a: f32[2,5,{size}], b: f32[{kernel},5,7]) -> f32[2,7,{out}] {{
  %a = f32[2,5,{size}]{{2,1,0}} parameter(0)
  %b = f32[{kernel},5,7]{{2,1,0}} parameter(1)
  ROOT %c = f32[2,7,{out}]{{2,1,0}} convolution(%a, %b), window={{{window}}}, LABELS
}}""".replace("LABELS", "dim_labels=bf0_0io->bf0")
    found = costs.measure(parse(text), costs.Rules(1, costs.half))
    assert found.total_flops == 2 * 2 * 5 * 7 * expected


@pytest.mark.parametrize(
    ("text", "expected", "axes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ((0, 1, 2, 3), (4, 5, 6, 7)), ("y",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7)), ("x",)),
        ("replica_groups=[1,8]<=[8]", (tuple(range(8)),), ("x", "y")),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7)), ("y",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", (tuple(range(8)),), ("x", "y")),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7)), ("x",)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", ((0, 1, 2, 3), (4, 5, 6, 7)), ("y",)),
        ("source_target_pairs={{0,4},{4,0}}", ((0, 4), (4, 0)), ("x",)),
        ("replica_groups={}", (), ("x", "y")),
    ],
)
def test_groups_and_the_axes_they_lie_along(text, expected, axes):
    line = f"ENTRY %m (a: f32[8]) -> f32[8] {{\n  %r = f32[8]{{0}} all-reduce(%a), {text}\n}}"
    (one,) = parse(line).computations["m"].instructions.values()
    assert groups(one) == expected
    assert along(groups(one), dict(x=2, y=4)) == axes


def test_groups_outside_the_mesh_are_not_given_an_axis():
    assert along(((0, 8),), dict(x=2, y=4)) == ("unknown",)


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule nothing")


def test_attention_and_its_gradient():
    q_TD, k_SD = jnp.ones((T, D)), jnp.ones((2 * T, D))

    def attention(q, k):
        return jnp.einsum("ts,sd->td", jax.nn.softmax(jnp.einsum("td,sd->ts", q, k)), k).sum()

    product = 2 * T * 2 * T * D
    assert measured(attention, q_TD, k_SD).total_flops == 2 * product
    gradient = measured(jax.grad(attention, (0, 1)), q_TD, k_SD)
    assert gradient.total_flops == 5 * product, "the sum's gradient does not need the last product"


NESTED = """HloModule nested

%cut.1 (p.1: bf16[64,128], p.2: s32[]) -> bf16[8,128] {
  %p.1 = bf16[64,128]{1,0} parameter(0)
  %p.2 = s32[] parameter(1)
  %z.1 = s32[] constant(0)
  ROOT %d.1 = bf16[8,128]{1,0} dynamic-slice(%p.1, %p.2, %z.1), dynamic_slice_sizes={8,128}
}

%name.1 (p.3: bf16[128,32]) -> bf16[128,32] {
  %p.3 = bf16[128,32]{1,0} parameter(0)
  ROOT %b.1 = bf16[128,32]{1,0} bitcast(%p.3)
}

%outer.1 (p.4: bf16[64,128], p.5: s32[], p.6: bf16[128,32]) -> f32[8,32] {
  %p.4 = bf16[64,128]{1,0} parameter(0)
  %p.5 = s32[] parameter(1)
  %p.6 = bf16[128,32]{1,0} parameter(2)
  %f.1 = bf16[8,128]{1,0} fusion(%p.4, %p.5), kind=kLoop, calls=%cut.1
  %f.2 = bf16[128,32]{1,0} fusion(%p.6), kind=kLoop, calls=%name.1
  ROOT %c.1 = f32[8,32]{1,0} dot(%f.1, %f.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a.1: bf16[64,128], a.2: s32[], a.3: bf16[128,32]) -> f32[8,32] {
  %a.1 = bf16[64,128]{1,0} parameter(0)
  %a.2 = s32[]{:S(6)} parameter(1)
  %a.3 = bf16[128,32]{1,0} parameter(2)
  ROOT %f.3 = f32[8,32]{1,0} fusion(%a.1, %a.2, %a.3), kind=kOutput, calls=%outer.1
}
"""


RELAID = """
%same.1 (p.7: bf16[64,128]) -> bf16[64,128] {
  %p.7 = bf16[64,128]{1,0:T(16,128)} parameter(0)
  ROOT %y.1 = bf16[64,128]{1,0:T(8,128)} copy(%p.7)
}

%cut.1 """


@pytest.mark.parametrize("copied", [False, True])
def test_a_fusion_in_a_fusion_reads_what_it_cuts_and_what_it_only_renames(copied):
    """Also of an operand that is laid out anew on its way, as on tpu7x."""
    text = NESTED
    if copied:
        text = text.replace("\n%cut.1 ", RELAID).replace("slice(%p.1", "slice(%r.1")
        again = "  %r.1 = bf16[64,128]{1,0} fusion(%p.1), kind=kLoop, calls=%same.1\n"
        text = text.replace("  %z.1", again + "  %z.1")
    found = costs.measure(parse(text), costs.Rules(1, costs.half))
    assert found.traffic == 2 * 8 * 128 + 2 * 128 * 32 + 4 * 8 * 32
    assert found.total_flops == 2 * 8 * 128 * 32
