# SPDX-License-Identifier: Apache-2.0
"""The rollout: G samples of each prompt in one compiled program.

Prompts are prefilled once and their cache is shared by the group; decoding stops as soon as every
row has ended; the log-probabilities of what was drawn come back with it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from r1jax.infer.decode import Prompt, by_rows, empty_cache, light, prefill, step
from r1jax.infer.redundant import Copies, served
from r1jax.infer.sample import Sample, sample
from r1jax.nn.param import resident, specs
from r1jax.sharding import DECODING, automatic, constrain, kept, ruled, spec


class Rollout(NamedTuple):
    """Completions of P prompts, G rows each: row p·G + g is sample g of prompt p.

    Attributes:
        prompt_PS: [P, S] int32 left-padded prompts.
        prompt_valid_PS: [P, S] bool.
        tokens_BT: [B, T] int32 completions; pad after the end.
        mask_BT: [B, T] float32, 1 on completion tokens, the end-of-sequence token included.
        logp_BT: [B, T] float32 under the temperature-scaled policy, untruncated (a greedy row at
            temperature 1); 0 off the mask.
        behaviour_logp_BT: [B, T] float32 under the truncated distribution that was drawn from.
        ended_B: [B] bool, False where the length limit cut the completion.
    """

    prompt_PS: jax.Array
    prompt_valid_PS: jax.Array
    tokens_BT: jax.Array
    mask_BT: jax.Array
    logp_BT: jax.Array
    behaviour_logp_BT: jax.Array
    ended_B: jax.Array


def rollout(
    model,
    prompt_PS: jax.Array,
    prompt_valid_PS: jax.Array,
    key: jax.Array,
    temperature_B: jax.Array,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Rollout:
    """Samples B = len(temperature_B) completions, B / P of each prompt.

    The noise of token t is drawn from `fold_in(key, t)`: fresh at every step, the same for a key.

    Args:
        model: a decoder made of stacks.
        prompt_PS: [P, S] int32, left-padded.
        prompt_valid_PS: [P, S] bool.
        key: PRNG key.
        temperature_B: [B]; 0 is greedy. B % P == 0.
        max_new_tokens: T, the length limit.
        eos_ids: tokens that end a row; without any every row runs to the limit.
        pad_id: fills rows after their end. It may be one of `eos_ids`.
        top_k, top_p: truncation, see `infer.sample`.

    Raises:
        ValueError: B is no multiple of P.
    """
    rows, n_prompts = temperature_B.shape[0], prompt_PS.shape[0]
    if rows % n_prompts:
        raise ValueError(f"{rows} rows must be a multiple of the {n_prompts} prompts (group_size)")
    rules = dict(max_new_tokens=max_new_tokens, eos_ids=eos_ids, pad_id=pad_id)
    run = functools.partial(_rollout, **rules, top_k=top_k, top_p=top_p)
    whole = automatic(run, lambda *_: layout())
    return whole(model, prompt_PS, prompt_valid_PS, key, temperature_B)


def laid_out_rollout(model, *args: Any, copies: Copies | None = None, **rules: Any) -> Rollout:
    """`rollout` with the weights laid out for decoding first, inside the same program.

    Where training cuts weights over devices, `rollout` gathers those of every layer at every token.
    Here they are gathered once, as layers use them, and kept until the last row has ended; experts,
    heads and the vocabulary stay where they are. By the FP8 recipe they are put in blocks first,
    gathered and kept so. Without a mesh it is `rollout`.

    Args and Returns: as `rollout`; and
        copies: of experts, for devices that share them (`infer.redundant`); None: none.
    """

    if jax.sharding.get_abstract_mesh().empty:
        return rollout(model, *args, **rules)
    load_LE, redundant = (None, 0) if copies is None else copies

    def run(model, load_LE, *args):
        model = resident(model)  # as it lies: parts are put in blocks, and blocks are gathered
        with ruled(DECODING):
            model = kept(model, specs(model))
            if redundant:
                model = served(model, load_LE, redundant=redundant)
            return rollout(model, *args, **rules)

    return automatic(run, lambda *_: layout())(model, load_LE, *args)


def layout() -> Rollout:
    """How a rollout lies under the mesh in force: rows are cut over it, prompts are whole."""
    row, rows = spec("batch"), spec("batch", None)
    return Rollout(spec(), spec(), rows, rows, rows, rows, row)


def settled(made: Rollout) -> Rollout:
    """A rollout, inside a program, laid out as `layout` says; rows that the mesh does not cut
    evenly are whole everywhere."""

    def whole(x):
        return constrain(x, *(None,) * x.ndim)

    def cut(x):
        return constrain(x, "batch", *(None,) * (x.ndim - 1))

    prompts = map(whole, (made.prompt_PS, made.prompt_valid_PS))
    return Rollout(*prompts, *map(cut, made[2:]))


def _rollout(
    model,
    prompt_PS,
    prompt_valid_PS,
    key,
    temperature_B,
    *,
    max_new_tokens,
    eos_ids,
    pad_id,
    top_k,
    top_p,
) -> Rollout:
    rows = temperature_B.shape[0]
    model = light(model)
    with jax.named_scope("prefill"):
        prompt = by_rows(model, prefill(model, prompt_PS, prompt_valid_PS), rows)
    draw = functools.partial(_draw, temperature_B=temperature_B, top_k=top_k, top_p=top_p)
    start = _start(model, prompt, rows, max_new_tokens, pad_id)
    head_DN = model.head_DN().astype(prompt.hidden_PD.dtype)

    def go_on(c):
        return (c["t"] < max_new_tokens) & ~c["done"].all()

    def body(c):
        drawn = draw(c["hidden"], head_DN, jax.random.fold_in(key, c["t"]))
        token_B = jnp.where(c["done"], pad_id, drawn.token_B)
        done = functools.reduce(lambda done, end: done | (token_B == end), eos_ids, c["done"])
        hidden, own = step(model, token_B, prompt, c["own"], c["t"])
        return _recorded(c, token_B, drawn) | dict(t=c["t"] + 1, hidden=hidden, own=own, done=done)

    with jax.named_scope("decode"):
        c = jax.lax.while_loop(go_on, body, start)
    by_row = (c[name] for name in ("tokens", "mask", "logp", "behaviour"))
    return settled(Rollout(prompt_PS, prompt_valid_PS, *by_row, c["done"]))


def _start(model, prompt: Prompt, rows: int, length: int, pad_id: int) -> dict[str, Any]:
    """What the decoding loop carries, before its first token; hidden predicts that token."""
    blank_BT = jnp.zeros((rows, length), jnp.float32)
    return dict(
        t=jnp.int32(0),
        hidden=jnp.repeat(prompt.hidden_PD, rows // prompt.hidden_PD.shape[0], axis=0),
        own=empty_cache(model, prompt, rows, length),
        done=jnp.zeros(rows, bool),
        tokens=jnp.full((rows, length), pad_id, jnp.int32),
        mask=blank_BT,
        logp=blank_BT,
        behaviour=blank_BT,
    )


def _draw(hidden_BD: jax.Array, head_DN: jax.Array, key: jax.Array, **rules: Any) -> Sample:
    """The next token of each row; logits in float32, as in `ops.loss.token_logp`."""
    logits_BN = jnp.einsum("bd,dn->bn", hidden_BD, head_DN, preferred_element_type=jnp.float32)
    return sample(logits_BN, key, **rules)


def _recorded(c: dict[str, Any], token_B: jax.Array, drawn: Sample) -> dict[str, Any]:
    """The carry with column t of its tables written; a row that was done before adds nothing."""
    live_B = (~c["done"]).astype(jnp.float32)
    columns = dict(
        tokens=token_B,
        mask=live_B,
        logp=drawn.logp_B * live_B,
        behaviour=drawn.behaviour_logp_B * live_B,
    )
    put = jax.lax.dynamic_update_slice_in_dim
    return c | {name: put(c[name], x[:, None], c["t"], axis=1) for name, x in columns.items()}


class Rows(NamedTuple):
    """Prompt and completion of each row side by side, as the trainer's forward pass wants them.

    Attributes:
        tokens_BL: [B, S + T] int32.
        positions_BL: [B, S + T] int32 from 0 at a prompt's first token on; also behind the end.
        segments_BL: [B, S + T] int32, 1 on real tokens, 0 on padding.
    """

    tokens_BL: jax.Array
    positions_BL: jax.Array
    segments_BL: jax.Array


def rows_of(r: Rollout) -> Rows:
    """The rollout as full rows; completion token t sits at S + t and is predicted at S + t − 1."""
    group = r.tokens_BT.shape[0] // r.prompt_PS.shape[0]
    repeat = lambda x: jnp.repeat(x, group, axis=0)  # noqa: E731
    tokens = jnp.concatenate([repeat(r.prompt_PS), r.tokens_BT], axis=1)
    valid = jnp.concatenate([repeat(r.prompt_valid_PS), r.mask_BT > 0], axis=1)
    s, length = r.prompt_PS.shape[1], tokens.shape[1]
    padding_P1 = s - jnp.sum(r.prompt_valid_PS, axis=1, keepdims=True, dtype=jnp.int32)
    place_PL = jnp.maximum(jnp.arange(length, dtype=jnp.int32) - padding_P1, 0)
    return Rows(tokens, repeat(place_PL), valid.astype(jnp.int32))
