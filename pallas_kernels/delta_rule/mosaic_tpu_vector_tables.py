"""The tables of a chunk of the delta rule on a TPU with a decay for each key channel, over references, by halves.

As in `mosaic_tpu_halving`, the decay between two tokens passes the middle of the smallest aligned block that holds both,
and is a product of two factors of at most 1. A factor is a product of the decays exp(g) of a few tokens themselves: of
blocks twice as long it comes from those of their halves by one exchange of neighbours and one multiplication. (So -inf
and gates of -1e-6 beside -100 need no care, and of a token there is one exponential.)

Where blocks of 2 h tokens part, only tokens of second halves read and only those of first halves write. So what a and q
read takes turns in the rows of one matrix, and so does what b and k write:

    pairs[., 0]: row t is that of a_t where t is in a second half, else that of q_{t+h}
    pairs[., 1]: row t is that of b_t where t is in a first half, else that of k_{t-h}

and one product of 64 rows has all four tables' entries, which rolls by h rows and columns bring to their places. Tables of
two heads lie side by side in the lanes, as in `mosaic_tpu_inverse`.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu_chunks import LANES, product
from pallas_kernels.mosaic_tpu_halving import part_at, parting

CHUNK = 64  # two heads' tables side by side fill the lanes
HALVES = (1, 2, 4, 8, 16, 32)
ROWS = 8  # of a register
SPAN = 16  # tokens worked on at once: a register of bfloat16


def scratch(pack, step, dtype, *, backward):
    """pairs, ends, total, spans, totals, lower, reads, of_writes; backward, too: middles, outer."""
    keys, sets = pack.keys, step * sets_of(pack)
    found = {
        "pairs": pltpu.VMEM((step, len(HALVES), 2, CHUNK, keys), dtype),
        # What reads the state before the chunk (a, then q), and what writes the one after it (b, then k)
        "ends": pltpu.VMEM((step, 2, 2 * CHUNK, keys), dtype),
        "total": pltpu.VMEM((step, ROWS, keys), jnp.float32),
        # Decays within spans: from the start to what the token reads, from after the token to the end; of all of it
        "spans": pltpu.VMEM((step, 2, CHUNK, keys), jnp.float32),
        "totals": pltpu.VMEM((step, CHUNK // SPAN, ROWS, keys), jnp.float32),
        "lower": pltpu.VMEM((sets, CHUNK, LANES), jnp.float32),  # a with b; then its inverse
        "reads": pltpu.VMEM((sets, 2 * CHUNK, LANES), dtype),  # a with k, then q with k
        "of_writes": pltpu.VMEM((sets, CHUNK, LANES), dtype),  # q with b
    }
    if backward:
        found["middles"] = pltpu.VMEM((step, len(HALVES) - 1, CHUNK, keys), jnp.float32)
        found["outer"] = pltpu.VMEM((step, 2, CHUNK, keys), jnp.float32)  # to and from the state, as `ends` have it
    return found


def sets_of(pack) -> int:
    return -(-pack.heads // 2)


def lanes_of(number, width, unit=slice(None)):
    """Of a pack, or a unit of them; packs that are no whole registers are alone in a step."""
    start, stop, _ = unit.indices(width)
    if width % LANES:
        return slice(start, stop)
    return pl.ds(pl.multiple_of(number * width + start, LANES), stop - start)


def places(number, shape):
    """(row, column) of each entry. Computed anew at each turn of a loop, as they hang on its number: kept for all loops of
    a kernel, they and the masks made from them take most registers that there are."""
    turn = number << 16
    return tuple((jax.lax.broadcasted_iota(jnp.int32, shape, axis) + turn) & 0xFFFF for axis in (0, 1))


def keep_lanes(number, x, start, width):
    """x, but 0 outside of some lanes."""
    if start <= 0 and start + width >= x.shape[1]:
        return x
    lane = places(number, (ROWS, x.shape[1]))[1]
    mask = jnp.where((lane >= start) & (lane < start + width), -1, 0)
    bits = pltpu.bitcast(x, jnp.int32)  # of two rows in one, with bfloat16
    return pltpu.bitcast(bits & jnp.concatenate([mask] * (bits.shape[0] // ROWS)), x.dtype)


def apart(number, x, one, width, offset=0):
    """x `[C, lanes]` for both heads of a set below one another, each 0 in the other heads' lanes. width: of a head;
    offset: of the lanes."""
    return jnp.concatenate([keep_lanes(number, x, (2 * one + head) * width - offset, width) for head in range(2)])


def blocks(number, x, pack, unit):
    """Some lanes of a state, but 0 outside of the heads' blocks."""
    heads = range(pack.heads)
    rows = (x[head * pack.key : (head + 1) * pack.key] for head in heads)
    kept = (keep_lanes(number, part, head * pack.value - unit.start, pack.value) for head, part in zip(heads, rows))
    return x if pack.heads == 1 else jnp.concatenate(list(kept))


