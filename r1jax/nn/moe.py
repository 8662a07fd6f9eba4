# SPDX-License-Identifier: Apache-2.0
"""DeepSeekMoE: router, routed experts and shared experts."""

import jax
import jax.numpy as jnp
from flax import nnx

from r1jax.config import MoEConfig
from r1jax.nn import param
from r1jax.nn.layers import SwiGLU
from r1jax.nn.stats import RouterStats
from r1jax.ops.linear import FP8
from r1jax.ops.routing import Routing, expert_load, route, sequence_balance_loss
from r1jax.parallel import dispatch
from r1jax.parallel.eplb import Placement, beside
from r1jax.parallel.relocation import with_copies
from r1jax.sharding import count, decoding, index, local, spec, total, unpartitioned


class Router(nnx.Module):
    """Expert centroids and the balance bias (DeepSeek-V3 section 2.1.2)."""

    def __init__(self, dim: int, cfg: MoEConfig, *, std: float):
        self.cfg = cfg
        e = cfg.n_routed_experts
        self.weight = param.normal((dim, e), ("embed", "routed"), std, exact=True)
        self.bias = param.constant(0.0, (e,), ("routed",), cls=param.RouterBias)

    def __call__(self, x_TD: jax.Array) -> Routing:
        cfg = self.cfg
        logits_TE = jnp.einsum(
            "td,de->te",
            x_TD.astype(jnp.float32),
            param.use(self.weight, jnp.float32),
            precision=jax.lax.Precision.HIGHEST,  # accelerators would multiply in fewer bits
        )
        return route(
            logits_TE,
            self.bias[...],
            num_experts_per_tok=cfg.num_experts_per_tok,
            n_group=cfg.n_group,
            topk_group=cfg.topk_group,
            routed_scaling_factor=cfg.routed_scaling_factor,
        )


