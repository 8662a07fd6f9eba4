# SPDX-License-Identifier: Apache-2.0
"""Counts of collectives that other cores and hosts run."""

import pytest

from r1jax.parallel import costs
from r1jax.parallel.groups import along
from r1jax.parallel.hlo import parse

# Collectives that are not where the CPU's are: two rows that come back in a buffer of eight, one
# inside a library call of another core, as on tpu7x, and three that hosts send to other slices.
ELSEWHERE = """\
%library.1 (p.1: bf16[64,128]) -> bf16[256,128] {
  %p.1 = bf16[64,128]{1,0} parameter(0)
  ROOT %g.1 = bf16[256,128]{1,0} all-gather(%p.1), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}, execution_thread="sparsecore"

%other.1 (p.2: bf16[64,128]) -> bf16[256,128] {
  %p.2 = bf16[64,128]{1,0} parameter(0)
  ROOT %c.1 = bf16[256,128]{1,0} custom-call(%p.2), custom_call_target="TODO", called_computations={%library.1}
}, execution_thread="sparsecore"

%larger.1 (p.3: f32[], p.4: f32[]) -> pred[] {
  %p.3 = f32[] parameter(0)
  %p.4 = f32[] parameter(1)
  ROOT %l.1 = pred[] compare(%p.3, %p.4), direction=GT
}

ENTRY %main.1 (a.1: bf16[8,128], a.2: bf16[64,128]) -> bf16[2,128] {
  %a.1 = bf16[8,128]{1,0} parameter(0)
  %a.2 = bf16[64,128]{1,0} parameter(1)
  %to.1 = bf16[2,128]{1,0} broadcast(), dimensions={}
  %i.1 = s32[4]{0} iota(), iota_dimension=0
  %s.1 = ((bf16[64,128]{1,0}), bf16[256,128]{1,0}, u32[]) async-start(%a.2), async_execution_thread="sparsecore", calls=%other.1
  %s.2 = bf16[256,128]{1,0} async-done(%s.1)
  %k.1 = bf16[8,128]{1,0} custom-call(%a.1), custom_call_target="TopK", called_computations={%larger.1}
  %t.1 = token[] after-all()
  %h.1 = (bf16[64,128]{1,0}, u32[], token[]) send(%a.2, %t.1), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"}
  %h.2 = (bf16[64,128]{1,0}, u32[], token[]) send(%a.2, %t.1), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="REDUCE_SCATTER"}
  %h.3 = (bf16[64,128]{1,0}, u32[], token[]) send(%a.2, %t.1), channel_id=3, is_host_transfer=true
  ROOT %r.1 = bf16[2,128]{1,0} ragged-all-to-all(%a.1, %to.1, %i.1, %i.1, %i.1, %i.1), replica_groups={{0,1,2,3},{4,5,6,7}}
}
"""  # noqa: E501

APART = ((0, 4), (1, 5), (2, 6), (3, 7))
RULES = costs.Rules(8, costs.half, apart=APART)


# The same in the words that a finished program is written in.
FINISHED = ELSEWHERE.replace(
    'async-start(%a.2), async_execution_thread="sparsecore", calls=%other.1\n',
    'custom-call-start(), async_execution_thread="sparsecore", custom_call_target="TODO", '
    "called_computations={%library.1}\n  %s.3 = ((bf16[64,128]{1,0}), bf16[256,128]{1,0}, u32[]) "
    "custom-call-update(%s.1)\n",
)


@pytest.mark.parametrize("text", [ELSEWHERE, FINISHED], ids=["dumped", "finished"])
def test_collectives_that_other_cores_and_hosts_run(text):
    found = costs.measure(parse(text), RULES)
    sizes, row = dict(slices=2, fsdp=4), 128 * 2
    moved = {(c.kind, along(c.groups, sizes)): c.sent for c in found.collectives}
    assert moved == {
        ("all-gather", ("fsdp",)): 64 * row * 3,
        ("all-gather", ("slices",)): 64 * row,
        ("reduce-scatter", ("slices",)): 64 * row / 2,
        ("ragged-all-to-all", ("fsdp",)): 2 * row * 3 / 4,
    }
    assert len(found.collectives) == 4
    gathered, sent, drawn = (64 + 256) * row, 3 * 64 * row, (8 + 8) * row
    given = 2 * row + 4 * 4  # the buffer and the places of the rows that come back
    assert found.traffic == gathered + sent + drawn + given + (8 + 2 + 2) * row + 4 * 4 * 4
