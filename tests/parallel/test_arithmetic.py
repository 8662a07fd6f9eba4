# SPDX-License-Identifier: Apache-2.0
"""Kernels that do not say what they cost, but are known."""

from r1jax.parallel import costs
from r1jax.parallel.hlo import parse

SPLASH = """\
ENTRY %main (a.1: s8[1,2,2], a.3: bf16[3,8,1024,192], a.5: bf16[3,8,1024,128], a.6: s32[1024,128], a.7: s32[8,1024], a.8: f32[8,8,1024]) -> bf16[3,8,1024,128] {
  %a.1 = s8[1,2,2]{2,1,0} parameter(0)
  %a.3 = bf16[3,8,1024,192]{3,2,1,0} parameter(1)
  %a.5 = bf16[3,8,1024,128]{3,2,1,0} parameter(2)
  %a.6 = s32[1024,128]{1,0} parameter(3)
  %a.7 = s32[8,1024]{1,0} parameter(4)
  %a.8 = f32[8,8,1024]{2,1,0} parameter(5)
  %splash_mha_fwd_segmented_residuals.1 = (bf16[3,8,1024,128]{3,2,1,0}, f32[8,1024,128]{2,1,0}) custom-call(%a.1, %a.1, %a.3, %a.3, %a.5, /*index=5*/%a.6, %a.7, %a.6), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"block_kv\\": 512}"
}}, backend_config={}
  %splash_mha_dq_segmented_no_residuals.1 = bf16[3,8,1024,192]{3,2,1,0} custom-call(%a.1, %a.1, %a.3, %a.3, %a.5, /*index=5*/%a.6, %a.7, %a.8, %a.5, %a.8, /*index=10*/%a.6), custom_call_target="tpu_custom_call", backend_config={}
  %splash_mha_dkv_segmented_no_residuals.1 = (bf16[3,8,1024,192]{3,2,1,0}, bf16[3,8,1024,128]{3,2,1,0}) custom-call(%a.1, %a.1, %a.3, %a.3, %a.5, /*index=5*/%a.7, %a.6, %a.8, %a.5, %a.8, /*index=10*/%a.7), custom_call_target="tpu_custom_call", backend_config={}
  ROOT %out.1 = bf16[3,8,1024,128]{3,2,1,0} get-tuple-element(%splash_mha_fwd_segmented_residuals.1), index=0
}
"""  # noqa: E501


def test_kernels_of_attention_cost_what_their_masks_let_them_do():
    """Three of four blocks of 512 meet the mask; 1, 2 and 2 products are as wide as a key's 192,
    1, 1 and 2 as a value's 128. A kernel's metadata may break its line."""
    found = costs.measure(parse(SPLASH), costs.Rules(1, costs.half))
    pairs = 2 * 3 * 8 * 1024 * 1024 * 3 / 4
    assert found.flops == {"bf16": pairs * (5 * 192 + 4 * 128)}
    assert found.opaque == {}
    q, v, one = 3 * 8 * 1024 * 192 * 2, 3 * 8 * 1024 * 128 * 2, 8 * 1024 * 4
    once = 2 * q + v + 4 + 4 + 1024 * 128 * 4 * 2 + one  # blocks' masks, operands, segments
    # Three visits to two blocks: what moves past the other side is read one and a half times.
    fwd = once + (q + v) / 2 + v + 128 * one
    dq = once + v + 16 * one + (q + v) / 2 + q
    dkv = once + v + 16 * one + one - 1024 * 128 * 4 + (q + v) / 2 + q + v
    assert found.traffic == fwd + dq + dkv


PIECE = """\
ENTRY %main (a.1: s8[1,1,2], a.2: bf16[8,512,192], a.3: bf16[8,1024,192], a.4: bf16[8,1024,128]) -> bf16[8,512,128] {
  %a.1 = s8[1,1,2]{2,1,0} parameter(0)
  %a.2 = bf16[8,512,192]{2,1,0} parameter(1)
  %a.3 = bf16[8,1024,192]{2,1,0} parameter(2)
  %a.4 = bf16[8,1024,128]{2,1,0} parameter(3)
  ROOT %splash_mha_fwd_segmented_residuals.1 = bf16[8,512,128]{2,1,0} custom-call(%a.1, %a.1, %a.2, %a.3, %a.4), custom_call_target="tpu_custom_call"
}
"""  # noqa: E501


def test_of_rows_that_are_cut_the_last_piece_counts():
    """The device that has it sees every key of its row."""
    found = costs.measure(parse(PIECE), costs.Rules(2, costs.half))
    assert found.flops == {"bf16": 2 * 8 * 512 * 1024 * (192 + 128)}
