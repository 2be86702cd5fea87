"""The tables of chunks with one decay a head, or none: one block for each chunk and head."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu_products import (
    MATRIX,
    PER_COLUMN,
    PER_LINE,
    along_columns,
    along_lines,
    matrix,
    zeros,
)
from pallas_kernels.delta_rule import mosaic_gpu_split as split
from pallas_kernels.delta_rule.mosaic_gpu_split import CHUNK, PANEL, SWIZZLE, transposed

COMPILER = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
WRITTEN, FOUND = (0, 1), (2, 3)  # of the sums: up to a token's own decay, and up to what it finds; each in two parts
UNTIL = 4
SUMS = 5


def forward(q, k, a, b, sums, scale: float) -> list[jax.Array]:
    """read, own, seen, key, back (see `mosaic_gpu_tables.Tables`); sums: float32 `[B, n, H, SUMS, C]`."""
    batch, length, heads, width = q.shape
    dtype, panels = q.dtype, width // PANEL
    tile = functools.partial(matrix, panels, CHUNK, PANEL, dtype=dtype, swizzle=SWIZZLE)
    scratch = dict(
        tiles={name: tile() for name in "qkab"},
        sums_tile=plgpu.SMEM((SUMS, CHUNK), jnp.float32),
        matrices={name: split.parts(1, dtype) for name in ("inverse", "scores", "inner")},
        nought=plgpu.SMEM((CHUNK,), jnp.int32),
        here=plgpu.Barrier(num_arrivals=4 * panels + 1),
    )

    def delta_rule_tables_scalar(*references):
        pl.run_scoped(functools.partial(_block, scale, *references), **scratch)

    run = plgpu.kernel(
        delta_rule_tables_scalar,
        out_type=[jax.ShapeDtypeStruct((batch, length, heads, n), dtype) for n in (width, CHUNK, width, width, width)],
        grid=(batch, length // CHUNK, heads),
        grid_names=("row", "chunk", "head"),
        compiler_params=COMPILER,
    )
    return run(q, k, a, b, sums)


def _block(scale, q, k, a, b, sums, read, own, seen, key, back, *, tiles, sums_tile, matrices, nought, here):
    row, chunk, head = (lax.axis_index(name) for name in ("row", "chunk", "head"))
    lines, panels = pl.ds(chunk * CHUNK, CHUNK), range(q.shape[3] // PANEL)

    def panel(array, n):
        return array.at[row, lines, head, pl.ds(n * PANEL, PANEL)]

    plgpu.copy_gmem_to_smem(sums.at[row, chunk, head], sums_tile, here)
    for n in panels:
        for name, array in zip("qkab", (q, k, a, b), strict=True):
            plgpu.copy_gmem_to_smem(panel(array, n), tiles[name].at[n], here)
    plgpu.barrier_wait(here)

    nought[...] = zeros(CHUNK, layout=PER_LINE).astype(jnp.int32)
    plgpu.commit_smem()

    def m(name):
        """One of the matrices, at an index that the compiler cannot see through: it would compute all addresses of all
        operands first, and keep them in registers, which are too few."""
        return matrices[name].at[nought[0]]

    def products(rows, columns):
        def add(n, sum):
            return sum + split.total(CHUNK, (tiles[rows].at[n], transposed(tiles[columns].at[n])))

        return lax.fori_loop(0, len(panels), add, zeros(CHUNK, CHUNK))

    # A table of decays is made where it is used: registers hold some four matrices.
    split.store(m("inner"), products("a", "b") * decays_between(sums_tile, FOUND))
    split.unit_inverse(m("inner"), m("inverse"), m("scores"))
    split.store(m("inner"), products("a", "k") * decays_between(sums_tile, FOUND))
    split.store(m("scores"), products("q", "b") * (scale * decays_between(sums_tile, WRITTEN)))
    of_values = products("q", "k") * (scale * decays_between(sums_tile, WRITTEN))
    of_values = split.through_writes(m("inverse"), m("scores"), m("inner"), of_values).astype(q.dtype)

    since = along_columns(jnp.exp(sum_of(sums_tile, FOUND, PER_COLUMN)), of_values.shape)
    fading = scale * jnp.exp(sum_of(sums_tile, WRITTEN, PER_LINE))
    until = jnp.exp(plgpu.load(sums_tile.at[UNTIL], layout=PER_LINE))
    split.store(m("scores"), split.load(m("scores")) * since)
    within = split.times(m("inverse"), m("inner"))
    split.store(m("inner"), within * along_lines(until, of_values.shape))
    split.store(m("inverse"), split.load(m("inverse")) * since)
    plgpu.commit_smem()

    def scaled(name, tile):
        x = plgpu.load(tile, layout=MATRIX).astype(jnp.float32)
        return x * along_lines(fading if name == "q" else until, x.shape)

    split.finish(tiles, m("inverse"), m("scores"), m("inner"), scaled)
    m("scores").at[0][...] = of_values
    plgpu.commit_smem()
    for n in panels:
        for tile, array in zip("qakb", (read, seen, key, back), strict=True):
            plgpu.copy_smem_to_gmem(tiles[tile].at[n], panel(array, n))
    plgpu.copy_smem_to_gmem(m("scores").at[0], own.at[row, lines, head])
    plgpu.wait_smem_to_gmem(0)


def decays_between(sums_tile, rows):
    """From token (column) to token (line), later or, up to a token's own decay, the same; 0 elsewhere."""
    shape = CHUNK, CHUNK
    exponents = 0.0
    for of_line, of_column in zip(rows, WRITTEN, strict=True):  # differences of each part are nearly exact
        later = plgpu.load(sums_tile.at[of_line], layout=PER_LINE)
        earlier = plgpu.load(sums_tile.at[of_column], layout=PER_COLUMN)
        exponents = exponents + (along_lines(later, shape) - along_columns(earlier, shape))
    line, column = split.iota(0), split.iota(1)
    mask = line >= column if rows == WRITTEN else line > column
    return split.where(mask, jnp.exp(split.where(mask, exponents)))


def sum_of(sums_tile, rows, layout):
    return sum(plgpu.load(sums_tile.at[row], layout=layout) for row in rows)
