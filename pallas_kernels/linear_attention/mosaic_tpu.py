"""Linear attention on a TPU by Pallas kernels (Mosaic), forward and backward: `chunked`'s formulas in bfloat16 products
for bfloat16 inputs, in full precision for float32.

`mosaic_tpu_chunks` walks through the chunks, of which each is worked on by `mosaic_tpu_scalar` (one decay a head;
RetNet, arXiv 2307.08621, Mamba-2, arXiv 2405.21060) or `mosaic_tpu_vector` (one a channel; gated linear attention,
arXiv 2312.06635, RWKV-6, arXiv 2404.05892). One token goes to `mosaic_tpu_step`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import devices, mosaic_tpu_step
from pallas_kernels.linear_attention import chunked
from pallas_kernels.linear_attention import mosaic_tpu_scalar as scalars
from pallas_kernels.linear_attention import mosaic_tpu_vector as vectors
from pallas_kernels.linear_attention.mosaic_tpu_scalar_decays import fixed_of_heads, rows_of_tokens
from pallas_kernels.linear_attention.reference import as_log_decay, empty_state, for_each_head, token_inputs
from pallas_kernels.mosaic_tpu_chunks import LANES, Plan, divisor, scan_chunks
from pallas_kernels.mosaic_tpu_packs import Pack, narrow_pack, unfit
from pallas_kernels.segments import document_starts

CHUNK = 128  # tokens of one; bundles of 256, for heads of 256 and 512, are within 3% of it
NARROW_CHUNK = 64  # where channels have their own decays, and heads are narrower than the lanes
AT_ONCE = 512  # tokens, of all packs of heads that one step of the grid works on
VECTOR_AT_ONCE = 256  # the same, where channels have their own decays
STATES = 4 * 256 * 512 * 2  # bytes of their states in the inputs' dtype, at most
SHARED = 2048  # lanes of values that a pack of heads with the same keys has at most


def supports(q, k, v, log_decay, initial_state, segment_ids, scale, bonus=None) -> str | None:
    """None, or what about the call is not supported."""
    platform = devices.current().platform
    if platform != "tpu":
        return f"by Mosaic TPU needs a TPU, and this is {platform}"
    if q.dtype not in ("bfloat16", "float32"):
        return f"by Mosaic TPU is for bfloat16 or float32, and q is {q.dtype}"
    vector = log_decay is not None and log_decay.ndim == 4
    if q.shape[1] == 1:
        return mosaic_tpu_step.unfit(v.shape[2], q.shape[3], v.shape[3])
    return unfit(_pack(q, v, vector or bonus is not None))


def run(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H K"] | Float[Array, "B T H"] | Float[Array, "H"] | None,
    initial_state: Float[Array, "B H K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    bonus: Float[Array, "H K"] | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """See `linear_attention`. Any T: what is left over of whole chunks is filled up with tokens that change nothing."""
    batch, length, heads, _ = v.shape
    if length == 1:
        return _step(scale, q, k, v, log_decay, initial_state, segment_ids, bonus)
    exclusive, starts = bonus is not None, None
    state = empty_state(q, v) if initial_state is None else initial_state.astype(jnp.float32)
    vector = log_decay is not None and log_decay.ndim == 4
    chunk = NARROW_CHUNK if vector and q.shape[3] < LANES else CHUNK
    missing = -length % chunk
    if not vector and log_decay is not None:
        log_decay = as_log_decay(log_decay, np.dtype(np.float32))
    if segment_ids is not None or (missing and not vector and log_decay is not None):
        # No decay in padding, so that one a head will not do
        log_decay = jnp.zeros(heads) if log_decay is None else log_decay
        log_decay = log_decay if vector else jnp.broadcast_to(log_decay, v.shape[:3])
    if segment_ids is not None:
        starts, valid = document_starts(segment_ids)
        nothing = jnp.full((), -jnp.inf, log_decay.dtype)
        nothing = nothing if vector else as_log_decay(nothing, np.dtype(np.float32))
        log_decay = _where(valid, jnp.where(_like(starts, log_decay), nothing, log_decay))
        starts = starts if exclusive else None

    def fill(x):
        if x is None or missing == 0 or x.ndim == 1:
            return x
        return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))

    q, k, v, log_decay, starts = (fill(x) for x in (q, k, v, log_decay, starts))
    pack = _pack(q, v, vector or exclusive)
    if q.shape[2] < heads and not pack.shared:
        q, k = for_each_head(q, heads), for_each_head(k, heads)
    packs = heads // pack.heads
    parts = q.shape[2] if pack.shared else packs
    if bonus is not None:
        bonus = bonus.astype(jnp.float32).reshape(packs, 1, -1)
    if vector:
        body = vectors.Vector(pack, scale, exclusive, q.dtype)
        fixed, tokens, parts = bonus, vectors.Tokens(q, k, v, log_decay), (parts, parts, packs, packs)
        rows = None if starts is None else vectors.rows_of_tokens(starts, chunk, packs)
    else:
        decay = "none" if log_decay is None else "head" if log_decay.ndim == 1 else "token"
        body = scalars.Chunk(pack, decay, scale, exclusive, np.dtype(q.dtype), chunk)
        fixed, tokens, parts = scalars.Fixed(bonus=bonus), scalars.Tokens(q, k, v), (parts, parts, packs)
        rows = None
        if decay == "head":
            between, wide = fixed_of_heads(log_decay, chunk, pack.heads, exclusive)
            fixed = fixed._replace(between=between, wide=wide)
        if decay == "token":
            rows = rows_of_tokens(log_decay, starts, chunk, pack.heads, exclusive, q.dtype)
    tokens = jax.tree.map(lambda x: x.reshape(*x.shape[:2], -1), tokens)
    most = min((VECTOR_AT_ONCE if vector else AT_ONCE) // chunk, STATES // (pack.keys * pack.values * q.dtype.itemsize))
    at_once = 1 if parts[0] < packs else divisor(packs, max(most, 1))
    plan = Plan(chunk, packs, parts, at_once, keep=q.dtype)
    state, o = scan_chunks(body, plan, fixed, pack.join_states(state), tokens, rows)
    return o.reshape(v.shape)[:, :length], pack.part_states(state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _step(scale, q, k, v, log_decay, initial_state, segment_ids, bonus):
    """One token; its gradients are those of `chunked`."""
    starts, valid = (None, None) if segment_ids is None else document_starts(segment_ids)
    tokens = token_inputs(q, k, v, log_decay, starts, valid, scale, bonus)
    read, k, v_token, keep, valid, own = jax.tree.map(lambda x: x[:, 0], tokens)
    state = empty_state(q, v) if initial_state is None else initial_state.astype(jnp.float32)
    keep = jnp.broadcast_to(keep, k.shape)
    if own is None:  # reads the new state, that is the old one and itself
        read, own = read * keep, jnp.sum(read * k, axis=-1)
    if valid is not None:
        valid = valid[:, None]  # like [B, T]
        read, k, own, keep = (
            _where(valid, x[:, None], other)[:, 0] for x, other in ((read, 0), (k, 0), (own, 0), (keep, 1))
        )
    state, o = mosaic_tpu_step.step(state, read, k, v_token, keep, own)
    return o[:, None].astype(v.dtype), state


def _step_fwd(scale, q, k, v, log_decay, initial_state, segment_ids, bonus):
    arguments = q, k, v, log_decay, initial_state, segment_ids, bonus
    return _step(scale, *arguments), arguments


def _step_bwd(scale, arguments, cotangents):
    *floats, segment_ids, bonus = arguments
    _, pull = jax.vjp(lambda *floats: chunked.run(*floats[:-1], segment_ids, scale, floats[-1]), *floats, bonus)
    *found, of_bonus = pull(cotangents)
    none = None if segment_ids is None else np.zeros(segment_ids.shape, jax.dtypes.float0)
    return *found, none, of_bonus


_step.defvjp(_step_fwd, _step_bwd)


def _pack(q, v, vector):
    """The heads that are worked on together: of those that share keys, as many as SHARED lanes of values hold."""
    (*_, groups, key), (*_, heads, value) = q.shape, v.shape
    if groups < heads and not vector and key % LANES == 0:
        count = heads // groups
        for fewer in range(count, 0, -1):
            if count % fewer == 0 and fewer * value % LANES == 0 and fewer * value <= max(SHARED, value):
                return Pack(fewer, key, value, shared=True)
    return narrow_pack(heads, key, value)


def _like(mask, x):
    return mask.reshape(mask.shape + (1,) * (x.ndim - 2))


def _where(mask, x, other=0):
    return jnp.where(_like(mask, x), x, jnp.asarray(other, x.dtype))
