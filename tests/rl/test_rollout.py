# SPDX-License-Identifier: Apache-2.0
"""The rollout: what it draws, when it stops, and that the trainer finds the same log-probs."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.infer.decode import light, prefill
from r1jax.nn.dense import DenseTransformer
from r1jax.nn.param import leaves
from r1jax.rl.rollout import rollout, rows_of
from r1jax.train.grpo import completion_logp
from tests.nn import reference, tiny

# The sampler attends in the latent space over a cache, the trainer over expanded keys: two float32
# programs of two layers, and a log-softmax of logits up to 10, divided by temperatures from 0.3.
FLOAT32 = 5e-4
# bfloat16 keeps 8 bits at each of a dozen roundings; measured 0.02 on this model.
BFLOAT16 = 0.15
# The same float32 program, other neighbours.
SAME = 2e-5

PROMPTS, GROUP, NEW, EOS, PAD = 2, 6, 8, 1, 0
TEMPERATURES = [0.0, 0.3, 0.7, 1.0, 1.0, 1.7]
# One stack of layers: two stacks are the decoding tests' matter.
DEEPSEEK = tiny.model_config(mtp_depth=0, num_layers=2, first_k_dense=0)
QWEN2 = tiny.dense_config(qwen2=True)


def prompts(seed=0):
    """Two left-padded prompts of 4 and 2 tokens."""
    return tiny.tokens(seed, PROMPTS, 4), np.array([[1, 1, 1, 1], [0, 0, 1, 1]], bool)


@functools.cache
def compiled(cfg, **changes):
    """The rollout of one kind of model, jitted and allowed one trace in all tests together."""
    settings = dict(max_new_tokens=NEW, eos_ids=(EOS,), pad_id=PAD) | changes

    def run(model, prompt_PS, valid_PS, key, temperature_B):
        return rollout(model, prompt_PS, valid_PS, key, temperature_B, **settings)

    run.__name__ = f"rollout_{cfg}_{changes}"  # traces are counted by name
    return jax.jit(chex.assert_max_traces(run, n=1))


def draw(cfg=DEEPSEEK, seed=0, *, prompt=None, temperatures=TEMPERATURES, **changes):
    model = tiny.model(cfg)
    temperature_B = np.tile(np.float32(temperatures), PROMPTS)
    key = jax.random.key(seed)
    return compiled(cfg, **changes)(model, *(prompt or prompts()), key, temperature_B)


score = jax.jit(completion_logp)


def trainer_logp(cfg, r, temperatures=TEMPERATURES):
    """[B, T] as the GRPO step computes them, each row at its own temperature."""
    tokens, positions, segments = rows_of(r)
    rows = dict(tokens=tokens, positions=positions, segments=segments, completion=r.tokens_BT)
    model, out = tiny.model(cfg), np.zeros(r.tokens_BT.shape)
    for g, temperature in enumerate(temperatures):
        logp = score(model, rows, np.float32(temperature))[0]
        out[g :: len(temperatures)] = logp[g :: len(temperatures)]
    return out


# ------------------------------------------------------------------------ sampler against trainer


@pytest.mark.parametrize(
    ("cfg", "top_p"), [(DEEPSEEK, None), (QWEN2, 0.7)], ids=["deepseek", "qwen2"]
)
def test_sampler_and_trainer_agree(cfg, top_p):
    """The ratio is 1 before any update: at every temperature, greedy too, truncated or not."""
    r = draw(cfg, **({"top_p": top_p} if top_p else {}))
    mask = np.asarray(r.mask_BT) > 0
    np.testing.assert_allclose(
        np.asarray(r.logp_BT)[mask], trainer_logp(cfg, r)[mask], atol=FLOAT32, rtol=FLOAT32
    )
    assert not np.asarray(r.logp_BT)[~mask].any()
    assert not np.asarray(r.behaviour_logp_BT)[~mask].any()
    assert mask.sum() > PROMPTS * GROUP  # some rows are longer than one token
    if top_p is None:
        drawn = mask & (np.tile(TEMPERATURES, PROMPTS) > 0)[:, None]
        np.testing.assert_array_equal(r.logp_BT[drawn], r.behaviour_logp_BT[drawn])
    else:
        assert (r.behaviour_logp_BT >= r.logp_BT - SAME).all()
        assert (r.behaviour_logp_BT > r.logp_BT + 0.05).any()


def test_sampler_and_trainer_agree_in_bfloat16():
    cfg = tiny.dense_config(qwen2=True, dtype="bfloat16")
    r = draw(cfg)
    mask = np.asarray(r.mask_BT) > 0
    assert r.logp_BT.dtype == jnp.float32
    error = np.abs(np.asarray(r.logp_BT) - trainer_logp(cfg, r))[mask]
    scale = np.maximum(np.tile(np.where(TEMPERATURES, TEMPERATURES, 1.0), PROMPTS), 0.0)[:, None]
    assert (error * np.broadcast_to(scale, mask.shape)[mask]).max() < BFLOAT16


@pytest.mark.parametrize("cfg", [DEEPSEEK, QWEN2], ids=["deepseek", "qwen2"])
def test_weights_are_rounded_once_a_rollout(cfg):
    """Matrices but the router's, and nothing of the result changes."""
    exact = tiny.model(dataclasses.replace(cfg, dtype="bfloat16"))
    rounded = light(exact)
    small = set()
    for path, variable in leaves(rounded).items():
        kept = variable.ndim - ("layers" in path) < 2 or "router" in path or "b_" in path
        assert variable.dtype == (jnp.float32 if kept else jnp.bfloat16), path
        small |= {variable.shape} if kept else set()
    prompt, valid = prompts()
    wanted, got = (jax.jit(prefill)(m, prompt, valid) for m in (exact, rounded))
    chex.assert_trees_all_equal(got, wanted)
    key, temperature_B = jax.random.key(0), jnp.ones(PROMPTS * GROUP)
    rules = dict(max_new_tokens=NEW, eos_ids=(EOS,), pad_id=PAD)
    program = jax.make_jaxpr(lambda m: rollout(m, prompt, valid, key, temperature_B, **rules))
    (loop,) = (e for e in program(exact).eqns if e.primitive.name == "while")
    wide = {v.aval.shape for v in loop.invars if v.aval.dtype == jnp.float32 and v.aval.ndim > 2}
    assert wide <= small


