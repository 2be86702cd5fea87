"""The way back through the tables of chunks with one decay a head, or none: one block for each chunk and head.

Everything that the forward kernel made in shared memory is made again. With N = P_u M and Z = M A_ak, and a' = a since,
b' = b until, the cotangents of what `mosaic_gpu_tables` has as formulas are

    dN = dread a'^T + down A_ak^T           dZ = b' dkey^T              dM = P_u^T dN + dseen a'^T + dZ A_ak^T
    dP_u = dN M^T      dP_v = down          dA_ak = N^T down + M^T dZ   dA_ab = M^T dM M^T, below the diagonal
    da' = N^T dread + M^T dseen             db' = dback + Z dkey

and the rest are the scores' own: those of exponents are sums over the lines and columns of cotangents times scores.
"""

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
from pallas_kernels.delta_rule.mosaic_gpu_split import CHUNK, PANEL, SWIZZLE, Transposed, times_tile, transposed
from pallas_kernels.delta_rule.mosaic_gpu_scalar import COMPILER, FOUND, SUMS, UNTIL, WRITTEN, decays_between, sum_of

INPUTS = ("q", "k", "a", "b")
COTANGENTS = ("read", "seen", "key", "back")
MATRICES = ("lower", "inverse", "scores", "values", "inner", "through", "within", "one", "other")
OF_WRITTEN, OF_FOUND, OF_UNTIL, BY_COLUMN = range(4)  # of the sums' cotangents; BY_COLUMN, of WRITTEN too, one a table
TABLES = 4


