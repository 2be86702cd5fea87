"""The public `attention`: what it computes, checks of its arguments, choice of an implementation."""

import math
import numbers

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import devices, dispatch
from pallas_kernels.attention import chunked, cudnn, mosaic_gpu, mosaic_tpu, reference
from pallas_kernels.attention.options import Options
from pallas_kernels.attention.tiles import Index
from pallas_kernels.mesh import Axes
from pallas_kernels.segments import document_index

IMPLEMENTATIONS = {
    "chunked": chunked, "reference": reference, "cudnn": cudnn, "mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu
}  # fmt: skip

# What is taken on a platform: the first that supports the call. cuDNN goes before our kernels, which have not been timed.
PREFERRED = {"cpu": ("chunked",), "gpu": ("cudnn", "mosaic_gpu", "chunked"), "tpu": ("mosaic_tpu", "chunked")}

# Of what an implementation is given (q, k, v, slopes, index, options), and gives. Every part of the index has rows first.
AXES = Axes("BTHK", "BSGK", "BSGV", "H", "B", "", results=("BTHV", "BTH"))


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"] | None,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Float[Array, "H"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    q_positions: Int[Array, "B T"] | Int[Array, "T"] | None = None,
    kv_positions: Int[Array, "B S"] | Int[Array, "S"] | None = None,
    block_mask: Bool[Array, "B M N"] | Bool[Array, "M N"] | None = None,
    block_size: tuple[int, int] | None = None,
    value_width: int | None = None,
    return_logsumexp: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Softmax attention (arXiv 1706.03762, equation 1) of H query heads over G key-value heads (arXiv 2305.13245).

        s[t, h, s'] = scale q[t, h] . k[s', h // (H / G)]        then soft_cap tanh(s / soft_cap), if a cap is given
                      - alibi_slopes[h] (query position - key position)          if slopes are given
        o[t, h]     = sum over the keys s' that t sees of softmax(s)[s'] v[s', h // (H / G)]

    A query sees a key of its own document whose distance, query position - key position, is not below 0 (if
    `causal`) and is below `window` (if given: so many tokens, its own among them), in a block of keys that the block
    mask shows to it (if given). A query that is padding, or sees nothing, gives exactly 0 and passes no gradient.
    What stands in padding and in empty slots has to be finite: 0 times NaN is NaN.

    q, k, v: any float dtypes; k and v have one. Scores, softmax and sums are in float32 (in float64 if q is).
    v: None: the values are the first `value_width` channels of the keys, read once (the latent cache of multi-head
        latent attention, arXiv 2405.04434).
    scale: None is K ** -0.5.
    alibi_slopes: float `[H]` of any sign: ALiBi (arXiv 2108.12409, section 3). Constants: no gradient flows to them.
    segment_ids: None: one document without padding. Without `kv_segment_ids` (then S must be T, and keys and
        queries are the same tokens) they are read as in `pallas_kernels.segments`: 0 is padding, and an id that
        comes back after another one is a new document, so 1, 2, 1 are three documents.
    kv_segment_ids: ids of the keys (a cache and what follows it), 0 for an empty slot. Then ids are compared as
        they are: equal ids other than 0 are one document, wherever they stand (any int32 but -2**31, which the kernels
        keep for themselves). Needs `segment_ids` too.
    q_positions, kv_positions: int32 between -2**30 and 2**30; None counts the keys 0 .. S - 1 and takes the queries for
        the last T of them.
    block_mask: bool, of M = ceil(T / block_size[0]) blocks of queries by N = ceil(S / block_size[1]) blocks of keys:
        which blocks see which, beside all else. Tiles in other blocks are not visited.
    return_logsumexp: whether the logarithm of each softmax's sum, float32 `[B, T, H]`, is returned after o: -inf where
        nothing is seen. With it `merge` puts together attention to parts of the keys.
    implementation: a name of `IMPLEMENTATIONS`: obeyed, or refused with the reason. None: the fastest known one that
        supports the call on this device.

    Returns o in q's dtype. Differentiable in q, k and v (through the log-sum-exp too). Memory: that of a few million
    scores beside inputs and outputs, forward and backward, and a list of tiles, at most one for each 512 x 512 tokens of a
    row (for T = 1: one row of scores).

    Raises: ValueError for shapes or dtypes that do not agree, heads that do not divide, options that are not
    positive, and an implementation that is unknown or does not support the call.
    """
    check_arguments(
        q, k, v, window, scale, soft_cap, segment_ids, kv_segment_ids, q_positions, kv_positions, alibi_slopes,
        block_mask, block_size, value_width,
    )  # fmt: skip
    given = (segment_ids, q_positions, kv_positions, block_mask)
    options = Options(
        causal=causal,
        # Positions lie within 2^30 of 0: their difference less a larger window would leave int32.
        window=None if window is None else min(int(window), 2**30),
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        soft_cap=None if soft_cap is None else float(soft_cap),
        value_width=value_width,
        block_size=None if block_size is None else tuple(block_size),
        plain=all(array is None for array in given),
        with_logsumexp=return_logsumexp,
    )
    index = _index(q, k, segment_ids, kv_segment_ids, q_positions, kv_positions, block_mask)
    slopes = None if alibi_slopes is None else jax.lax.stop_gradient(alibi_slopes)
    call = q, k, v, slopes, index, options

    candidates = PREFERRED.get(devices.current().platform, ("chunked",))
    o, logsumexp = dispatch.call("attention", IMPLEMENTATIONS, implementation, candidates, AXES, *call)
    return (o, logsumexp) if return_logsumexp else o


def _index(q, k, segment_ids, kv_segment_ids, q_positions, kv_positions, block_mask) -> Index:
    """With every default filled in; the first axis is 1 where all rows are alike."""
    length, kv_length = q.shape[1], k.shape[1]
    if segment_ids is None:
        segment_ids, kv_segment_ids = (jnp.ones((1, n), jnp.int32) for n in (length, kv_length))
    elif kv_segment_ids is None:
        document, valid = document_index(segment_ids)
        segment_ids = kv_segment_ids = jnp.where(valid, document + 1, 0)
    if kv_positions is None:
        kv_positions = jnp.arange(kv_length, dtype=jnp.int32)
    if q_positions is None:
        q_positions = jnp.arange(kv_length - length, kv_length, dtype=jnp.int32)
    arrays = [a.astype(jnp.int32) for a in (segment_ids, kv_segment_ids, q_positions, kv_positions)]
    arrays = [a if a.ndim == 2 else a[None] for a in arrays]
    if block_mask is not None:
        arrays.append(block_mask if block_mask.ndim == 3 else block_mask[None])
    rows = max(a.shape[0] for a in arrays)
    return Index(*(jnp.broadcast_to(a, (rows, *a.shape[1:])) for a in arrays))


def check_arguments(
    q, k, v, window=None, scale=None, soft_cap=None, segment_ids=None, kv_segment_ids=None,
    q_positions=None, kv_positions=None, alibi_slopes=None, block_mask=None, block_size=None, value_width=None,
) -> None:  # fmt: skip
    """Raises the ValueErrors of `attention`."""
    if (v is None) != (value_width is not None):
        raise ValueError(
            f"value_width={value_width!r} {'without' if v is None else 'beside'} v: expected the values v, or v=None "
            "and how many channels of the keys are the values"
        )
    if v is None and not (isinstance(value_width, numbers.Integral) and 0 < value_width <= k.shape[-1]):
        raise ValueError(f"value_width={value_width!r}: expected 1 to {k.shape[-1]}, the width of the keys")
    v = k[..., :value_width] if v is None else v
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4 or 0 in array.shape:
            raise ValueError(f"{name}: shape {array.shape}; expected 4 axes, none empty: [batch, tokens, heads, width]")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name}: dtype {array.dtype}; expected a float dtype")
    if k.dtype != v.dtype:
        raise ValueError(f"v: dtype {v.dtype} beside k {k.dtype}; expected one dtype: cast one of them")
    batch, length, heads, width = q.shape
    kv_length, kv_heads = k.shape[1], k.shape[2]
    if k.shape != (batch, kv_length, kv_heads, width):
        raise ValueError(f"k: shape {k.shape}; expected [{batch}, S, G, {width}] beside q {q.shape}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: shape {v.shape}; expected {list(k.shape[:3])} and a width, beside k {k.shape}")
    if heads % kv_heads:
        raise ValueError(f"k: {kv_heads} heads, which do not divide the {heads} heads of q; expected a divisor")
    for name, number in (("window", window), ("scale", scale), ("soft_cap", soft_cap)):
        if number is None:
            continue
        if not isinstance(number, numbers.Real) or isinstance(number, bool) or not 0 < number < math.inf:
            raise ValueError(f"{name}={number!r}: expected a number above 0, known when the call is traced, or None")
    if window is not None and window != int(window):
        raise ValueError(f"window={window!r}: expected a whole number of tokens")
    if alibi_slopes is not None:
        if not jnp.issubdtype(alibi_slopes.dtype, jnp.floating):
            raise ValueError(f"alibi_slopes: dtype {alibi_slopes.dtype}; expected a float dtype")
        if alibi_slopes.shape != (heads,):
            raise ValueError(f"alibi_slopes: shape {alibi_slopes.shape}; expected ({heads},), one for each head of q")

    if segment_ids is None and kv_segment_ids is not None:
        raise ValueError("segment_ids=None with kv_segment_ids given; expected the ids of the queries too")
    if segment_ids is not None and kv_segment_ids is None and kv_length != length:
        raise ValueError(
            f"kv_segment_ids=None with {length} queries and {kv_length} keys; expected the ids of the keys too, "
            "since they are not those of the queries"
        )
    _check_blocks(block_mask, block_size, batch, length, kv_length)
    of_queries, of_keys = (batch, length), (batch, kv_length)
    for name, array, shape, bare in (
        ("segment_ids", segment_ids, of_queries, False),
        ("kv_segment_ids", kv_segment_ids, of_keys, False),
        ("q_positions", q_positions, of_queries, True),
        ("kv_positions", kv_positions, of_keys, True),
    ):
        if array is None:
            continue
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name}: dtype {array.dtype}; expected int32")
        if array.shape != shape and not (bare and array.shape == shape[1:]):
            either = f"{shape} or {shape[1:]}" if bare else f"{shape}"
            raise ValueError(f"{name}: shape {array.shape}; expected {either} beside q {q.shape} and k {k.shape}")


def _check_blocks(block_mask, block_size, batch, length, kv_length) -> None:
    if (block_mask is None) != (block_size is None):
        raise ValueError(
            f"block_size={block_size!r} {'beside no' if block_mask is None else 'beside a'} block_mask: expected both, "
            "the mask and how many queries and keys a block has, or neither"
        )
    if block_mask is None:
        return
    if not isinstance(block_size, tuple | list) or len(block_size) != 2 or not all(isinstance(n, numbers.Integral) and n > 0 for n in block_size):
        raise ValueError(f"block_size={block_size!r}: expected two numbers of tokens above 0, of queries and of keys")
    blocks = math.ceil(length / block_size[0]), math.ceil(kv_length / block_size[1])
    if block_mask.dtype != bool:
        raise ValueError(f"block_mask: dtype {block_mask.dtype}; expected bool")
    if block_mask.shape not in (blocks, (batch, *blocks)):
        raise ValueError(
            f"block_mask: shape {block_mask.shape}; expected {(batch, *blocks)} or {blocks}: blocks of {block_size} in "
            f"{length} queries and {kv_length} keys"
        )
