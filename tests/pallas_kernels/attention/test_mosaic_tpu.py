"""The TPU's kernels, simulated: memory spaces, copies and semaphores, with races looked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_calls import arrays, out_and_gradients
from attention_suite import AttentionSuite, assert_conforms
from numpy_programs import evaluated, traced
from pallas_kernels import devices
from pallas_kernels.attention import attention, conformance, mosaic_tpu, mosaic_tpu_pairs
from pallas_kernels.attention.mosaic_tpu_stream import plans
from pallas_kernels.attention.shapes import Shape
from pallas_kernels.attention.tiles import Order
from pallas_kernels.tolerances import assert_close

simulated = functools.partial(devices.interpreting, "tpu", detect_races=True)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """128 to a side, so that the cases have many; others backward, so that nothing hangs on their being equal."""
    monkeypatch.setattr(mosaic_tpu, "FORWARD", (128, 128))
    monkeypatch.setattr(mosaic_tpu, "BACKWARD", (128, 256))
    monkeypatch.setattr(mosaic_tpu, "HEAVIEST", (128, 256))
    monkeypatch.setattr(mosaic_tpu, "OUTER", 2 * 256 * 128)


class TestMosaicTPU(AttentionSuite):
    implementation = "mosaic_tpu"
    program = staticmethod(traced)
    dtypes = (jnp.float32,)
    run_twice = frozenset({"ragged, grouped", "packed, window", "decode"})

    def device(self):
        return simulated()


@pytest.mark.parametrize("name", ["full", "packed, window", "alibi", "latent prefill"])
def test_in_stages(name, monkeypatch):
    """As on a v6e: two halves of a tile in turns, in three stages, and dk and dv turned."""
    for decision in ("_goes_in_stages", "_gathers_turned"):
        monkeypatch.setattr(mosaic_tpu, decision, lambda q, options: True)
    for sizes in ("IN_STAGES", "IN_STAGES_MASKED_TWICE"):
        monkeypatch.setattr(mosaic_tpu, sizes, (256, 128))
    monkeypatch.setattr(mosaic_tpu, "LEAST_IN_STAGES", 0)
    with simulated():
        assert_conforms(conformance.CASES[name], "mosaic_tpu", jnp.float32, traced)


def test_groups_of_heads_that_whole_registers_hold_only_in_large_tiles(monkeypatch):
    """They are filled up: here 3 to 4, with 128 rows instead of 384."""
    monkeypatch.setattr(mosaic_tpu, "MOST_ROWS", 256)
    with simulated():
        case = conformance.Case(shape=Shape(B=2, T=150, H=6, G=2, K=64), rows="packed", alibi=True)
        assert_conforms(case, "mosaic_tpu", jnp.float32, traced)


def test_bfloat16():
    shape = Shape(T=200, S=300, H=4, G=2, K=64, V=128)
    qkv = arrays(shape)
    exact, exact_gradients = out_and_gradients("reference", *qkv)
    with simulated():
        o, gradients = out_and_gradients("mosaic_tpu", *(a.astype(jnp.bfloat16) for a in qkv))
    assert o.dtype == gradients[0].dtype == jnp.bfloat16
    assert_close(o.astype(jnp.float32), exact, "bfloat16")
    assert_close([g.astype(jnp.float32) for g in gradients], list(exact_gradients), "bfloat16 gradient")


def test_tiles_not_listed_are_never_read():
    """NaN in a tile that is masked, rather than skipped, would reach outputs and gradients (0 x NaN)."""
    q, k, v = arrays(Shape(T=512, H=1, G=1, K=64))
    ids = jnp.asarray(np.repeat([[1, 2]], 256, axis=1), jnp.int32)
    cotangent = jnp.zeros_like(q).at[:, 256:384].set(1.0)  # of queries that neither see the first document nor the end

    def looked_at(k, v):
        with simulated():
            o, (dq, _, _) = out_and_gradients("mosaic_tpu", q, k, v, cotangent, segment_ids=ids)
        return o[:, 256:384], dq[:, 256:384]

    poisoned = [a.at[:, :256].set(jnp.nan) for a in (k, v)]
    assert_close(looked_at(*poisoned), looked_at(k, v), "exact")


def test_a_plan_names_the_tile_that_comes_after():
    """The last entry of a row is the first tile of the next row that has any."""
    order = Order(
        tiles=jnp.asarray([[[2, 0, 1], [0, 1, 2], [1, 2, 0], [2, 1, 0]]], jnp.int32),
        unmasked=jnp.asarray([[0, 0, 1, 0]], jnp.int32),
        visited=jnp.asarray([[1, 0, 3, 0]], jnp.int32),
    )
    rows = plans(order)[0, :, 0].tolist()
    assert rows == [[0, 1, 2, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 3, 1, 2, 0, -1], [0, 0, -1, -1, -1, -1]]


def test_pairs_of_an_outer_tile_are_sorted_by_queries():
    """Each tile of queries is named once for an outer tile, and its pairs follow one another."""
    active = jnp.asarray([[[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 1]]], bool)
    first, second = mosaic_tpu_pairs.plans(active, together=2)[0, :, 0].tolist()
    assert first[:6] == [4, 3, 0, 1, 3, 3]  # pairs, runs, their queries, those of the next outer tile
    assert first[7:11] == [2 * 0 + 0, 2 * 1 + 0, 2 * 1 + 1, 2 * 2 + 1]
    assert second[:4] == [1, 1, 3, -1]
    assert second[7:8] == [2 * 0 + 0]


def test_pairs_of_an_outer_tile_in_pages(monkeypatch):
    """Of two tiles of queries each: a row is at most as long as said, and names the tile that comes after it."""
    monkeypatch.setattr(mosaic_tpu_pairs, "MOST", 3 + 2 * 3)
    active = jnp.asarray([[[1, 0, 0], [1, 1, 0], [0, 1, 1]]], bool)
    rows = mosaic_tpu_pairs.plans(active, together=2)[0, :, 0].tolist()
    assert [row[:2] for row in rows] == [[3, 2], [1, 1], [0, 0], [1, 1]]  # pairs, runs
    assert [row[2:5] for row in rows] == [[0, 1, 2], [2, 2, 2], [2, 2, 2], [2, -1, -1]]
    assert (rows[0][5:8], rows[1][5], rows[3][5]) == ([0, 2, 3], 1, 0)


@pytest.mark.parametrize("most", [mosaic_tpu_pairs.MOST, 3 + 3 * 3])
def test_outer_tiles_of_several_tiles_of_keys(most, monkeypatch):
    """Two, and one in the last outer tile; all tiles of queries in a row of the plan, or three."""
    monkeypatch.setattr(mosaic_tpu_pairs, "MOST", most)
    rows, backward = [], mosaic_tpu.backward

    def looked_at(rules, turned, together, plans, queries, keys, *rest):
        rows.append((together, queries.shape[2], keys.shape[2], plans.shape[1]))
        return backward(rules, turned, together, plans, queries, keys, *rest)

    monkeypatch.setattr(mosaic_tpu, "backward", looked_at)
    case = conformance.Case(shape=Shape(B=2, T=640, H=2, G=1, K=64, window=300), rows="packed")
    with simulated():
        assert_conforms(case, "mosaic_tpu", jnp.float32, traced)
    assert rows == [(2, 10, 3, 2 if most > 100 else 8)]


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("float16", {"dtype": jnp.float16}),
        ("multiples of 128", {"block_size": (64, 64)}),
    ],
)
def test_says_what_it_does_not_support(reason, change):
    q, k, v = (a.astype(change.get("dtype", jnp.float32)) for a in arrays(Shape(T=128, H=1, G=1, K=64)))
    blocks = {}
    if "block_size" in change:
        blocks = {"block_size": change["block_size"], "block_mask": jnp.ones((2, 2), bool)}
    with simulated(), pytest.raises(ValueError, match=reason):
        attention(q, k, v, implementation="mosaic_tpu", **blocks)
    with pytest.raises(ValueError, match="needs a TPU"):
        attention(q, k, v, implementation="mosaic_tpu", **blocks)
    jax.eval_shape(functools.partial(attention, **blocks), q, k, v)  # by default another one is taken


@pytest.mark.parametrize("document", [2**29, -(2**28), 2**31 - 1])
def test_decoding_takes_any_number_of_a_document(document):
    """The heads are told apart by such numbers."""
    q, k, v = arrays(Shape(T=2, S=256, H=8, G=8, K=128, causal=False))
    kv_ids = jnp.where(jnp.arange(256) < 100, document, jnp.where(jnp.arange(256) < 200, 3, 0))[None]
    ids = jnp.asarray([[document, 3]], jnp.int32)
    options = {"segment_ids": ids, "kv_segment_ids": kv_ids.astype(jnp.int32), "causal": False}
    expected = attention(q, k, v, implementation="reference", **options)
    with devices.interpreting("tpu"):
        found = evaluated(lambda q, k, v: attention(q, k, v, implementation="mosaic_tpu", **options))(q, k, v)
    assert_close(found, expected, "float32")


@pytest.mark.parametrize("window", [2**31 - 1, 2**40])
def test_windows_of_any_size(window):
    """Positions before 0, of more queries than keys, less the window stay in int32."""
    q, k, v = arrays(Shape(T=12, S=8, H=1, G=1, K=64))
    options = {"window": window, "causal": False}
    with simulated():
        found = evaluated(lambda *qkv: attention(*qkv, **options, implementation="mosaic_tpu"))(q, k, v)
    expected = evaluated(lambda *qkv: attention(*qkv, **options, implementation="reference"))(q, k, v)
    assert_close(found, expected, "float32")


def test_decoding_with_more_tiles_than_scalar_memory_holds_is_refused():
    q, k = (jax.ShapeDtypeStruct((1, n, 32, 128), jnp.bfloat16) for n in (1, 2**20))
    with simulated(), pytest.raises(ValueError, match="1 of 1048576 keys and 32 heads"):
        jax.eval_shape(lambda q, k: attention(q, k, k, implementation="mosaic_tpu"), q, k)