def test_greedy_rows_are_the_argmax_of_the_full_forward_pass():
    r, model = draw(), tiny.model(DEEPSEEK)
    prompt, valid = prompts()
    head = reference.array(model.head)
    for p in range(PROMPTS):
        row = p * GROUP  # the first of a group has temperature 0
        completion = np.asarray(r.tokens_BT)[row][np.asarray(r.mask_BT)[row] > 0]
        start = prompt[p][valid[p]]
        whole = np.concatenate([start, completion])
        best = (reference.hidden(model, whole) @ head).argmax(-1)
        assert completion.tolist() == best[len(start) - 1 : -1].tolist()


@pytest.mark.slow
def test_it_draws_whatever_the_default_dtypes_are():
    """Under 64 bits too; the greedy rows are the same, other noise is drawn for the rest."""
    wanted = draw()
    with jax.enable_x64(True):
        found = draw(eos_ids=(EOS, EOS))  # the same rule, a trace of its own
    greedy = slice(None, None, GROUP)
    np.testing.assert_array_equal(found.tokens_BT[greedy], wanted.tokens_BT[greedy])
    np.testing.assert_array_equal(found.mask_BT[greedy], wanted.mask_BT[greedy])
    assert found.tokens_BT.dtype == wanted.tokens_BT.dtype


