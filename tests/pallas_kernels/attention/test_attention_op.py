"""The attention op: the reference against plain numpy, the implementations against the reference, and its cost."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_calls import arrays, assert_like_reference, compute, out_and_gradients
from pallas_kernels.attention import api, attention, conformance, merge, tiles
from pallas_kernels.attention.api import check_arguments
from pallas_kernels.attention.shapes import Shape
from pallas_kernels.tolerances import assert_close

PACKED = Shape(B=2, T=128, H=2, G=1, K=8)


@pytest.fixture
def small_tiles(monkeypatch):
    """32 x 32, so that short sequences have many."""
    monkeypatch.setattr(tiles, "SIDE", 32)


def by_hand(q, k, v, index, causal=True, window=None, soft_cap=None, scale=None, slopes=None, block_size=None):
    """One query and head at a time, in float64 NumPy; and the log-sum-exp."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    index = jax.tree.map(lambda a: np.broadcast_to(a, (q.shape[0], *a.shape[1:])), index)
    out, sums = np.zeros((*q.shape[:3], v.shape[3])), np.full(q.shape[:3], -np.inf)
    for b, t, h in np.ndindex(sums.shape):
        g = h * k.shape[2] // q.shape[2]
        distance = index.positions[b, t] - index.kv_positions[b]
        shown = (distance >= 0) | (not causal)
        if window is not None:
            shown &= distance < window
        if block_size is not None:
            shown &= index.block_mask[b, t // block_size[0], np.arange(k.shape[1]) // block_size[1]]
        if index.documents[b, t] == 0:
            continue
        seen = np.flatnonzero(shown & (index.documents[b, t] == index.kv_documents[b]))
        if len(seen):
            scores = k[b, seen, g] @ q[b, t, h] * (scale or q.shape[3] ** -0.5)
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            if slopes is not None:
                scores -= slopes[h] * (index.positions[b, t] - index.kv_positions[b, seen])
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights @ v[b, seen, g] / weights.sum()
            sums[b, t, h] = scores.max() + np.log(weights.sum())
    return out, sums


def by_hand_alone(q, k, v):
    """One document and nothing else."""
    ids, positions = np.ones((1, q.shape[1])), np.arange(q.shape[1])[None]
    return by_hand(q, k, v, tiles.Index(ids, ids, positions, positions))[0]


@pytest.mark.parametrize(
    "name", ["ragged, grouped", "window, not causal", "ring", "blocks, packed", "latent decode", "alibi"]
)
def test_reference_is_the_definition(name):
    case = conformance.CASES[name]
    floats, index, static = conformance.arguments(case, np.float32)
    slopes = index.pop("alibi_slopes", None)
    o, sums = attention(
        *(*floats, None)[:3], **index, **static, alibi_slopes=slopes, return_logsumexp=True, implementation="reference"
    )
    names = ("segment_ids", "kv_segment_ids", "q_positions", "kv_positions", "block_mask")
    filled = api._index(*floats[:2], *(index.get(name) for name in names))
    options = {name: value for name, value in static.items() if name != "value_width"}
    values = floats[1][..., : case.shape.V] if case.shape.latent else floats[2]
    slopes = None if slopes is None else np.asarray(slopes)
    want, want_sums = by_hand(*floats[:2], values, jax.device_get(filled), slopes=slopes, **options)
    assert_close(o, want, "float32")
    np.testing.assert_array_equal(np.isneginf(sums), np.isneginf(want_sums))
    assert_close(np.where(np.isneginf(sums), 0, sums), np.where(np.isneginf(want_sums), 0, want_sums), "float32")


def test_parts_merge_to_the_whole(small_tiles):
    """With gradients; a part in which some queries see nothing, and queries that see nothing anywhere."""
    qkv, index = ring_of_keys(40)
    options = {name: jnp.asarray(a) for name, a in index.items()} | {"implementation": "chunked"}

    def whole(q, k, v):
        return attention(q, k, v, **options, return_logsumexp=True)

    def in_parts(q, k, v):
        found = []
        for part in (slice(0, 25), slice(25, 60), slice(60, 90)):
            of_part = {name: a[:, part] if name.startswith("kv") else a for name, a in options.items() if name in index}
            found.append(
                attention(q, k[:, part], v[:, part], **(options | of_part), return_logsumexp=True)
            )
        return merge(*(jnp.stack(results) for results in zip(*found, strict=True)))

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, *qkv):
        def results(*qkv):
            o, sums = function(*qkv)
            return o, jnp.where(jnp.isneginf(sums), 0, sums)

        out, pullback = jax.vjp(results, *qkv)
        return out, pullback(jax.tree.map(jnp.cos, out))

    assert_close(run(in_parts, *qkv), run(whole, *qkv), "float32 gradient")


