"""Mixture of experts: a dropless sparse feed-forward, and what keeps its experts in use."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct

from lcr.checks import check_choice, check_flags, check_positive, check_whole, is_number
from lcr.layers.mlp import ACTIVATIONS, SwiGLU
from lcr.typing import Activations, Array, Bool, Float, Int, Leaf, SegmentIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Options of `MoE`.

    num_experts, top_k: E, and how many of them a token goes through.
    d_expert: width of each expert; None: the model's feed-forward width over top_k, so that a token costs the same.
    num_shared: experts that every token goes through, as one SwiGLU of num_shared d_expert. shared_bias: whether that one
        has biases.
    activation: of the experts, a name of `lcr.layers.mlp.ACTIVATIONS`.
    scoring: "softmax" over the experts (arXiv 2101.03961) or "sigmoid" of each (DeepSeek-V3, arXiv 2412.19437).
    num_groups, top_groups: the experts stand in so many equal groups, and a token chooses from its best top_groups of
        them: by a group's best score (softmax; DeepSeek-V2, 2405.04434, section 2.2.2), or by the sum of its two best
        (sigmoid; DeepSeek-V3, section 2.1.2 and its code).
    normalize: whether a token's k weights are divided by their sum. weight_scale: by which they are then multiplied.
    balance: "none"; "loss": the auxiliary loss of Switch (2101.03961, equation 4), times balance_weight; "bias": no
        loss, but a bias on the scores, in the choice alone, that sinks by bias_rate a step where an expert's load is
        above the mean and rises where it is below (2408.15664).
    z_weight: of the mean squared logsumexp of the router's logits (2202.08906, equation 5).
    """

    num_experts: int = 8
    top_k: int = 2
    d_expert: int | None = None
    num_shared: int = 0
    shared_bias: bool = False
    activation: str = "silu"
    scoring: str = "softmax"
    num_groups: int = 1
    top_groups: int = 1
    normalize: bool = True
    weight_scale: float = 1.0
    balance: str = "loss"
    balance_weight: float = 0.01
    bias_rate: float = 1e-3
    z_weight: float = 0.0

    def __post_init__(self):
        check_whole(num_experts=self.num_experts, top_k=self.top_k)
        check_whole(num_groups=self.num_groups, top_groups=self.top_groups)
        check_flags(normalize=self.normalize, shared_bias=self.shared_bias)
        if self.d_expert is not None:
            check_whole(d_expert=self.d_expert)
        check_positive(weight_scale=self.weight_scale, balance_weight=self.balance_weight, bias_rate=self.bias_rate)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("scoring", self.scoring, ("softmax", "sigmoid"))
        check_choice("balance", self.balance, ("none", "loss", "bias"))
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k}: expected at most num_experts={self.num_experts}")
        if isinstance(self.num_shared, bool) or not isinstance(self.num_shared, int) or self.num_shared < 0:
            raise ValueError(f"num_shared={self.num_shared!r}: expected a whole number, 0 or above")
        if not is_number(self.z_weight) or self.z_weight < 0:
            raise ValueError(f"z_weight={self.z_weight!r}: expected a number, 0 or above")
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_groups={self.num_groups}: expected a divisor of num_experts={self.num_experts}")
        if self.top_groups > self.num_groups:
            raise ValueError(f"top_groups={self.top_groups}: expected at most num_groups={self.num_groups}")
        if self.top_k > self.top_groups * (self.num_experts // self.num_groups):
            raise ValueError(
                f"top_k={self.top_k}: expected at most the {self.num_experts // self.num_groups} experts of each of "
                f"top_groups={self.top_groups} groups"
            )


@struct.dataclass
class Routing:
    """What the router of one layer did in one call, over the real tokens.

    loss:    the weighted losses of the router, to be added to the model's (0 where it has none).
    load:    float32[E], each expert's share of the tokens' k choices; 1/E is balance.
    entropy: mean entropy of a token's distribution over the experts, in nats; log E is indifference.
    """

    loss: Leaf  # float32
    load: Leaf  # float32[E]
    entropy: Leaf  # float32


class MoE(nnx.Module):
    """out_t = sum_{e in top_k(s_t)} w_te SwiGLU_e(x_t) + SwiGLU_shared(x_t), with scores s_t = scoring(x_t W_router).

    No token is dropped: tokens are sorted by expert and multiplied group by group (`jax.lax.ragged_dot`), and how
    many each expert got is a segment sum. A few tokens on a CPU (decoding) go through their experts one by one. The router computes in float32. Padding gives zeros and counts nowhere.
    """

    def __init__(self, config: MoEConfig, d_model: int, d_ff: int, *, dtype: Any, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        experts, width = config.num_experts, config.d_expert or max(1, d_ff // config.top_k)

        def weight(inputs, outputs, lead=(experts,)):
            std = inputs**-0.5
            return nnx.Param(std * jax.random.truncated_normal(rngs.params(), -2, 2, (*lead, inputs, outputs)))

        self.router = weight(d_model, experts, lead=())
        self.gate_up = weight(d_model, 2 * width)
        self.down = weight(width, d_model)
        if config.balance == "bias":
            self.selection_bias = nnx.Param(jnp.zeros((experts,), jnp.float32), group="selection_bias")
        if config.num_shared:
            options = {"activation": config.activation, "use_bias": config.shared_bias, "dtype": dtype, "rngs": rngs}
            self.shared = SwiGLU(d_model, width * config.num_shared, **options)

    def __call__(self, x: Activations, segment_ids: SegmentIds | None = None) -> tuple[Activations, Routing]:
        config = self.config
        flat = x.astype(self.dtype).reshape(-1, x.shape[-1])
        real = None if segment_ids is None else (segment_ids != 0).reshape(-1)
        exact, router = flat.astype(jnp.float32), self.router[...].astype(jnp.float32)
        logits = jnp.dot(exact, router, precision=jax.lax.Precision.HIGHEST)
        scores = jax.nn.softmax(logits) if config.scoring == "softmax" else jax.nn.sigmoid(logits)
        chosen, weights = self.choose(scores)
        y = self.experts(flat, chosen, weights)
        if config.num_shared:
            y = y + self.shared(flat[None])[0]
        if real is not None:
            y = jnp.where(real[:, None], y, 0)
        return y.reshape(x.shape), self.routing(logits, scores, chosen, real)

    def choose(self, scores: Float[Array, "n E"]) -> tuple[Int[Array, "n k"], Float[Array, "n k"]]:
        """The experts of each token and their weights. The bias decides which, never how much."""
        biased = scores
        if self.config.balance == "bias":
            biased = scores + jax.lax.stop_gradient(self.selection_bias[...])[None]
        if self.config.top_groups < self.config.num_groups:
            biased = self.of_the_best_groups(biased)
        chosen = jax.lax.top_k(biased, self.config.top_k)[1].astype(jnp.int32)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if self.config.normalize:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return chosen, weights * self.config.weight_scale

    def of_the_best_groups(self, scores: Float[Array, "n E"]) -> Float[Array, "n E"]:
        """The scores, -inf outside of each token's best groups."""
        config = self.config
        groups = scores.reshape(len(scores), config.num_groups, -1)
        counted = 1 if config.scoring == "softmax" else min(2, groups.shape[-1])
        worth = jax.lax.top_k(groups, counted)[0].sum(axis=-1)
        best = jax.lax.top_k(worth, config.top_groups)[1]
        allowed = (best[..., None] == jnp.arange(config.num_groups)[None, None]).any(axis=1)
        return jnp.where(allowed[..., None], groups, -jnp.inf).reshape(scores.shape)

    def experts(
        self, x: Float[Array, "n D"], chosen: Int[Array, "n k"], weights: Float[Array, "n k"]
    ) -> Float[Array, "n D"]:
        """Every token through its experts, summed over its choices."""
        weights = weights.astype(self.dtype)
        arrays = x, chosen, weights, self.gate_up[...].astype(self.dtype), self.down[...].astype(self.dtype)
        if chosen.size > self.config.num_experts:
            return self.sorted_by_expert(*arrays)
        # `ragged_dot` on a CPU multiplies every token with every expert: 5 to 9 times this loop's time for one token
        return jax.lax.platform_dependent(*arrays, cpu=self.one_by_one, default=self.sorted_by_expert)

    def sorted_by_expert(self, x, chosen, weights, gate_up, down):
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sizes = counts(chosen, self.config.num_experts)
        product = functools.partial(jax.lax.ragged_dot, group_sizes=sizes, precision=self.precision)
        out = product(self.activated(product(x[order // chosen.shape[1]], gate_up)), down)
        out = out[jnp.argsort(order)].reshape(*chosen.shape, -1)
        return (out * weights[..., None]).sum(axis=1)

    def one_by_one(self, x, chosen, weights, gate_up, down):
        def choice(args):
            x, expert = args
            hidden = jnp.dot(x[None], gate_up[expert], precision=self.precision)
            return jnp.dot(self.activated(hidden), down[expert], precision=self.precision)[0]

        out = jax.lax.map(choice, (jnp.repeat(x, chosen.shape[1], axis=0), chosen.reshape(-1)))
        return (out.reshape(*chosen.shape, -1) * weights[..., None]).sum(axis=1)

    def activated(self, gate_up: Float[Array, "n F2"]) -> Float[Array, "n F"]:
        gate, up = jnp.split(gate_up, 2, axis=-1)
        return ACTIVATIONS[self.config.activation](gate) * up

    @property
    def precision(self) -> jax.lax.Precision:
        return jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def routing(
        self,
        logits: Float[Array, "n E"],
        scores: Float[Array, "n E"],
        chosen: Int[Array, "n k"],
        real: Bool[Array, "n"] | None,
    ) -> Routing:
        config = self.config
        kept = jnp.ones(logits.shape[:1], jnp.float32) if real is None else real.astype(jnp.float32)
        total = jnp.maximum(kept.sum(), 1)

        def mean(values):  # over real tokens
            return (values * kept.reshape(-1, *[1] * (values.ndim - 1))).sum(axis=0) / total

        load = counts(chosen, config.num_experts, kept) / (total * config.top_k)
        probability = scores / (scores.sum(axis=-1, keepdims=True) + 1e-20)
        loss = jnp.zeros((), jnp.float32)
        if config.balance == "loss":
            loss += config.balance_weight * config.num_experts * (load * mean(probability)).sum()
        if config.z_weight:
            loss += config.z_weight * mean(jax.nn.logsumexp(logits, axis=-1) ** 2)
        if config.balance == "bias":
            # Nothing in value; its gradient is the direction in which the optimizer's plain steps move the bias.
            pull = jnp.sign(load - 1 / config.num_experts) * config.bias_rate * self.selection_bias[...]
            loss += (pull - jax.lax.stop_gradient(pull)).sum()
        entropy = -mean((probability * jnp.log(probability + 1e-20)).sum(axis=-1))
        return Routing(loss=loss, load=load, entropy=entropy)


def counts(chosen: Int[Array, "n k"], experts: int, kept: Float[Array, "n"] | None = None) -> Array:
    """How often each expert was chosen, int32[E]; with `kept`, its weighted sum, float32[E]."""
    ids = chosen.reshape(-1)
    ones = jnp.ones(ids.shape, jnp.int32) if kept is None else jnp.repeat(kept, chosen.shape[1])
    return jax.ops.segment_sum(ones, ids, num_segments=experts)