def backward(q, k, a, b, sums, cotangents, scale: float) -> tuple[list[jax.Array], jax.Array]:
    """The cotangents of q, k, a, b, and of `sums`; cotangents: those of read, own, seen, key, back."""
    batch, length, heads, width = q.shape
    dtype = q.dtype
    tile = functools.partial(matrix, dtype=dtype, swizzle=SWIZZLE)
    scratch = dict(
        tiles={name: tile(1, CHUNK, PANEL) for name in (*INPUTS, *COTANGENTS)},
        own_tile=tile(CHUNK, PANEL),
        sums_tile=plgpu.SMEM((SUMS, CHUNK), jnp.float32),
        d_sums_tile=plgpu.SMEM((BY_COLUMN + TABLES, CHUNK), jnp.float32),
        matrices={name: split.parts(1, dtype) for name in MATRICES},
        nought=plgpu.SMEM((CHUNK,), jnp.int32),
        once=plgpu.Barrier(num_arrivals=2),
        three=plgpu.Barrier(num_arrivals=3),
        four=plgpu.Barrier(num_arrivals=4),
        six=plgpu.Barrier(num_arrivals=6),
        eight=plgpu.Barrier(num_arrivals=8),
    )

    def delta_rule_tables_scalar_backward(*references):
        pl.run_scoped(functools.partial(_block, scale, *references), **scratch)

    run = plgpu.kernel(
        delta_rule_tables_scalar_backward,
        out_type=[jax.ShapeDtypeStruct(q.shape, dtype)] * 4
        + [jax.ShapeDtypeStruct((*sums.shape[:3], BY_COLUMN + TABLES, CHUNK), jnp.float32)],
        grid=(batch, length // CHUNK, heads),
        grid_names=("row", "chunk", "head"),
        compiler_params=COMPILER,
    )
    *of_inputs, of_sums = run(q, k, a, b, sums, *cotangents)
    written = of_sums[:, :, :, OF_WRITTEN] - of_sums[:, :, :, BY_COLUMN:].sum(axis=3)
    none = jnp.zeros_like(written)
    # of the sums' coarse parts there is nothing to know: they are constants
    of_sums = jnp.stack([none, written, none, of_sums[:, :, :, OF_FOUND], of_sums[:, :, :, OF_UNTIL]], axis=3)
    return of_inputs, of_sums


def _block(
    scale, q, k, a, b, sums, d_read, d_own, d_seen, d_key, d_back, dq, dk, da, db, d_sums, *, tiles, own_tile,
    sums_tile, d_sums_tile, matrices, nought, once, three, four, six, eight,
):  # fmt: skip
    row, chunk, head = (lax.axis_index(name) for name in ("row", "chunk", "head"))
    lines, panels, dtype = pl.ds(chunk * CHUNK, CHUNK), q.shape[3] // PANEL, q.dtype
    arrays = {"q": q, "k": k, "a": a, "b": b, "read": d_read, "seen": d_seen, "key": d_key, "back": d_back}
    nothing = zeros(CHUNK, CHUNK)
    nought[...] = zeros(CHUNK, layout=PER_LINE).astype(jnp.int32)
    plgpu.commit_smem()

    def m(name):
        """One of the matrices, at an index that the compiler cannot see through: it would compute all addresses of all
        operands first, and keep them in registers, which are too few."""
        return matrices[name].at[nought[0]]

    def t(name):
        return tiles[name].at[nought[0]]

    def panel(array, n):
        return array.at[row, lines, head, pl.ds(n * PANEL, PANEL)]

    def fetch(names, n, barrier):
        plgpu.commit_smem()  # nobody reads the tiles any more
        for name in names:
            plgpu.copy_gmem_to_smem(panel(arrays[name], n), tiles[name].at[0], barrier)
        plgpu.barrier_wait(barrier)

    def product(left, right):
        return split.total(CHUNK, (t(left), transposed(t(right))))

    def sums_over_panels(names, barrier, pairs):
        def add(n, found):
            fetch(names, n, barrier)
            return tuple(sum + product(*pair) for sum, pair in zip(found, pairs, strict=True))

        return lax.fori_loop(0, panels, add, (nothing,) * len(pairs))

    plgpu.copy_gmem_to_smem(sums.at[row, chunk, head], sums_tile, once)
    plgpu.copy_gmem_to_smem(d_own.at[row, lines, head], own_tile, once)
    plgpu.barrier_wait(once)
    of_writes, of_values = sums_over_panels(("a", "b", "k"), three, (("a", "b"), ("a", "k")))
    decays = decays_between(sums_tile, FOUND)
    split.store(m("lower"), of_writes * decays)
    split.store(m("inner"), of_values * decays)
    of_writes, of_values = sums_over_panels(("q", "b", "k"), three, (("q", "b"), ("q", "k")))
    decays = scale * decays_between(sums_tile, WRITTEN)
    split.store(m("scores"), of_writes * decays)
    split.store(m("values"), of_values * decays)
    split.unit_inverse(m("lower"), m("inverse"), m("one"))
    split.store(m("through"), split.times(m("scores"), m("inverse")))
    split.store(m("within"), split.times(m("inverse"), m("inner")))

    def finish(number, d_table, table, rows, place):
        """Of a table of scores: the sums of its exponents' cotangents by column, here, and by line, as a result; and in
        `place`, in one part, the cotangent of the scores without decays."""
        exponents = d_table * split.load(table)
        d_sums_tile[BY_COLUMN + number] = exponents.sum(axis=0)
        decays = decays_between(sums_tile, rows)
        place[...] = (d_table * (decays if rows == FOUND else scale * decays)).astype(dtype)
        plgpu.commit_smem()
        return exponents.sum(axis=1)

    plgpu.commit_smem()
    own = plgpu.load(own_tile, layout=MATRIX).astype(jnp.float32)
    of_written = finish(0, own, m("values"), WRITTEN, m("values").at[0])

    pairs = ("read", "a"), ("b", "key")
    d_through, d_within = sums_over_panels(("a", "b", "read", "key"), four, pairs)
    since = along_columns(jnp.exp(sum_of(sums_tile, FOUND, PER_COLUMN)), nothing.shape)
    until = jnp.exp(plgpu.load(sums_tile.at[UNTIL], layout=PER_LINE))
    own_with_inner = ((own_tile, part) for part in split.both(Transposed(m("inner"))))
    split.store(m("one"), d_through * since + split.total(CHUNK, *own_with_inner))
    split.store(m("other"), d_within * along_lines(until, nothing.shape))
    plgpu.commit_smem()
    d_scores = split.times(m("one"), Transposed(m("inverse")))
    of_written = of_written + finish(1, d_scores, m("scores"), WRITTEN, m("values").at[1])
    d_inner = split.total(CHUNK, *times_tile(Transposed(m("through")), own_tile))
    d_inner = d_inner + split.times(Transposed(m("inverse")), m("other"))
    of_found = finish(2, d_inner, m("inner"), FOUND, own_tile)

    (d_inverse,) = sums_over_panels(("a", "seen"), once, (("seen", "a"),))
    since = along_columns(jnp.exp(sum_of(sums_tile, FOUND, PER_COLUMN)), nothing.shape)
    d_inverse = d_inverse * since + split.times(Transposed(m("scores")), m("one"))
    d_inverse = d_inverse + split.times(m("other"), Transposed(m("inner")))
    split.store(m("other"), d_inverse)
    plgpu.commit_smem()
    split.store(m("one"), split.times(Transposed(m("inverse")), m("other")))
    plgpu.commit_smem()
    d_lower = split.times(m("one"), Transposed(m("inverse")))
    of_found = of_found + finish(3, d_lower, m("lower"), FOUND, m("lower").at[0])

    def d(name):
        """The cotangent of those scores, without decays, where `finish` has put it."""
        places = {"lower": (m("lower"), 0), "values": (m("values"), 0), "scores": (m("values"), 1)}
        if name == "inner":
            return own_tile
        matrix, part = places[name]
        return matrix.at[part]

    def load(name):
        return plgpu.load(t(name), layout=MATRIX).astype(jnp.float32)

    def scaled(x, factors):
        return x * along_lines(factors, x.shape)

    def give(results, n):
        plgpu.commit_smem()
        for name, result in results.items():
            plgpu.copy_smem_to_gmem(tiles[name].at[0], panel(result, n))
        plgpu.wait_smem_to_gmem(0)

    def of_a_and_b(n, carry):
        of_found, of_until = carry
        fetch((*INPUTS, *COTANGENTS), n, eight)
        found = split.total(
            PANEL,
            *times_tile(Transposed(m("through")), t("read")),
            *times_tile(Transposed(m("inverse")), t("seen")),
        )
        found = scaled(found, jnp.exp(sum_of(sums_tile, FOUND, PER_LINE)))
        of_found = of_found + (found * load("a")).sum(axis=1)
        rest = split.total(PANEL, (d("lower"), t("b")), (d("inner"), t("k")))
        t("seen")[...] = (found + rest).astype(dtype)
        plgpu.commit_smem()

        until = jnp.exp(plgpu.load(sums_tile.at[UNTIL], layout=PER_LINE))
        found = scaled(load("back") + split.total(PANEL, *times_tile(m("within"), t("key"))), until)
        of_until = of_until + (found * load("b")).sum(axis=1)
        rest = split.total(PANEL, (transposed(d("lower")), t("a")), (transposed(d("scores")), t("q")))
        t("back")[...] = (found + rest).astype(dtype)
        give({"seen": da, "back": db}, n)
        return of_found, of_until

    def of_q_and_k(n, carry):  # in a loop of its own, for want of registers
        of_written, of_until = carry
        fetch((*INPUTS, "read", "key"), n, six)
        found = scaled(load("read"), scale * jnp.exp(sum_of(sums_tile, WRITTEN, PER_LINE)))
        of_written = of_written + (found * load("q")).sum(axis=1)
        rest = split.total(PANEL, (d("scores"), t("b")), (d("values"), t("k")))
        t("read")[...] = (found + rest).astype(dtype)
        plgpu.commit_smem()

        found = scaled(load("key"), jnp.exp(plgpu.load(sums_tile.at[UNTIL], layout=PER_LINE)))
        of_until = of_until + (found * load("k")).sum(axis=1)
        rest = split.total(PANEL, (transposed(d("inner")), t("a")), (transposed(d("values")), t("q")))
        t("key")[...] = (found + rest).astype(dtype)
        give({"read": dq, "key": dk}, n)
        return of_written, of_until

    of_found, of_until = lax.fori_loop(0, panels, of_a_and_b, (of_found, zeros(CHUNK, layout=PER_LINE)))
    of_written, of_until = lax.fori_loop(0, panels, of_q_and_k, (of_written, of_until))
    d_sums_tile[OF_WRITTEN] = of_written
    d_sums_tile[OF_FOUND] = of_found
    d_sums_tile[OF_UNTIL] = of_until
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(d_sums_tile, d_sums.at[row, chunk, head])
    plgpu.wait_smem_to_gmem(0)
