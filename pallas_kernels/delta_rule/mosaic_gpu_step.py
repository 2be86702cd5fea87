"""One token, for decoding: the state is read once and written once, where it lies.

A block has 64 channels of the values of one head, and that slice of the state in its registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu_products import MATRIX, PER_COLUMN, PER_LINE, along_columns, along_lines
from pallas_kernels.delta_rule import reference
from pallas_kernels.delta_rule.reference import Tokens

COMPILER = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
SLICE = 64  # channels of values


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def step(
    state: Float[Array, "B H K V"], token: Tokens, scale: float
) -> tuple[Float[Array, "B H K V"], Float[Array, "B H V"]]:
    """See `reference.step`; fields of the token `[B, H, ...]`, the state float32, o in the dtype of the token's v."""
    q, k, v, a, b, log_decay = token
    log_decay = jnp.broadcast_to(log_decay.astype(jnp.float32), q.shape)
    batch, heads, width = q.shape
    inputs = {"q": q, "k": k, "a": a, "b": b, "log_decay": log_decay}

    scratch = dict(
        tiles={name: plgpu.SMEM((width,), x.dtype) for name, x in inputs.items()},
        values=plgpu.SMEM((SLICE,), v.dtype),
        here=plgpu.Barrier(num_arrivals=6),
    )

    def delta_rule_step(*references):
        pl.run_scoped(functools.partial(_block, scale, *references), **scratch)

    run = plgpu.kernel(
        delta_rule_step,
        out_type=jax.ShapeDtypeStruct(v.shape, v.dtype),
        grid=(batch, heads, v.shape[2] // SLICE),
        grid_names=("row", "head", "slice"),
        compiler_params=COMPILER,
    )
    state = jax.new_ref(state)
    o = run(state, v, *inputs.values())
    return jax.freeze(state), o


def _block(scale, state, v, q, k, a, b, log_decay, o, *, tiles, values, here):
    row, head = lax.axis_index("row"), lax.axis_index("head")
    columns = pl.ds(lax.axis_index("slice") * SLICE, SLICE)

    for name, array in {"q": q, "k": k, "a": a, "b": b, "log_decay": log_decay}.items():
        plgpu.copy_gmem_to_smem(array.at[row, head], tiles[name], here)
    plgpu.copy_gmem_to_smem(v.at[row, head, columns], values, here)
    place = state.at[row, head, :, columns]
    before = plgpu.load(place, layout=MATRIX)
    plgpu.barrier_wait(here)

    def of_lines(name):
        return along_lines(plgpu.load(tiles[name], layout=PER_LINE).astype(jnp.float32), before.shape)

    read = (of_lines("a") * before).sum(axis=0)
    value = plgpu.load(values, layout=PER_COLUMN).astype(jnp.float32)
    written = of_lines("b") * along_columns(read, before.shape) + of_lines("k") * along_columns(value, before.shape)
    after = jnp.exp(of_lines("log_decay")) * before + written
    place[...] = after
    values[...] = (scale * (of_lines("q") * after).sum(axis=0)).astype(o.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(values, o.at[row, head, columns])
    plgpu.wait_smem_to_gmem(0)


def _plain(state, token, scale):
    state, o = reference.step(state, token, scale)
    return state, o.astype(token.v.dtype)


def _forward(state, token, scale):
    return step(state, token, scale), (state, token)


def _backward(scale, kept, cotangents):
    return jax.vjp(lambda state, token: _plain(state, token, scale), *kept)[1](cotangents)


step.defvjp(_forward, _backward)
