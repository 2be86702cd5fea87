"""One token of linear attention (decoding) on a Hopper GPU: the state is read once and written once, in place.

All that counts is the memory's speed, so there is no shared memory and no product of matrices: a block holds a slice of
the state of one head in registers, where it decays it, adds k v^T and sums up what q reads.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu_products as products
from pallas_kernels.linear_attention.reference import step, token_inputs
from pallas_kernels.mosaic_gpu_states import COMPILER
from pallas_kernels.segments import document_starts

SLICE = 64  # of V


def attend(q, k, v, log_decay, state, segment_ids, scale, bonus):
    """See `mosaic_gpu.run`, for T = 1; the state is float32."""
    starts, valid = (None, None) if segment_ids is None else document_starts(segment_ids)
    tokens = token_inputs(q, k, v, log_decay, starts, valid, scale, bonus)
    state, o = _step(state, *jax.tree.map(lambda x: x[:, 0], tokens))
    return o[:, None].astype(v.dtype), state


@jax.custom_vjp
def _step(state, q, k, v, keep, valid, own):
    """`reference.step`."""
    if valid is not None:  # padding neither decays the state nor adds to it, and reads nothing
        zero = jnp.float32(0)
        keep = jnp.where(valid[:, None, None], keep, jnp.float32(1))
        q, k = (jnp.where(valid[:, None, None], x, zero) for x in (q, k))
        own = None if own is None else jnp.where(valid[:, None], own, zero)
    state, o = _kernel(own is not None, state, q, k, v, jnp.broadcast_to(keep, k.shape))
    return state, o if own is None else o + own[:, :, None] * v


def _forward(*arguments):
    return _step(*arguments), arguments


def _backward(arguments, cotangents):
    return jax.vjp(step, *arguments)[1](cotangents)


_step.defvjp(_forward, _backward)


def _kernel(exclusive, state, q, k, v, keep):
    """The state after the token, and what q reads of it, or of the one before if exclusive; all float32."""
    batch, heads, width, value_width = state.shape

    def linear_attention_step(state, q, k, v, keep, o):
        row, head, slice = (lax.axis_index(name) for name in ("row", "head", "slice"))
        of_lines = functools.partial(plgpu.load, layout=products.PER_LINE)
        shape = products.LINES, SLICE

        def lines(array, start):
            x = of_lines(array.at[row, head, pl.ds(start, products.LINES)])
            return products.along_lines(x, shape)

        value = plgpu.load(v.at[row, head, slice], layout=products.PER_COLUMN)
        out = products.zeros(SLICE, layout=products.PER_COLUMN)
        for start in range(0, width, products.LINES):
            place = state.at[row, head, pl.ds(start, products.LINES), slice]
            before = plgpu.load(place, layout=products.MATRIX)
            after = before * lines(keep, start) + lines(k, start) * products.along_columns(value, shape)
            place[...] = after
            out = out + (lines(q, start) * (before if exclusive else after)).sum(axis=0)
        o[row, head, slice] = out

    slices = value_width // SLICE
    run = plgpu.kernel(
        linear_attention_step,
        out_type=jax.ShapeDtypeStruct((batch, heads, slices, SLICE), jnp.float32),
        grid=(batch, heads, slices),
        grid_names=("row", "head", "slice"),
        compiler_params=COMPILER,
    )
    reference = jax.new_ref(state.reshape(batch, heads, width, slices, SLICE))
    o = run(reference, q, k, v.reshape(batch, heads, slices, SLICE), keep)
    return jax.freeze(reference).reshape(state.shape), o.reshape(batch, heads, value_width)
