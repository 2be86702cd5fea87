"""One token of a recurrence with a matrix for a state on a TPU: the state is read once, and written once in its place.

    u = a S          S <- diag(keep) S + b u^T + k v^T          o = read S + own_u u + own_v v

Linear attention and the delta rule are of this form, with what is read of the new state put as what is read of the old one.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.mosaic_tpu_chunks import VMEM_LIMIT, product

SUBLANES = 8
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


def _heads(heads: int) -> int:
    """Of a block: 8, or all where they cannot be parted so."""
    return heads if heads % SUBLANES else SUBLANES


def _kernel(delta, state, rows, v, new, o):
    for head in range(state.shape[0]):
        old, vectors, value = state[head], rows[head], v[head : head + 1]
        columns = vectors.T

        def reads(row, old=old, columns=columns):
            return jnp.sum(columns[:, row : row + 1] * old, axis=0, keepdims=True)

        u = reads(A) if delta else jnp.zeros_like(value)
        own = vectors[OWN_U : OWN_U + 1, :1] * u + vectors[OWN_V : OWN_V + 1, :1] * value
        o[head : head + 1] = reads(READ) + own
        # What is written: rows B and K, the others 0
        place = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, value.shape[1]), 0)
        written = jnp.where(place == B, u, jnp.where(place == K, value, 0.0))
        new[head] = columns[:, KEEP : KEEP + 1] * old + product(vectors, written, (0, 0), jnp.float32)
