"""The tables of chunks with a decay for each key channel: one block for each chunk and head.

Scores by halves, as in `decays.scores`: for tokens that part at a block of 2 h tokens, the factors' exponents are
sums of log decays up to that block's middle, and one product of whole matrices has them for all such pairs. The sums
are products with matrices of zeros and ones, of the log decays in two parts: 16 bits of each, and each sum adds up its
own gates alone. Rows and columns are rounded with their factors; sums over 64 channels and more hardly feel it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu_products import MATRIX, PER_LINE, along_lines, matrix, zeros
from pallas_kernels.delta_rule import mosaic_gpu_split as split
from pallas_kernels.delta_rule.mosaic_gpu_split import CHUNK, PANEL, SWIZZLE, transposed

COMPILER = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
LEVELS = CHUNK.bit_length() - 1
LEAST = -105.0  # of a log decay: its exponential is 0 in float32, and sums of it are finite
WIDEST = 192  # channels that fit the shared memory


def forward(q, k, a, b, log_decay, scale: float) -> list[jax.Array]:
    """read, own, seen, key, back, total (see `mosaic_gpu_tables.Tables`); log_decay: float32 `[B, T, H, K]`."""
    batch, length, heads, width = q.shape
    dtype, panels = q.dtype, width // PANEL
    swizzled = plgpu.TilingTransform((8, SWIZZLE // 4)), plgpu.SwizzleTransform(SWIZZLE)
    tiles = functools.partial(matrix, panels, CHUNK, PANEL, dtype=dtype, swizzle=SWIZZLE)
    scratch = dict(
        tiles={name: tiles() for name in "qkab"},
        gates=split.parts(panels, dtype),
        matrices=split.parts(3, dtype),
        gates_or_matrix=plgpu.RefUnion(
            plgpu.SMEM((CHUNK, PANEL), jnp.float32, transforms=swizzled), split.parts(1, dtype)
        ),
        sums_tile=plgpu.SMEM((panels, PANEL), jnp.float32),
        here=plgpu.Barrier(num_arrivals=4 * panels),
        gates_here=plgpu.Barrier(),
    )

    def delta_rule_tables_vector(*references):
        pl.run_scoped(functools.partial(_block, scale, *references), **scratch)

    rows = [jax.ShapeDtypeStruct((batch, length, heads, n), dtype) for n in (width, CHUNK, width, width, width)]
    run = plgpu.kernel(
        delta_rule_tables_vector,
        out_type=[*rows, jax.ShapeDtypeStruct((batch, length // CHUNK, heads, width), jnp.float32)],
        grid=(batch, length // CHUNK, heads),
        grid_names=("row", "chunk", "head"),
        compiler_params=COMPILER,
    )
    return run(q, k, a, b, log_decay)


def _block(
    scale, q, k, a, b, log_decay, read, own, seen, key, back, total, *, tiles, gates, matrices, gates_or_matrix,
    sums_tile, here, gates_here,
):  # fmt: skip
    row, chunk, head = (lax.axis_index(name) for name in ("row", "chunk", "head"))
    lines, panels, dtype = pl.ds(chunk * CHUNK, CHUNK), q.shape[3] // PANEL, q.dtype
    gates_tile, of_columns = gates_or_matrix[0], gates_or_matrix[1].at[0]

    def panel(array, n):
        return array.at[row, lines, head, pl.ds(n * PANEL, PANEL)]

    for n in range(panels):
        for name, array in zip("qkab", (q, k, a, b), strict=True):
            plgpu.copy_gmem_to_smem(panel(array, n), tiles[name].at[n], here)

    def split_gates(n, _):
        plgpu.copy_gmem_to_smem(panel(log_decay, n), gates_tile, gates_here)
        plgpu.barrier_wait(gates_here)
        split.store(gates.at[n], jnp.maximum(plgpu.load(gates_tile, layout=MATRIX), LEAST))
        plgpu.commit_smem()

    lax.fori_loop(0, panels, split_gates, None)
    plgpu.barrier_wait(here)
    lower, inner = matrices.at[0], matrices.at[1]
    ranges, of_rows = matrices.at[2, 0], matrices.at[2, 1]

    def decays(n):
        """The product of those tokens' decays that `ranges` has."""
        return jnp.exp(split.total(PANEL, (ranges, gates.at[n, 0]), (ranges, gates.at[n, 1])))

    def load(name, n):
        return plgpu.load(tiles[name].at[n], layout=MATRIX).astype(jnp.float32)

    def level_by_level(rows):
        """Of `rows` with b and k, before the diagonal."""

        def level(level, tables):
            ranges[...] = _ranges(level).astype(dtype)
            plgpu.commit_smem()
            parting = lax.shift_right_logical(split.iota(0) ^ split.iota(1), level) == 1
            mask = parting & (split.iota(0) > split.iota(1))

            def add(n, tables):
                middle = decays(n)
                of_rows[...] = (load(rows, n) * middle).astype(dtype)
                for i, name in enumerate("bk"):
                    of_columns[i] = (load(name, n) * middle).astype(dtype)
                plgpu.commit_smem()
                found = (split.total(CHUNK, (of_rows, transposed(of_columns.at[i]))) for i in range(2))
                return tuple(table + split.where(mask, x) for table, x in zip(tables, found, strict=True))

            return lax.fori_loop(0, panels, add, tables)

        return lax.fori_loop(0, LEVELS, level, (zeros(CHUNK, CHUNK), zeros(CHUNK, CHUNK)))

    def own_decay(n, sums):
        """Queries read after the token's own decay, but what the token itself writes they read as it is."""
        x = scale * load("q", n)
        sums = tuple(sum + (x * load(name, n)).sum(axis=1) for sum, name in zip(sums, "bk", strict=True))
        tiles["q"][n] = (x * jnp.exp(split.load(gates.at[n]))).astype(dtype)
        return sums

    nothing = zeros(CHUNK, layout=PER_LINE)
    of_itself = lax.fori_loop(0, panels, own_decay, (nothing, nothing))

    def with_itself(table, sum):
        return table + split.where(split.iota(0) == split.iota(1), along_lines(sum, table.shape))

    of_writes, of_values = level_by_level("a")
    split.store(lower, of_writes)
    split.store(inner, of_values)
    of_writes, of_values = map(with_itself, level_by_level("q"), of_itself)
    scores = of_columns
    split.store(scores, of_writes)

    def fade(n, _):
        """The tiles with all their factors; sums from the state before the chunk, then up to the state after it."""
        q_n, k_n, a_n, b_n = (tiles[name].at[n] for name in "qkab")
        line, column = split.iota(0), split.iota(1)
        ranges[...] = split.where(column < line, jnp.ones(line.shape, jnp.float32)).astype(dtype)
        plgpu.commit_smem()
        since = decays(n)
        a_n[...] = (load("a", n) * since).astype(dtype)
        q_n[...] = (load("q", n) * since).astype(dtype)
        after = since * jnp.exp(split.load(gates.at[n]))
        sums_tile[n] = split.where(line == CHUNK - 1, after).sum(axis=0)
        ranges[...] = split.where(column > line, jnp.ones(line.shape, jnp.float32)).astype(dtype)
        plgpu.commit_smem()
        until = decays(n)
        k_n[...] = (load("k", n) * until).astype(dtype)
        b_n[...] = (load("b", n) * until).astype(dtype)

    lax.fori_loop(0, panels, fade, None)
    inverse = gates.at[0]
    split.unit_inverse(lower, inverse, matrices.at[2])
    of_values = split.through_writes(inverse, scores, inner, of_values).astype(dtype)
    split.store(inner, split.times(inverse, inner))
    plgpu.commit_smem()

    def scaled(name, tile):
        return plgpu.load(tile, layout=MATRIX).astype(jnp.float32)

    split.finish(tiles, inverse, scores, inner, scaled)
    scores.at[0][...] = of_values
    plgpu.commit_smem()
    for n in range(panels):
        for tile, array in zip("qakb", (read, seen, key, back), strict=True):
            plgpu.copy_smem_to_gmem(tiles[tile].at[n], panel(array, n))
        plgpu.copy_smem_to_gmem(sums_tile.at[n], total.at[row, chunk, head, pl.ds(n * PANEL, PANEL)])
    plgpu.copy_smem_to_gmem(scores.at[0], own.at[row, lines, head])
    plgpu.wait_smem_to_gmem(0)


def _ranges(level: jax.Array) -> jax.Array:
    """Line t has ones for the tokens between t and the middle of the block of 2^(level + 1) tokens that has it."""
    line, column = split.iota(0), split.iota(1)
    half = lax.shift_left(jnp.int32(1), level)
    middle = (line & ~(2 * half - 1)) + half
    between = jnp.where(line >= middle, (column >= middle) & (column < line), (column > line) & (column < middle))
    return jnp.where(between, 1.0, 0.0)