class MoE(nnx.Module):
    """y = shared(x) + Σ_k g_k · expert_k(x) (DeepSeek-V3 eq. 12)."""

    def __init__(self, dim: int, cfg: MoEConfig, *, std: float, fp8: FP8 | None = None):
        self.fp8 = fp8
        e, f = cfg.n_routed_experts, cfg.moe_intermediate_size
        self.router = Router(dim, cfg, std=std)
        self.w_gate = param.linear((e, dim, f), ("expert", "embed", "mlp"), std)
        self.w_up = param.linear((e, dim, f), ("expert", "embed", "mlp"), std)
        self.w_down = param.linear((e, f, dim), ("expert", "mlp", "embed"), std)
        self.n_shared = cfg.n_shared_experts
        if self.n_shared:
            self.shared = SwiGLU(dim, f * self.n_shared, std=std, fp8=fp8)

    def __call__(
        self, x_BTD: jax.Array, valid_BT: jax.Array, place: Placement | None = None
    ) -> tuple[jax.Array, RouterStats]:
        """[B, T, D] → [B, T, D] and the router's report; padding (valid 0) is not counted.

        Args:
            place: what the slots of the experts' weights hold, where it is not each expert in turn.
        """
        b, t, d = x_BTD.shape
        x_TD = x_BTD.reshape(b * t, d)
        with jax.named_scope("router"):
            routing = self.router(x_TD)
        with jax.named_scope("routed_experts"):
            y_TD, overflow = self._routed(x_TD, routing, place)
        if self.n_shared:
            with jax.named_scope("shared_experts"):
                y_TD = y_TD + self.shared.mix(x_TD)
        n_experts = routing.affinity_TE.shape[1]
        stats = RouterStats(
            expert_load(routing.index_TK, valid_BT.reshape(-1), n_experts),
            sequence_balance_loss(
                routing.affinity_TE.reshape(b, t, -1),
                routing.index_TK.reshape(b, t, -1),
                valid_BT,
                total=lambda x: total(x, "length"),
            ),
            overflow,
        )
        return y_TD.reshape(b, t, d), stats

    def _routed(self, x_TD, routing: Routing, place) -> tuple[jax.Array, jax.Array]:
        """(Σ over the routed experts, how often a buffer would have overflown)."""
        cfg, dtype = self.router.cfg, x_TD.dtype
        held = (self.w_gate, self.w_up, self.w_down)

        def run(x_TD, index_TK, weight_TK, held, place):
            ranks, k = count("expert"), index_TK.shape[1]
            reached = dispatch.reach(ranks, k, cfg.n_group, cfg.topk_group)
            if place is not None:  # its copies may be anywhere
                reached = min(ranks, k)
                turn_T = jnp.arange(len(x_TD)) + index("batch", "length") * len(x_TD)
                index_TK = place.slots(index_TK, turn_T, cfg.n_routed_experts)
            weights = tuple(param.operand(w, dtype, self.fp8) for w in held)
            how = dict(reach=reached, slack=cfg.dispatch_slack, pieces=cfg.dispatch_pieces)
            how |= dict(fp8=self.fp8)
            y_TD, overflow = dispatch.dispatch(x_TD, index_TK, weight_TK, weights, **how)
            return total(y_TD, "mlp"), overflow

        # Where XLA is partitioning, as in prefill, experts stay where they are all the same; and
        # rows do, unless the experts' weights would have to come to them.
        cut = ("expert",) if unpartitioned("embed") else ("batch", "expert", "mlp")
        pieces = unpartitioned(*cut)
        if not pieces:
            # A token would not be worth the way of the copies.
            if place is None and not decoding() and count("expert") > 1 and cfg.redundant_experts:
                held, place = self._copied(held, routing.index_TK, dtype)
            return run(x_TD, routing.index_TK, routing.weight_TK, held, place)
        short = -len(x_TD) % pieces
        padded = lambda x, fill=0: jnp.pad(x, ((0, short), (0, 0)), constant_values=fill)  # noqa: E731
        index_TK = padded(routing.index_TK, cfg.n_routed_experts)
        rows = (padded(x_TD), index_TK, padded(routing.weight_TK))
        where = (*(spec("batch", None),) * 3, param.specs(held), param.specs(place))
        y_TD, overflow = local(run, where, (where[0], spec()))(*rows, held, place)
        return y_TD[: len(x_TD)], overflow

    def _copied(self, held, index_TK: jax.Array, dtype):
        """The weights with copies of the hottest experts of this very batch on every device.

        The loads are known before a token is sent, as in DeepSeek's dynamic redundancy (section
        3.4.2): nothing is kept from step to step.
        """
        e, ranks = self.router.cfg.n_routed_experts, count("expert")
        every_T = jnp.ones(len(index_TK), bool)
        load_E = total(expert_load(index_TK, every_T, e), "batch", "length")
        place = beside(load_E, slots=e + self.router.cfg.redundant_experts, devices=ranks)
        expert_nX = place.expert_S.reshape(ranks, -1)[:, e // ranks :]
        dtype = dtype if self.fp8 is None else jnp.float32

        def copied(weight):
            # Before it is made whole along its other axes, so that less crosses devices; but for
            # the recipe as float32: blocks are made of what has come.
            return weight.replace(with_copies(weight[...].astype(dtype), expert_nX))

        return tuple(map(copied, held)), place


class Placed(nnx.Module):
    """A mixture whose experts lie in slots, some of them in several (DeepSeek-V3 section 3.4).

    It computes what `moe` does. It serves: its copies would not be trained alike.
    """

    def __init__(self, moe: MoE, place: Placement):
        """
        Args:
            moe: with the weights of each slot's expert, [S, ...].
            place: which experts those are.
        """
        self.moe = moe
        self.expert, self.share = map(param.slots, place)

    def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array) -> tuple[jax.Array, RouterStats]:
        """As `MoE`."""
        return self.moe(x_BTD, valid_BT, Placement(self.expert[...], self.share[...]))