def registers(x):
    return [x[start : start + ROWS] for start in range(0, x.shape[0], ROWS)]


def swap(x, half, second):
    """Rows t with rows t ^ half, of a register. second: whether a row is in the second half of its block of 2 x half."""
    back = pltpu.roll(x, half, 0)
    return back if 2 * half == ROWS else jnp.where(second, back, pltpu.roll(x, ROWS - half, 0))


def decay_within_spans(tokens, pack, refs):
    """Pairs that part within a span, for all packs."""

    def span(number, at):
        rows, lanes = pl.ds(pl.multiple_of(at * SPAN, SPAN), SPAN), lanes_of(number, pack.keys)
        q, k, a, b = (registers(x[rows, lanes].astype(jnp.float32)) for x in (tokens.q, tokens.k, tokens.a, tokens.b))
        total = registers(jnp.exp(tokens.log_decay[rows, lanes].astype(jnp.float32)))
        q = [x * decay for x, decay in zip(q, total, strict=True)]
        reading = rest = [jnp.ones_like(total[0])] * 2
        row = places(number, total[0].shape)[0]

        def put(ref, parts):
            ref[...] = jnp.concatenate(parts).astype(ref.dtype)

        for level, half in enumerate(HALVES[:4]):
            pair = refs["pairs"].at[number, level]
            if half == ROWS:
                put(pair.at[0, rows], [q[1] * reading[1], a[1] * reading[1]])
                put(pair.at[1, rows], [b[0] * rest[0], k[0] * rest[0]])
                decay = [rest[0], reading[1]]
                reading, rest = [reading[0], reading[1] * total[0]], [rest[0] * total[1], rest[1]]
                total = [total[0] * total[1]] * 2
            else:
                second = row & half != 0
                decay = [jnp.where(second, *x) for x in zip(reading, rest, strict=True)]
                own = [jnp.where(second, *x) * by for *x, by in zip(a, b, decay, strict=True)]
                other = [swap(jnp.where(second, *x) * by, half, second) for *x, by in zip(q, k, decay, strict=True)]
                put(pair.at[0, rows], [jnp.where(second, *x) for x in zip(own, other, strict=True)])
                put(pair.at[1, rows], [jnp.where(second, *x) for x in zip(other, own, strict=True)])
                neighbour = [swap(x, half, second) for x in total]
                reading = [x * jnp.where(second, by, 1.0) for x, by in zip(reading, neighbour, strict=True)]
                rest = [x * jnp.where(second, 1.0, by) for x, by in zip(rest, neighbour, strict=True)]
                total = [x * by for x, by in zip(total, neighbour, strict=True)]
            if half > 1 and "middles" in refs:
                put(refs["middles"].at[number, level - 1, rows], decay)
        put(refs["spans"].at[number, 0, rows], reading)
        put(refs["spans"].at[number, 1, rows], rest)
        refs["totals"][number, at] = total[0]

    for_all(refs["pairs"].shape[0], CHUNK // SPAN, span)


def decay_across_spans(tokens, pack, refs):
    """Pairs that part at spans; and from the state before the chunk and to the one after it."""

    def half(number, second):
        lanes, dtype = lanes_of(number, pack.keys), tokens.q.dtype
        pairs, ends, totals = refs["pairs"], refs["ends"], refs["totals"]
        later = second == 1
        first_total, last_total = totals[number, 2 * second], totals[number, 2 * second + 1]
        before = jnp.where(later, totals[number, 0] * totals[number, 1], 1.0)
        after = jnp.where(later, 1.0, totals[number, 2] * totals[number, 3])
        refs["total"][number] = totals[number, 0] * totals[number, 1] * totals[number, 2] * totals[number, 3]
        for odd in range(2):
            start = second * 2 * SPAN + odd * SPAN
            rows = pl.ds(pl.multiple_of(start, SPAN), SPAN)
            beside = pl.ds(pl.multiple_of(second * 2 * SPAN + (1 - odd) * SPAN, SPAN), SPAN)
            opposite = pl.ds(pl.multiple_of((1 - second) * 2 * SPAN + odd * SPAN, SPAN), SPAN)
            q, k, a, b = (x[rows, lanes].astype(jnp.float32) for x in (tokens.q, tokens.k, tokens.a, tokens.b))
            q = q * jnp.exp(tokens.log_decay[rows, lanes].astype(jnp.float32))
            reading, rest = refs["spans"][number, 0, rows], refs["spans"][number, 1, rows]

            # Half a chunk's half
            decay, own, other = (reading, a, q) if odd else (rest, b, k)
            pairs[number, 4, 1 - odd, rows] = (own * decay).astype(dtype)
            pairs[number, 4, 1 - odd, beside] = (other * decay).astype(dtype)
            if "middles" in refs:
                refs["middles"][number, 3, rows] = decay
            # A chunk's half
            decay = jnp.where(later, reading, rest)
            decay = decay * both(jnp.where(later, first_total, 1.0) if odd else jnp.where(later, 1.0, last_total))
            pairs[number, 5, 1 - second, rows] = (jnp.where(later, a, b) * decay).astype(dtype)
            pairs[number, 5, 1 - second, opposite] = (jnp.where(later, q, k) * decay).astype(dtype)
            if "middles" in refs:
                refs["middles"][number, 4, rows] = decay
            # All of the chunk
            since = reading * both(before * first_total if odd else before)
            until = rest * both(after if odd else last_total * after)
            below = pl.ds(pl.multiple_of(CHUNK + start, SPAN), SPAN)
            ends[number, 0, rows], ends[number, 0, below] = (a * since).astype(dtype), (q * since).astype(dtype)
            ends[number, 1, rows], ends[number, 1, below] = (b * until).astype(dtype), (k * until).astype(dtype)
            if "outer" in refs:
                refs["outer"][number, 0, rows], refs["outer"][number, 1, rows] = since, until

    for_all(refs["pairs"].shape[0], 2, half)


def both(x):
    return jnp.concatenate([x] * (SPAN // ROWS))


def for_all(packs, count, visit):
    """visit(pack, n), one after the other: each is scheduled by itself, or the compiler spills."""

    @pl.loop(0, packs)
    def _(number):
        @pl.loop(0, count)
        def _(n):
            visit(number, n)


def score(tokens, pack, refs, dtype):
    """The tables, without the inverse."""
    sets = sets_of(pack)

    @pl.loop(0, refs["pairs"].shape[0])
    def _(number):
        for one in range(sets):
            _tables(tokens, pack, refs, dtype, number, one)


def _tables(tokens, pack, refs, dtype, number, one):
    pairs, at = refs["pairs"], number * sets_of(pack) + one
    lanes = lanes_of(number, pack.keys)

    def of_level(level):
        return product(pairs[number, level, 0], apart(number, pairs[number, level, 1], one, pack.key), (1, 1), dtype)

    row, lane = places(number, (ROWS, LANES))
    column, block = lane & (ROWS - 1), lane & (CHUNK - ROWS)

    def on_diagonal(x):
        """Blocks of 8, one beside the other."""
        found = x[:ROWS]
        for start in range(ROWS, CHUNK, ROWS):
            found = jnp.where(block == start, x[start : start + ROWS], found)
        return found

    q = tokens.q[:, lanes]
    small = [jnp.zeros((ROWS, LANES), jnp.float32)] * 2
    for written in (tokens.b[:, lanes], tokens.k[:, lanes]):
        itself = on_diagonal(product(q, apart(number, written, one, pack.key), (1, 1), dtype))
        small.append(jnp.where(row == column, itself, 0.0))
    for level, half in enumerate(HALVES[:3]):
        found, parts = on_diagonal(of_level(level)), part_at(parting(row, column), half)
        small = [jnp.where(parts, x, old) for x, old in zip(_places(found, half, rows=True), small, strict=True)]

    tables = [[jnp.zeros((ROWS, LANES), jnp.float32)] * (CHUNK // ROWS) for _ in range(4)]
    for level, half in enumerate(HALVES[3:], 3):
        found = of_level(level)
        for start in range(0, CHUNK, ROWS):
            if start & half:
                own = (block & -half) == (start & -half) - half
                a_rows, q_rows = (found[first : first + ROWS] for first in (start, start - half))
                for kind, x in enumerate((*_places(a_rows, half), *_places(q_rows, half))):
                    tables[kind][start // ROWS] = jnp.where(own, x, tables[kind][start // ROWS])
    tables = [
        jnp.concatenate([jnp.where(block == i * ROWS, near, x) for i, x in enumerate(rows)])
        for near, rows in zip(small, tables, strict=True)
    ]
    refs["lower"][at] = tables[0]
    refs["reads"][at, :CHUNK] = tables[1].astype(dtype)
    refs["of_writes"][at] = tables[2].astype(dtype)
    refs["reads"][at, CHUNK:] = tables[3].astype(dtype)


def _places(x, half, *, rows=False):
    """Of what b and k write: `[b, k]`, or `[a with b, a with k, q with b, q with k]`."""
    moved = pltpu.roll(x, LANES - half, 1)
    return (x, moved, pltpu.roll(x, half, 0), pltpu.roll(moved, half, 0)) if rows else (x, moved)


def split(x):
    """The first 16 bits of a float32 as two bfloat16."""
    first = x.astype(jnp.bfloat16)
    return [first, (x - first.astype(jnp.float32)).astype(jnp.bfloat16)]


def across(row, lanes):
    """`[1, n]` as a column, alike in as many lanes."""
    return jnp.broadcast_to(row, (lanes, row.shape[1])).T
