# SPDX-License-Identifier: Apache-2.0
"""Multi-token prediction: equations 21-25 by hand, the token ahead, and where documents end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from r1jax.data.packing import pack
from r1jax.train.supervised import shifted, supervised_loss
from tests.nn import reference, tiny

# Three layers of float32 sums against float64, on hidden states of order 1.
FLOAT32 = 2e-4
CFG = tiny.model_config(num_layers=2)


@jax.jit
def second(model, hidden, batch):
    """(MTP hidden states, report of its router)."""
    return model.predict_second(hidden, batch["targets"], batch["positions"], batch["segments"])


@settings(max_examples=6, phases=[Phase.generate])  # each is a compilation: no shrinking
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 2),
    length=st.integers(2, 6),
    lora=st.sampled_from([None, 3]),
    groups=st.sampled_from([(1, 1, 3), (3, 2, 2), (2, 1, 1)]),
    shared=st.integers(0, 2),
)
def test_it_is_equations_21_to_23(seed, rows, length, lora, groups, shared):
    """h' = W [RMSNorm(h) ; RMSNorm(Emb(t_{i+1}))], a block, a norm: on random shapes."""
    n_group, topk_group, k = groups
    cfg = dataclasses.replace(
        CFG,
        first_k_dense=0,
        num_layers=1,
        mla=dataclasses.replace(CFG.mla, q_lora_rank=lora),
        moe=dataclasses.replace(
            CFG.moe,
            n_group=n_group,
            topk_group=topk_group,
            num_experts_per_tok=k,
            n_shared_experts=shared,
        ),
    )
    model = tiny.model(cfg, seed)
    tokens = tiny.tokens(seed, rows, length)
    _, positions, segments = tiny.whole_rows(tokens)
    hidden = np.random.default_rng(seed).normal(size=(rows, length, 8)).astype(np.float32)
    found, stats = second(
        model, hidden, dict(targets=tokens, positions=positions, segments=segments)
    )
    for b in range(rows):
        expected = reference.second_hidden(model, hidden[b].astype(np.float64), tokens[b])
        np.testing.assert_allclose(found[b], expected, rtol=FLOAT32, atol=FLOAT32)
    assert stats.load.shape == (1, 6)
    assert stats.load.sum() == rows * length * k


def packed(seed=0):
    """Two rows of packed documents, the second with padding, as the data pipeline makes them."""
    rng = np.random.default_rng(seed)
    documents = [
        (tiny.tokens(seed + n, n).tolist(), [0.0, *rng.integers(0, 2, n - 1).astype(float)])
        for n in (5, 4, 3, 2, 1)
    ]
    rows = pack(documents, length=9, pad_id=0)
    names = {
        "tokens": rows.tokens_NT,
        "targets": rows.targets_NT,
        "positions": rows.positions_NT,
        "segments": rows.segments_NT,
        "mask": rows.mask_NT,
    }
    return documents, {k: jnp.asarray(v) for k, v in names.items()}


def nll_by_hand(model, documents, *, ahead):
    """Σ −log P of the taught tokens `ahead` places on, document by document; and their count."""
    head, total, count = reference.array(model.head), 0.0, 0
    for ids, mask in documents:
        hidden = reference.hidden(model, np.array(ids))
        if ahead == 2:
            if len(ids) < 3:
                continue
            hidden = reference.second_hidden(model, hidden[:-1], np.array(ids[1:]))
        for i in range(len(ids) - ahead):
            if mask[i + ahead]:
                logits = hidden[i] @ head
                total -= logits[ids[i + ahead]] - np.log(np.exp(logits).sum())
                count += 1
    return total, count


def test_loss_is_that_of_documents_one_by_one():
    """Packing mixes nothing: both losses equal a loop over the documents (eq. 24, 25)."""
    model = tiny.model(CFG)
    documents, batch = packed()
    totals = {
        "mask": batch["mask"].sum(),
        "second": shifted(batch)[1].sum(),
        "rows": jnp.float32(len(batch["tokens"])),
    }
    f = jax.jit(lambda m, w: supervised_loss(m, batch, totals, mtp_weight=w))
    loss, metrics = f(model, 0.3)
    first, first_count = nll_by_hand(model, documents, ahead=1)
    mtp, mtp_count = nll_by_hand(model, documents, ahead=2)
    assert (totals["mask"], totals["second"]) == (first_count, mtp_count)
    np.testing.assert_allclose(metrics["nll"], first, rtol=FLOAT32)
    np.testing.assert_allclose(metrics["mtp_nll"], mtp, rtol=FLOAT32)
    balance = CFG.moe.balance_loss_alpha * metrics["balance"]
    np.testing.assert_allclose(
        loss, first / first_count + 0.3 * mtp / mtp_count + balance, rtol=FLOAT32
    )
    # λ multiplies the MTP term and nothing else.
    np.testing.assert_allclose(loss - f(model, 0.0)[0], 0.3 * mtp / mtp_count, rtol=1e-3)


def test_second_targets_never_leave_the_document():
    for seed in range(5):
        documents, batch = packed(seed)
        targets, mask = (np.asarray(x) for x in shifted(batch))
        tokens, segments, positions = (
            np.asarray(batch[k]) for k in ("tokens", "segments", "positions")
        )
        by_ids = {tuple(ids): m for ids, m in documents}
        for b, t in np.ndindex(tokens.shape):
            inside = t + 2 < 9 and segments[b, t] == segments[b, t + 2] > 0
            if not inside:
                assert mask[b, t] == 0
                continue
            start = t - positions[b, t]
            ids = tuple(tokens[b, start:][segments[b, start:] == segments[b, t]].tolist())
            assert targets[b, t] == tokens[b, t + 2]
            assert mask[b, t] == by_ids[ids][positions[b, t] + 2]


def test_it_uses_the_token_ahead_and_its_own_document():
    model = tiny.model(CFG)
    _, batch = packed()
    del batch["tokens"], batch["mask"]
    hidden = np.random.default_rng(0).normal(size=(*batch["targets"].shape, 8)).astype(np.float32)
    before, _ = second(model, hidden, batch)
    at = int(np.flatnonzero(np.asarray(batch["segments"][0]) == 1)[1])
    changed = batch["targets"].at[0, at].add(1) % tiny.VOCAB
    after, _ = second(model, hidden, batch | {"targets": changed})
    moved = np.abs(np.asarray(after - before)).max(-1) > 1e-6
    same = np.asarray(batch["segments"][0]) == 1
    expected = same & (np.arange(same.size) >= at)
    assert moved[0].tolist() == expected.tolist()
    assert not moved[1:].any()


def test_its_gradient_reaches_every_parameter():
    """The MTP loss trains the trunk, the embedding and the head too: that is what it is for."""
    _, batch = packed()
    silent = {"mask": jnp.inf, "second": 1.0, "rows": jnp.inf}  # divides the other losses away

    def mtp_only(params):
        model = nnx.merge(graphdef, params, rest)
        return supervised_loss(model, batch, silent, mtp_weight=1.0)[0]

    graphdef, params, rest = nnx.split(tiny.model(CFG), nnx.Param, ...)
    for path, g in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(mtp_only))(params)):
        where = jax.tree_util.keystr(path)
        assert np.isfinite(g).all(), where
        assert np.abs(g).max() > 1e-5, where