def test_logits_are_never_whole_in_the_trainer():
    """The gradient of completion log-probs needs far less than [B, T, vocabulary] float32."""
    vocab, rows, length = 3000, 512, 32
    model = jax.eval_shape(
        lambda: DenseTransformer(tiny.dense_config(qwen2=False, vocab_size=vocab, remat=True))
    )
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = dict.fromkeys(("tokens", "positions", "segments"), ids)
    batch["completion"] = jax.ShapeDtypeStruct((rows, length - 4), jnp.int32)
    loss = jax.jit(jax.grad(lambda m, b: completion_logp(m, b, 1.0)[0].sum()))
    memory = loss.lower(model, batch).compile().memory_analysis()
    assert memory.temp_size_in_bytes < rows * (length - 4) * vocab * 4 / 3


# --------------------------------------------------------------------------------- ends and masks


def ends_by_hand(r, eos):
    """Lengths and ends as the tokens say."""
    tokens = np.asarray(r.tokens_BT)
    hit = tokens == eos
    ended = hit.any(1)
    return np.where(ended, hit.argmax(1) + 1, tokens.shape[1]), ended


def hot(**changes):
    """Rows that end at different lengths."""
    return draw(QWEN2, seed=3, temperatures=[1.0, 1.0, 1.5, 1.5, 2.5, 2.5], **changes)


def test_eos_is_inside_the_mask_and_nothing_after():
    r = hot()
    length, ended = ends_by_hand(r, EOS)
    assert 0 < ended.sum() < PROMPTS * GROUP  # some end, some are cut
    assert len(set(length.tolist())) > 2
    expected = np.arange(NEW) < length[:, None]
    np.testing.assert_array_equal(r.mask_BT, expected)
    np.testing.assert_array_equal(r.ended_B, ended)
    assert (np.asarray(r.tokens_BT)[~expected] == PAD).all()
    assert (np.asarray(r.tokens_BT)[expected] == PAD).any()  # a drawn pad id is a token like others


