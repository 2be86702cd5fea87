"""The delta rule on a TPU by Pallas kernels (Mosaic), forward and backward: `chunked`'s formulas (arXiv 2406.06484
section 3.2, 2412.06464 section 3.3) in bfloat16 products for bfloat16 inputs, in full precision for float32.

`mosaic_tpu_chunks` makes the kernels of a chunk: `mosaic_tpu_scalar`, with one decay a head or none, or
`mosaic_tpu_vector`, with one a channel. One token goes to `mosaic_tpu_step`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import devices, mosaic_tpu_step
from pallas_kernels.delta_rule import chunked
from pallas_kernels.delta_rule.mosaic_tpu_scalar import Scalar
from pallas_kernels.delta_rule.mosaic_tpu_tables import rows_of_tokens
from pallas_kernels.delta_rule.mosaic_tpu_vector import PACKS, Vector
from pallas_kernels.delta_rule.reference import first_state, mark_documents
from pallas_kernels.linear_attention.reference import as_log_decay
from pallas_kernels.mosaic_tpu_chunks import LANES, Plan, divisor, scan_chunks
from pallas_kernels.mosaic_tpu_packs import narrow_pack, unfit

CHUNK = 64  # two of them fill the lanes
AT_ONCE = 8  # heads that one step of the grid works on at most, so that they need not wait for their products
STATES = 8 * 256 * 512 * 2  # bytes of their states in the inputs' dtype, at most; a step takes some ten times that


def supports(q, k, v, a, b, log_decay, initial_state, segment_ids, scale) -> str | None:
    """None, or what about the call is not supported."""
    platform = devices.current().platform
    if platform != "tpu":
        return f"by Mosaic TPU needs a TPU, and this is {platform}"
    if q.dtype not in ("bfloat16", "float32"):
        return f"by Mosaic TPU is for bfloat16 or float32, and q is {q.dtype}"
    sizes = v.shape[2], q.shape[3], v.shape[3]
    return mosaic_tpu_step.unfit(*sizes) if q.shape[1] == 1 else unfit(narrow_pack(*sizes))


def run(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None,
    initial_state: Float[Array, "B H K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """See `delta_rule`. Any T: what is left over of whole chunks is filled up with tokens that change nothing."""
    batch, length, heads, _ = v.shape
    if length == 1:
        return _step(scale, q, k, v, a, b, log_decay, initial_state, segment_ids)
    chunk = CHUNK
    state = first_state(q, v, initial_state)
    decay = "vector" if log_decay is not None and log_decay.ndim == 4 else "scalar"
    if log_decay is None and segment_ids is None:
        decay = "none"
    tokens = mark_documents(q, k, v, a, b, log_decay, segment_ids)
    pack = narrow_pack(heads, q.shape[3], v.shape[3])

    def flat(x):
        x = x.reshape(batch, length, -1)
        return jnp.pad(x, ((0, 0), (0, -length % chunk), (0, 0)))

    packs, rows = heads // pack.heads, None
    if decay == "scalar":
        gates = flat(as_log_decay(tokens.log_decay, np.dtype(np.float32)))
        rows = rows_of_tokens(gates, chunk, pack.heads, q.dtype)
    if decay != "vector":
        tokens = tokens._replace(log_decay=None)
    tokens = jax.tree.map(flat, tokens)
    if decay == "vector":
        body = Vector(pack, scale, q.dtype)
        at_once = 1 if pack.keys % LANES or pack.values % LANES else divisor(packs, PACKS)
    else:
        most = min(AT_ONCE // pack.heads, STATES // (pack.keys * pack.values * q.dtype.itemsize))
        body, at_once = Scalar(pack, decay, scale, q.dtype), divisor(packs, max(most, 1))
    plan = Plan(chunk, packs, (packs,) * len(jax.tree.leaves(tokens)), at_once, keep=q.dtype)
    state, o = scan_chunks(body, plan, None, pack.join_states(state), tokens, rows)
    return o[:, :length].reshape(v.shape), pack.part_states(state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _step(scale, q, k, v, a, b, log_decay, initial_state, segment_ids):
    """One token; its gradients are those of `chunked`."""
    tokens = mark_documents(q, k, v, a, b, log_decay, segment_ids)
    q, k, value, a, b, log_decay = (x[:, 0].astype(jnp.float32) for x in tokens)
    q = q * scale
    keep = jnp.broadcast_to(jnp.exp(log_decay), k.shape)
    own, own_u = jnp.sum(q * k, axis=-1), jnp.sum(q * b, axis=-1)
    state = first_state(tokens.q, v, initial_state)
    state, o = mosaic_tpu_step.step(state, q * keep, k, value, keep, own, (a, b, own_u))
    return o[:, None].astype(v.dtype), state


def _step_fwd(scale, *arguments):
    return _step(scale, *arguments), arguments


def _step_bwd(scale, arguments, cotangents):
    *floats, segment_ids = arguments
    _, pull = jax.vjp(lambda *floats: chunked.run(*floats, segment_ids, scale), *floats)
    none = None if segment_ids is None else np.zeros(segment_ids.shape, jax.dtypes.float0)
    return *pull(cotangents), none


_step.defvjp(_step_fwd, _step_bwd)
