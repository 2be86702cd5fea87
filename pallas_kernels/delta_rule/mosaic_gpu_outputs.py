"""The outputs of chunks whose tables and states are known, read S + own V, and the way back: all chunks at once.

A block has one chunk of one head and 64 channels of the values; backward, all of these for 64 channels of the keys, or
for `own`.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import devices
from pallas_kernels.mosaic_gpu_products import both_of, matrix, zeros
from pallas_kernels.delta_rule.mosaic_gpu_split import CHUNK, PANEL, SWIZZLE, total, transposed

COMPILER = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


@jax.custom_vjp
def outputs(
    read: Float[Array, "B T H K"],
    own: Float[Array, "B T H C"],
    before: Float[Array, "B n H K V"],
    v: Float[Array, "B T H V"],
) -> Float[Array, "B T H V"]:
    """read S + own V, chunk by chunk, all of one 16-bit dtype. Differentiable once, in reverse."""
    tile = functools.partial(matrix, dtype=v.dtype, swizzle=SWIZZLE)
    panels = read.shape[3] // PANEL
    scratch = dict(
        read_tile=tile(panels, CHUNK, PANEL),
        own_tile=tile(CHUNK, CHUNK),
        state_tile=tile(panels, PANEL, PANEL),
        v_tile=tile(CHUNK, PANEL),
        here=plgpu.Barrier(num_arrivals=2 * panels + 2),
    )

    def delta_rule_outputs(*references):
        pl.run_scoped(functools.partial(_outputs_block, *references), **scratch)

    batch, count, heads = before.shape[:3]
    run = plgpu.kernel(
        delta_rule_outputs,
        out_type=jax.ShapeDtypeStruct(v.shape, v.dtype),
        grid=(batch, count, heads * (v.shape[3] // PANEL)),  # slices that share `read` follow one another
        grid_names=("row", "chunk", "head and slice"),
        compiler_params=COMPILER,
    )
    return run(read, own, before, v)


def _outputs_block(read, own, before, v, o, *, read_tile, own_tile, state_tile, v_tile, here):
    row, chunk = (lax.axis_index(name) for name in ("row", "chunk"))
    head, slice = both_of("head and slice", v.shape[3] // PANEL)
    lines, columns = pl.ds(chunk * CHUNK, CHUNK), pl.ds(slice * PANEL, PANEL)
    panels = read.shape[3] // PANEL
    for n in range(panels):
        channels = pl.ds(n * PANEL, PANEL)
        plgpu.copy_gmem_to_smem(read.at[row, lines, head, channels], read_tile.at[n], here)
        plgpu.copy_gmem_to_smem(before.at[row, chunk, head, channels, columns], state_tile.at[n], here)
    plgpu.copy_gmem_to_smem(own.at[row, lines, head], own_tile, here)
    plgpu.copy_gmem_to_smem(v.at[row, lines, head, columns], v_tile, here)
    plgpu.barrier_wait(here)
    pairs = [(read_tile.at[n], state_tile.at[n]) for n in range(panels)]
    v_tile[...] = total(PANEL, *pairs, (own_tile, v_tile)).astype(o.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(v_tile, o.at[row, lines, head, columns])
    plgpu.wait_smem_to_gmem(0)


def _forward(read, own, before, v):
    o = outputs(read, own, before, v)
    # JAX's interpreter cannot run two kernels at once, which XLA's CPU client would.
    return o, (read, own, before, v, o if devices.current().interpreted else None)


def _backward(kept, d_o):
    *kept, o = kept
    if o is not None:
        d_o, _ = lax.optimization_barrier((d_o, o))
    read, own, before, v = kept
    tile = functools.partial(matrix, CHUNK, PANEL, dtype=v.dtype, swizzle=SWIZZLE)
    scratch = dict(
        left=tile(), right=tile(), d_o_tile=tile(), left_here=plgpu.Barrier(), here=plgpu.Barrier(num_arrivals=2)
    )

    def delta_rule_outputs_backward(*references):
        pl.run_scoped(functools.partial(_backward_block, *references), **scratch)

    run = plgpu.kernel(
        delta_rule_outputs_backward,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kept],
        grid=(*before.shape[:2], before.shape[2] * (read.shape[3] // PANEL + 1)),
        grid_names=("row", "chunk", "head and part"),
        compiler_params=COMPILER,
    )
    return tuple(run(*kept, d_o))


def _backward_block(
    read, own, before, v, d_o, d_read, d_own, d_before, d_v, *, left, right, d_o_tile, left_here, here
):  # fmt: skip
    row, chunk = (lax.axis_index(name) for name in ("row", "chunk"))
    head, part = both_of("head and part", read.shape[3] // PANEL + 1)
    lines = pl.ds(chunk * CHUNK, CHUNK)

    def factors(of_left, of_right, d_left, d_right):
        """Of one product of the two: one on the left with many slices on the right."""
        plgpu.copy_gmem_to_smem(of_left, left, left_here)
        plgpu.barrier_wait(left_here)

        def visit(n, sum):
            columns = pl.ds(n * PANEL, PANEL)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.copy_gmem_to_smem(of_right(columns), right, here)
            plgpu.copy_gmem_to_smem(d_o.at[row, lines, head, columns], d_o_tile, here)
            plgpu.barrier_wait(here)
            sum = sum + total(CHUNK, (d_o_tile, transposed(right)))
            right[...] = total(PANEL, (transposed(left), d_o_tile)).astype(v.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(right, d_right(columns))
            return sum

        left[...] = lax.fori_loop(0, v.shape[3] // PANEL, visit, zeros(CHUNK, PANEL)).astype(v.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(left, d_left)
        plgpu.wait_smem_to_gmem(0)

    panels = read.shape[3] // PANEL

    @pl.when(part < panels)
    def of_state():
        channels = pl.ds(part * PANEL, PANEL)

        def slice_of(states):
            return lambda columns: states.at[row, chunk, head, channels, columns]

        factors(
            read.at[row, lines, head, channels],
            slice_of(before),
            d_read.at[row, lines, head, channels],
            slice_of(d_before),
        )

    @pl.when(part == panels)
    def of_values():
        def slice_of(values):
            return lambda columns: values.at[row, lines, head, columns]

        factors(own.at[row, lines, head], slice_of(v), d_own.at[row, lines, head], slice_of(d_v))


outputs.defvjp(_forward, _backward)