def test_pad_equal_to_eos_does_no_harm():
    a, b = hot(), hot(pad_id=EOS)
    for name in ("mask_BT", "logp_BT", "behaviour_logp_BT", "ended_B"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    mask = np.asarray(a.mask_BT) > 0
    np.testing.assert_array_equal(np.asarray(a.tokens_BT)[mask], np.asarray(b.tokens_BT)[mask])
    assert (np.asarray(b.tokens_BT)[~mask] == EOS).all()
    cut = trainer_logp(QWEN2, b, [1.0, 1.0, 1.5, 1.5, 2.5, 2.5])[mask]
    np.testing.assert_allclose(cut, np.asarray(b.logp_BT)[mask], atol=FLOAT32, rtol=FLOAT32)


def test_without_eos_every_row_runs_to_the_limit():
    r = hot(eos_ids=())
    assert r.mask_BT.all()
    assert not r.ended_B.any()
    assert (np.asarray(r.tokens_BT) == EOS).any()
    before = np.asarray(hot().mask_BT) > 0  # what does not follow an end is drawn the same
    np.testing.assert_array_equal(
        np.asarray(r.tokens_BT)[before], np.asarray(hot().tokens_BT)[before]
    )


class Counted(DenseTransformer):
    """Appends to `steps` each time tokens are embedded."""

    steps = []

    def embed_tokens(self, tokens_BT):
        jax.debug.callback(lambda: Counted.steps.append(tokens_BT.shape))
        return super().embed_tokens(tokens_BT)


def test_it_stops_when_all_rows_have_ended():
    cfg = tiny.dense_config(qwen2=False, num_layers=1)
    model = tiny.filled(lambda: Counted(cfg))
    run = jax.jit(functools.partial(rollout, max_new_tokens=500, eos_ids=(EOS,), pad_id=PAD))
    Counted.steps.clear()
    r = jax.block_until_ready(
        run(model, *prompts(), jax.random.key(0), np.full(2, 3.0, np.float32))
    )
    jax.effects_barrier()
    lengths = np.asarray(r.mask_BT).sum(1)
    assert r.ended_B.all()
    assert lengths.max() < 300
    assert len(Counted.steps) <= 1 + lengths.max()  # the prompts, then a step for each token


# --------------------------------------------------------------------------------- noise and rows


def test_the_key_decides():
    a, b, c = draw(seed=0), draw(seed=0), draw(seed=1)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
    assert not np.array_equal(a.tokens_BT, c.tokens_BT)
    greedy = np.tile(TEMPERATURES, PROMPTS) == 0
    np.testing.assert_array_equal(a.tokens_BT[greedy], c.tokens_BT[greedy])


def test_noise_is_fresh_at_every_step_and_in_every_row():
    """From a model that has no opinion, rows and columns differ."""
    model = jax.tree.map(jnp.zeros_like, tiny.model(QWEN2))
    run = compiled(QWEN2, eos_ids=())
    tokens = np.asarray(
        run(model, *prompts(), jax.random.key(0), np.ones(PROMPTS * GROUP, np.float32)).tokens_BT
    )
    assert len({tuple(row) for row in tokens}) == PROMPTS * GROUP
    assert len({tuple(column) for column in tokens.T}) == NEW


def test_a_row_does_not_depend_on_other_prompts_or_on_padding():
    prompt, valid = prompts()
    other = np.where(valid, prompt, 5)
    other[0] = (other[0] + 1) % tiny.VOCAB
    a, b = draw(), draw(prompt=(other, valid))
    np.testing.assert_array_equal(a.tokens_BT[GROUP:], b.tokens_BT[GROUP:])
    np.testing.assert_allclose(a.logp_BT[GROUP:], b.logp_BT[GROUP:], atol=SAME)
    assert not np.array_equal(a.tokens_BT[:GROUP], b.tokens_BT[:GROUP])


def test_more_padding_before_prompts_changes_nothing():
    prompt, valid = prompts()
    wide = np.pad(prompt, ((0, 0), (3, 0)), constant_values=7), np.pad(valid, ((0, 0), (3, 0)))
    # Another shape is another program: `top_k` gives it a trace of its own.
    a, b = draw(QWEN2, top_p=0.7), draw(QWEN2, prompt=wide, top_p=0.7, top_k=None)
    np.testing.assert_array_equal(a.tokens_BT, b.tokens_BT)
    np.testing.assert_allclose(a.logp_BT, b.logp_BT, atol=SAME)
    np.testing.assert_allclose(a.behaviour_logp_BT, b.behaviour_logp_BT, atol=SAME)


def test_one_trace():
    """New keys, prompts, temperatures and parameters run the program that is there (`compiled`)."""
    run = compiled(QWEN2)
    for seed in range(3):
        temperature_B = np.full(PROMPTS * GROUP, seed / 2, np.float32)
        run(tiny.model(QWEN2, seed), *prompts(seed), jax.random.key(seed), temperature_B)


def test_rows_of():
    r = hot()
    tokens, positions, segments = (np.asarray(x) for x in rows_of(r))
    lengths = np.asarray(r.mask_BT).sum(1).astype(int)
    prompt, valid = prompts()
    for b in range(PROMPTS * GROUP):
        real = segments[b] > 0
        own = prompt[b // GROUP][valid[b // GROUP]].tolist()
        assert tokens[b][real].tolist() == own + r.tokens_BT[b, : lengths[b]].tolist()
        assert positions[b][real].tolist() == list(range(len(own) + lengths[b]))


def test_rows_must_be_whole_groups():
    with pytest.raises(ValueError, match="3 rows must be a multiple of the 2 prompts"):
        jax.eval_shape(
            functools.partial(rollout, max_new_tokens=2, eos_ids=(EOS,), pad_id=PAD),
            jax.eval_shape(lambda: DenseTransformer(QWEN2)),
            *prompts(),
            jax.random.key(0),
            np.ones(3, np.float32),
        )
