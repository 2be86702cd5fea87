"""The mixture of experts against a loop over tokens and experts, its balances, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx
from lcr.layers.moe import MoE, MoEConfig
from pallas_kernels.tolerances import assert_close

WIDTH, FF = 16, 24
IDS = np.array([[1, 1, 1, 0, 2, 2], [0, 3, 3, 3, 3, 0]], np.int32)


@functools.cache
def build(**options):
    return MoE(MoEConfig(num_experts=5, top_k=2, **options), WIDTH, FF, dtype=jnp.float32, rngs=nnx.Rngs(0))


def activations(seed=0, batch=2, length=6):
    return np.random.default_rng(seed).standard_normal((batch, length, WIDTH), np.float32)


@nnx.jit
def run(moe, *args):
    return moe(*args)


def swiglu(x, gate_up, down):
    gate, up = np.split(x @ gate_up, 2)
    return (gate / (1 + np.exp(-gate)) * up) @ down


def by_hand(moe, x):
    """One token at a time, in float64, straight from the definition."""
    config = moe.config
    router, gate_up, down = (np.asarray(leaf[...], np.float64) for leaf in (moe.router, moe.gate_up, moe.down))
    out = np.zeros(x.shape)
    for at in np.ndindex(*x.shape[:2]):
        token = np.asarray(x[at], np.float64)
        logits = token @ router
        scores = 1 / (1 + np.exp(-logits)) if config.scoring == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
        bias = np.asarray(moe.selection_bias[...]) if config.balance == "bias" else 0
        chosen = np.argsort(-(scores + bias))[: config.top_k]
        weights = scores[chosen] / (scores[chosen].sum() if config.normalize else 1) * config.weight_scale
        for e, weight in zip(chosen, weights, strict=True):
            out[at] += weight * swiglu(token, gate_up[e], down[e])
        if config.num_shared:
            shared = [np.asarray(leaf[...], np.float64) for leaf in (moe.shared.gate_up.kernel, moe.shared.down.kernel)]
            out[at] += swiglu(token, *shared)
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scoring": "sigmoid", "balance": "bias", "weight_scale": 2.5, "num_shared": 2},
        {"normalize": False, "balance": "none", "d_expert": 7},
    ],
    ids=["softmax", "DeepSeek-V3", "not normalised"],
)
def test_equals_the_definition(options):
    moe = build(**options)
    if "balance" in options and options["balance"] == "bias":
        moe.selection_bias[...] = jnp.array([0.3, -0.2, 0.0, 0.1, -0.4])
    x = activations()
    assert_close(run(moe, x)[0], by_hand(moe, x), "float32")


@pytest.mark.parametrize(("scoring", "worth"), [("softmax", np.max), ("sigmoid", np.sum)])
def test_a_token_chooses_from_its_best_groups(scoring, worth):
    """Of three groups of two experts from two: by their best score, or by the sum of both."""
    config = MoEConfig(num_experts=6, top_k=2, num_groups=3, top_groups=2, scoring=scoring)
    moe = MoE(config, WIDTH, FF, dtype=jnp.float32, rngs=nnx.Rngs(0))
    scores = np.random.default_rng(0).random((50, 6), np.float32)
    chosen, _ = jax.jit(moe.choose)(jnp.asarray(scores))
    for row, experts in zip(scores, chosen, strict=True):
        best = np.argsort(-worth(row.reshape(3, 2), axis=1))[:2]
        allowed = np.where(np.isin(np.arange(6) // 2, best), row, -np.inf)
        assert set(experts.tolist()) == set(np.argsort(-allowed)[:2].tolist())


def test_no_token_is_dropped_though_all_choose_the_same_experts():
    moe = build()
    x = np.broadcast_to(activations(length=1), (2, 6, WIDTH))
    y, routing = run(moe, x)
    assert_close(y, by_hand(moe, x), "float32")
    assert sorted(np.asarray(routing.load).tolist())[-1] >= 0.25


def test_few_tokens_take_another_way_to_the_same_end():
    """2 tokens with 2 choices of 5 experts: on a CPU they go through them one by one."""
    moe, x = build(), activations(length=1)
    assert_close(run(moe, x)[0], by_hand(moe, x), "float32")
    flat, arrays = x.reshape(2, WIDTH), (moe.gate_up[...], moe.down[...])
    chosen, weights = jnp.asarray([[0, 3], [3, 1]]), jnp.asarray([[0.2, 0.9], [0.4, 0.3]], jnp.float32)

    def squares(way, x, weights, *arrays):
        return (way(x, chosen, weights, *arrays) ** 2).sum()

    ways = [jax.jit(jax.value_and_grad(functools.partial(squares, way), argnums=(0, 1, 2, 3)))
            for way in (moe.one_by_one, moe.sorted_by_expert)]  # fmt: skip
    assert_close(*(way(flat, weights, *arrays) for way in ways), "float32")


def test_padding_is_zero_and_counts_nowhere():
    moe = build(z_weight=0.1)
    x = activations()
    y, routing = run(moe, x, IDS)
    other, again = run(moe, np.where((IDS != 0)[..., None], x, np.float32(1e3)), IDS)
    assert not np.asarray(y)[IDS == 0].any()
    assert_close((other, again), (y, routing), "float32")
    np.testing.assert_allclose(routing.load.sum(), 1, rtol=1e-6)
    real = x[IDS != 0][None]
    assert_close(run(moe, real)[1], routing, "float32")


def test_losses_and_statistics_by_hand():
    moe, x = build(z_weight=0.5, balance_weight=0.2), activations()
    _, routing = run(moe, x)
    logits = np.asarray(x, np.float64).reshape(-1, WIDTH) @ np.asarray(moe.router[...], np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    load = np.bincount(np.argsort(-p, axis=-1)[:, :2].ravel(), minlength=5) / (2 * len(p))
    balance = 0.2 * 5 * (load * p.mean(0)).sum()
    z = 0.5 * (np.log(np.exp(logits).sum(-1)) ** 2).mean()
    assert_close((routing.load, routing.loss), (load, balance + z), "float32")
    assert_close(routing.entropy, -(p * np.log(p)).sum(-1).mean(), "float32")


def test_the_bias_moves_against_the_load():
    """Its gradient, taken as a plain step, raises what is chosen too little, and does not touch the output."""
    moe = build(balance="bias", bias_rate=0.01)
    moe.selection_bias[...] = jnp.array([9.0, 9.0, 0.0, 0.0, 0.0])  # all tokens go to experts 0 and 1
    graph, parameters = nnx.split(moe)

    @jax.jit
    @jax.value_and_grad
    def with_gradient(parameters, x):
        y, routing = nnx.merge(graph, parameters)(x)
        return (y**2).sum() + routing.loss

    value, gradient = with_gradient(parameters, activations())
    expected = np.array([0.01, 0.01, -0.01, -0.01, -0.01], np.float32)
    assert_close(gradient.selection_bias[...], expected, "exact")
    assert_close(value, (np.asarray(run(moe, activations())[0]) ** 2).sum(), "float32")


def test_memory_does_not_hold_tokens_by_experts_by_choices():
    moe = MoE(MoEConfig(num_experts=64, top_k=4, d_expert=4), WIDTH, FF, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graph, parameters = nnx.split(moe)
    program = jax.make_jaxpr(lambda p, x: nnx.merge(graph, p)(x))(parameters, jnp.asarray(activations(length=128)))
    largest = max(v.aval.size for eqn in program.jaxpr.eqns for v in eqn.outvars)
    assert largest <= 256 * 64  # the router's scores


def test_in_a_decoder_pieces_equal_the_whole():
    model = lcr.make_model(
        {"vocab_size": 31, "d_model": 16, "mixers": ("gqa",) * 4, "feed_forward": ("swiglu", "moe") * 2},
        rngs=nnx.Rngs(0),
    )
    tokens = np.random.default_rng(0).integers(1, 31, (2, 12), np.int32)
    whole, states, routings = nnx.jit(lambda model, tokens: model.with_routing(tokens))(model, tokens)
    assert [routing.load.shape for routing in routings] == [(2, 8)]
    first, middle = run(model, tokens[:, :6], model.init_states(2, 12))
    second, after = run(model, tokens[:, 6:], middle)
    assert_close(np.concatenate([first, second], axis=1), whole, "float32")
    assert_close(after, states, "float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "top_k=9: expected at most num_experts=8"),
        ({"scoring": "tanh"}, "scoring: unknown value 'tanh'"),
        ({"balance": "los"}, "balance: unknown value 'los'. Did you mean 'loss'"),
        ({"num_shared": -1}, "num_shared=-1: expected a whole number, 0 or above"),
        ({"num_groups": 3}, "num_groups=3: expected a divisor of num_experts=8"),
        ({"num_groups": 2, "top_groups": 3}, "top_groups=3: expected at most num_groups=2"),
        ({"num_groups": 8, "top_groups": 1}, "top_k=2: expected at most the 1 experts of each of top_groups=1 groups"),
        ({"z_weight": float("nan")}, "z_weight=nan: expected a number, 0 or above"),
        ({"num_expert": 4}, "'num_expert'. Did you mean 'num_experts'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        lcr.ModelConfig(
            vocab_size=9, d_model=16, mixers=("gqa",), feed_forward="moe", feed_forward_options={"moe": options}
        )


def test_feed_forwards_must_fit_the_mixers():
    with pytest.raises(ValueError, match="expected one name, or one for each of the 2"):
        lcr.ModelConfig(vocab_size=9, d_model=16, mixers=("gqa",) * 2, feed_forward=("moe",))
    with pytest.raises(ValueError, match="feed_forward: unknown value 'mo'"):
        lcr.ModelConfig(vocab_size=9, d_model=16, mixers=("gqa",), feed_forward="mo")
    with pytest.raises(ValueError, match="unknown feed-forward of this model 'moe'"):
        lcr.ModelConfig(vocab_size=9, d_model=16, mixers=("gqa",), feed_forward_options={"moe": {}})