def packed_ids(rng, batch, length, documents=3):
    """Documents with padding at the left, at the right and in the middle, and an id that comes back."""
    ids = np.sort(rng.integers(1, documents + 1, (batch, length)), axis=1)
    ids[:, -length // 8 :] = 1
    ids[0, : length // 6] = 0
    ids[-1, -length // 6 :] = 0
    ids[rng.random((batch, length)) < 0.1] = 0
    return jnp.asarray(ids, jnp.int32)


def ring_of_keys(length):
    """Keys in any order with some slots empty, two documents among them, and queries that follow them."""
    rng = np.random.default_rng(2)
    kv_positions = np.stack([rng.permutation(90), np.roll(np.arange(90), 37)]).astype(np.int32)
    kv_ids = (kv_positions % 7 != 0) * (1 + kv_positions // 60)
    positions = 90 - length + np.tile(np.arange(length, dtype=np.int32), (2, 1))
    ids = np.where(np.arange(length)[None] % 5 == 4, 0, 1 + (positions >= 60))
    index = {"segment_ids": ids, "kv_segment_ids": kv_ids, "q_positions": positions, "kv_positions": kv_positions}
    return arrays(Shape(B=2, T=length, S=90, H=4, G=2, K=8)), {n: a.astype(np.int32) for n, a in index.items()}


SLOPES = np.array([0.5, 0.0, 2.0, 0.01], np.float32)


def test_alibi_by_index(small_tiles):
    """Without positions: queries are the last keys; and at a million tokens with steep slopes nothing overflows."""
    q, k, v = arrays(Shape(T=40, S=90, H=4, G=2, K=8))
    positions = np.arange(90)[None]
    index = tiles.Index(np.ones((1, 40)), np.ones((1, 90)), positions[:, 50:], positions)
    want = by_hand(q, k, v, index, slopes=SLOPES)[0]
    assert_close(compute(q, k, v, alibi_slopes=jnp.asarray(SLOPES)), want, "float32")
    far = {"q_positions": jnp.arange(50, 90, dtype=jnp.int32), "kv_positions": jnp.arange(90, dtype=jnp.int32)}
    far = {name: 20_000 * a for name, a in far.items()}
    assert_like_reference("chunked", q, k, v, alibi_slopes=jnp.asarray(SLOPES), **far)


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize("length", [1, 5])
def test_slopes_are_constants(implementation, length):
    q, k, v = arrays(Shape(T=length, S=5, H=4, G=2, K=8))

    def loss(slopes):
        return (attention(q, k, v, alibi_slopes=slopes, implementation=implementation) ** 2).sum()

    assert not jax.jit(jax.grad(loss))(jnp.asarray(SLOPES)).any()


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize("length", [40])
def test_what_sees_nothing_is_zero(implementation, length, small_tiles):
    qkv, index = ring_of_keys(length)
    on_device = {name: jnp.asarray(a) for name, a in index.items()}
    ids = jnp.ones((2, length), jnp.int32).at[0].set(0)  # row 0 is padding; row 1 has no key of its document
    on_device |= {"segment_ids": ids, "kv_segment_ids": jnp.full((2, 90), 2, jnp.int32)}
    o, gradients = out_and_gradients(implementation, *qkv, **on_device, window=70)
    assert not jnp.any(o)
    assert not any(jnp.any(g) for g in gradients)


def test_real_tile_side():
    """Ragged lengths beyond one tile of the size in use, with groups of heads folded into a tile's rows."""
    qkv = arrays(Shape(T=700, S=1_100, H=4, G=2, K=16, V=8))
    want = compute(*qkv, window=600, implementation="reference")
    assert_close(compute(*qkv, window=600, implementation="chunked"), want, "float32")


def test_float64(small_tiles):
    with jax.enable_x64(True):
        qkv = arrays(Shape(T=70, H=2, G=1, K=8), dtype=np.float64)
        o = compute(*qkv, implementation="chunked", soft_cap=3.0)
        assert o.dtype == jnp.float64
        assert_close(o, compute(*qkv, implementation="reference", soft_cap=3.0), "float64")


def test_bfloat16(small_tiles):
    qkv = arrays(PACKED)
    ids = packed_ids(np.random.default_rng(1), PACKED.B, PACKED.T)
    exact, exact_gradients = out_and_gradients("reference", *qkv, segment_ids=ids)
    half = [a.astype(jnp.bfloat16) for a in qkv]
    o, gradients = out_and_gradients("chunked", *half, segment_ids=ids)
    assert o.dtype == gradients[0].dtype == jnp.bfloat16
    assert_close(o.astype(jnp.float32), exact, "bfloat16")
    assert_close([g.astype(jnp.float32) for g in gradients], list(exact_gradients), "bfloat16 gradient")


def test_float32_queries_of_a_bfloat16_cache():
    q, k, v = arrays(Shape(B=2, T=1, S=30, H=4, G=2, K=8))
    k, v = k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
    o = compute(q, k, v)
    assert o.dtype == jnp.float32
    assert_close(o, compute(q, k.astype(jnp.float32), v.astype(jnp.float32)), "float32")


def test_grouped_heads_are_repeated_keys():
    q, k, v = arrays(Shape(B=2, T=30, H=6, G=2, K=8))
    repeated = [jnp.repeat(a, 3, axis=2) for a in (k, v)]
    assert_close(compute(q, k, v), compute(q, *repeated), "float32")
    assert_close(compute(q[:, -1:], k, v), compute(q[:, -1:], *repeated), "float32")


def test_an_id_that_comes_back_is_a_new_document():
    q, k, v = arrays(Shape(T=9, H=2, G=2, K=8))
    ids = jnp.asarray([[1, 1, 2, 0, 2, 2, 1, 0, 1]], jnp.int32)
    parts = [jnp.asarray(at) for at in ([0, 1], [2, 4, 5], [6, 8])]
    alone = jnp.concatenate([by_hand_alone(*(a[:, at] for a in (q, k, v))) for at in parts], axis=1)
    together = compute(q, k, v, segment_ids=ids)
    assert_close(together[:, jnp.concatenate(parts)], alone, "float32")
    assert not jnp.any(together[:, jnp.asarray([3, 7])])

    as_they_are = compute(q, k, v, segment_ids=ids, kv_segment_ids=ids)  # now both 1s are one document
    ones = jnp.asarray([0, 1, 6, 8])
    assert_close(as_they_are[:, ones], by_hand_alone(*(a[:, ones] for a in (q, k, v))), "float32")


def test_transforms(small_tiles):
    """Under vmap, and under scan with remat, gradients are those of the plain call."""
    qkv = arrays(PACKED)
    ids = packed_ids(np.random.default_rng(1), PACKED.B, PACKED.T)

    def row_gradients(*row_and_ids, wrap=lambda f: f):
        *row, ids = (a[None] for a in row_and_ids)

        def loss(*row):
            return (attention(*row, segment_ids=ids) ** 2).sum()

        return jax.grad(wrap(loss), (0, 1, 2))(*row)

    @jax.jit
    def both_ways(*rows):
        step = functools.partial(row_gradients, wrap=jax.checkpoint)
        return jax.vmap(row_gradients)(*rows), jax.lax.scan(lambda carry, row: (carry, step(*row)), 0, rows)[1]

    o, _ = out_and_gradients("chunked", *qkv, segment_ids=ids)
    _, want = out_and_gradients("chunked", *qkv, segment_ids=ids, cotangent=2 * o)
    for name, gradients in zip(("vmap", "scan and remat"), both_ways(*qkv, ids), strict=True):
        assert_close(tuple(g[:, 0] for g in gradients), want, "float32 gradient", name)


def largest_intermediate(jaxpr) -> int:
    """Elements of the largest array that any equation writes, inner programs included."""
    largest = 0
    for equation in jaxpr.eqns:
        largest = max([largest, *(v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))])
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                largest = max(largest, largest_intermediate(inner))
    return largest


def test_no_length_squared_array():
    shape = Shape(T=2_048, H=4, G=2, K=16)
    q, k, v = arrays(shape)

    def largest(implementation, **options):
        def loss(q, k, v):
            return attention(q, k, v, implementation=implementation, **options).sum()

        return largest_intermediate(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v).jaxpr)

    assert largest("reference") >= 2_048 * 2_048  # the measure sees what it is to forbid
    assert largest("chunked") <= max(2 * 512 * 512, q.size)
    assert largest("chunked", alibi_slopes=jnp.asarray(SLOPES)) <= max(2 * 512 * 512, q.size)


@pytest.mark.parametrize("case", ["causal", "window", "documents"])
def test_tiles_outside_are_never_read(case, small_tiles):
    """NaN in a tile that is masked, rather than skipped, would reach outputs and gradients (0 x NaN)."""
    q, k, v = arrays(PACKED)
    ids = jnp.ones((PACKED.B, PACKED.T), jnp.int32)
    if case == "documents":
        ids = ids.at[:, 64:].set(2)
    options = {"window": 20} if case == "window" else {}
    # Queries 64 .. 95 are looked at; the cotangent of the others is zero.
    bad = {"causal": slice(96, 128), "window": slice(0, 32), "documents": slice(0, 64)}[case]
    cotangent = jnp.zeros_like(q).at[:, 64:96].set(1.0)

    def looked_at(k, v):
        o, (dq, _, _) = out_and_gradients("chunked", q, k, v, cotangent, segment_ids=ids, **options)
        return o[:, 64:96], dq[:, 64:96]

    poisoned = [a.at[:, bad].set(jnp.nan) for a in (k, v)]
    assert_close(looked_at(*poisoned), looked_at(k, v), "exact")


def bad_arguments():
    q, k, v = (jnp.zeros((2, 3, 4, 8)), jnp.zeros((2, 5, 2, 8)), jnp.zeros((2, 5, 2, 6)))
    ids, kv_ids = jnp.ones((2, 3), jnp.int32), jnp.ones((2, 5), jnp.int32)
    return [
        ("q: shape", dict(q=q[0], k=k, v=v)),
        ("k: shape", dict(q=q, k=k[:, :, :, :4], v=v)),
        ("k: shape", dict(q=q, k=k[:1], v=v)),
        ("v: shape", dict(q=q, k=k, v=v[:, :4])),
        ("expected a divisor", dict(q=q[:, :, :3], k=k, v=v)),
        ("none empty", dict(q=q[:, :0], k=k, v=v)),
        ("q: dtype int32", dict(q=q.astype(jnp.int32), k=k, v=v)),
        ("expected one dtype", dict(q=q, k=k, v=v.astype(jnp.bfloat16))),
        ("window=0", dict(q=q, k=k, v=v, window=0)),
        ("whole number", dict(q=q, k=k, v=v, window=2.5)),
        ("window='3': expected a number", dict(q=q, k=k, v=v, window="3")),
        ("scale=True: expected a number", dict(q=q, k=k, v=v, scale=True)),
        ("scale=-1", dict(q=q, k=k, v=v, scale=-1)),
        ("soft_cap=inf", dict(q=q, k=k, v=v, soft_cap=float("inf"))),
        ("ids of the keys too", dict(q=q, k=k, v=v, segment_ids=ids)),
        ("ids of the queries too", dict(q=q, k=k, v=v, kv_segment_ids=kv_ids)),
        ("segment_ids: shape", dict(q=q, k=k, v=v, segment_ids=kv_ids, kv_segment_ids=kv_ids)),
        ("kv_segment_ids: dtype", dict(q=q, k=k, v=v, segment_ids=ids, kv_segment_ids=jnp.ones((2, 5)))),
        ("alibi_slopes: shape", dict(q=q, k=k, v=v, alibi_slopes=jnp.ones(2))),
        ("alibi_slopes: dtype", dict(q=q, k=k, v=v, alibi_slopes=jnp.ones(4, jnp.int32))),
        ("q_positions: shape", dict(q=q, k=k, v=v, q_positions=kv_ids)),
        ("value_width=None without v", dict(q=q, k=k, v=None)),
        ("value_width=4 beside v", dict(q=q, k=k, v=v, value_width=4)),
        ("value_width=9: expected 1 to 8", dict(q=q, k=k, v=None, value_width=9)),
        ("block_size=None beside a block_mask", dict(q=q, k=k, v=v, block_mask=jnp.ones((1, 1), bool))),
        ("block_size=(2, 2) beside no block_mask", dict(q=q, k=k, v=v, block_size=(2, 2))),
        ("block_size=(0, 2)", dict(q=q, k=k, v=v, block_mask=jnp.ones((2, 3), bool), block_size=(0, 2))),
        ("block_mask: dtype", dict(q=q, k=k, v=v, block_mask=jnp.ones((2, 3)), block_size=(2, 2))),
        ("expected (2, 2, 3) or (2, 3)", dict(q=q, k=k, v=v, block_mask=jnp.ones((3, 2), bool), block_size=(2, 2))),
    ]


@pytest.mark.parametrize(("message", "arguments"), bad_arguments())
def test_bad_arguments(message, arguments):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_arguments(**arguments)


def test_unknown_implementation():
    q, k, v = arrays(Shape(T=2, H=1, G=1, K=4))
    with pytest.raises(ValueError, match="chunked"):
        attention(q, k, v, implementation="chuncked")
    with pytest.raises(ValueError, match="window=0"):
        attention(q, k, v, window=0)
    with pytest.raises(ValueError, match="'cudnn': attention by cuDNN needs an NVIDIA GPU, and this is cpu"):
        attention(q, k, v, implementation="cudnn")
