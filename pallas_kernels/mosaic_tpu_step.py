"""One token of a recurrence with a matrix for a state on a TPU: the state is read once, and written once in its place.

    u = a S          S <- diag(keep) S + b u^T + k v^T          o = read S + own_u u + own_v v

Linear attention and the delta rule are of this form, with what is read of the new state put as what is read of the old.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.mosaic_tpu_chunks import VMEM_LIMIT

SUBLANES = 8
UNROLL = 1
A, READ, B, K, KEEP, OWN_U, OWN_V = range(7)


def step(
    state: Float[Array, "B H K V"],
    read: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    keep: Float[Array, "B H K"],
    own: Float[Array, "B H"],
    delta: tuple[Float[Array, "B H K"], Float[Array, "B H K"], Float[Array, "B H"]] | None = None,
) -> tuple[Float[Array, "B H K V"], Float[Array, "B H V"]]:
    """(the new state, o), all in float32. delta: a, b and own_u; None: b is 0."""
    batch, heads, width, values = state.shape
    zero = jnp.zeros_like(k)
    a, b, own_u = (zero, zero, jnp.zeros_like(own)) if delta is None else delta
    own_u, own = (jnp.broadcast_to(x[..., None], k.shape) for x in (own_u, own))
    rows = jnp.stack([a, read, b, k, keep, own_u, own, zero], axis=2)
    count = _heads(heads)
    of_heads = pl.BlockSpec((None, count, values), lambda b, h: (b, h, 0))
    of_states = pl.BlockSpec((None, count, width, values), lambda b, h: (b, h, 0, 0))
    return pl.pallas_call(
        functools.partial(_kernel, delta is not None),
        grid=(batch, heads // count),
        in_specs=[of_states, pl.BlockSpec((None, count, SUBLANES, width), lambda b, h: (b, h, 0, 0)), of_heads],
        out_specs=[of_states, of_heads],
        out_shape=[jax.ShapeDtypeStruct(state.shape, jnp.float32), jax.ShapeDtypeStruct(v.shape, jnp.float32)],
        input_output_aliases={0: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name="recurrence_step",
    )(state, rows, v)


def unfit(heads: int, width: int, values: int) -> str | None:
    """None, or why a token's states do not fit: those of a block are in fast memory twice as read, twice as written."""
    count, size = _heads(heads), 4 * width * values
    if 4 * count * size <= VMEM_LIMIT:
        return None
    return (
        f"by Mosaic TPU works on one token of {count} heads at once, here with a state of {width} x {values} each, of "
        f"which {VMEM_LIMIT // (4 * size)} would fit"
    )


def _heads(heads: int) -> int:
    """Of a block: 8, or all where they cannot be parted so."""
    return heads if heads % SUBLANES else SUBLANES


def _kernel(delta, state, rows, v, new, o):
    def of_head(head, _):
        old, vectors, value = state[head], rows[head], v[pl.ds(head, 1)]
        columns = vectors.T

        def column(row):
            return columns[:, row : row + 1]

        def scalar(row):
            return vectors[row : row + 1, :1]

        out = jnp.sum(column(READ) * old, axis=0, keepdims=True) + scalar(OWN_V) * value
        now = column(KEEP) * old + column(K) * value
        if delta:
            u = jnp.sum(column(A) * old, axis=0, keepdims=True)
            out, now = out + scalar(OWN_U) * u, now + column(B) * u
        o[pl.ds(head, 1)] = out
        new[head] = now

    # A loop: written out for all heads the compiler takes them up at once and runs out of registers.
    jax.lax.fori_loop(0, state.shape[0], of_head, None, unroll=UNROLL)
