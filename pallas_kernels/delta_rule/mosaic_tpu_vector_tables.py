"""The tables of a chunk of the delta rule on a TPU with a decay for each key channel, over references, by halves.

The decay between two tokens passes the middle of the smallest aligned block that holds
both, and is a product of two factors of at most 1. A factor is a product of the decays exp(g) of a few tokens
themselves: of blocks twice as long it comes from those of their halves by one exchange of neighbours and one
multiplication. So there is one exponential for each token, and -inf or a gate of -1e-6 beside one of -100 need no care.

Where blocks of 2 h tokens part, only tokens of second halves read and only those of first halves write. So what a and
q read takes turns in the rows of one matrix, and so does what b and k write:

    pairs[., 0]: row t is that of a_t where t is in a second half, else that of q_{t+h}
    pairs[., 1]: row t is that of b_t where t is in a first half, else that of k_{t-h}

One product of 64 rows has the entries of all four tables, and rolls by h rows and columns bring them to their places.
Tables of two heads lie side by side in the lanes (a set), as in `mosaic_tpu_inverse`.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu_blocks import SUBLANES, joined, registers, swap
from pallas_kernels.mosaic_tpu_chunks import LANES, product

CHUNK = 64  # two heads' tables side by side fill the lanes
HALVES = (1, 2, 4, 8, 16, 32)
SPAN = 16  # tokens worked on at once: a register of bfloat16


def scratch(pack, step, dtype, *, backward):
    keys, sets = pack.keys, step * sets_of(pack)
    found = {
        "places": pltpu.VMEM((2, SUBLANES, -(-max(keys, pack.values) // LANES) * LANES), jnp.int32),
        "pairs": pltpu.VMEM((step, len(HALVES), 2, CHUNK, keys), dtype),
        # What reads the state before the chunk (a, q), and what writes the one after it (b, k)
        "ends": pltpu.VMEM((step, 2, 2, CHUNK, keys), dtype),
        "total": pltpu.VMEM((step, SUBLANES, keys), jnp.float32),  # the decay from state to state
        # Decays within spans: from the start to what the token reads, from after the token to the end; of all of it
        "spans": pltpu.VMEM((step, 2, CHUNK, keys), jnp.float32),
        "totals": pltpu.VMEM((step, CHUNK // SPAN, SUBLANES, keys), jnp.float32),
        "lower": pltpu.VMEM((sets, CHUNK, LANES), jnp.float32),  # a with b
        "inverse": pltpu.VMEM((sets, CHUNK, LANES), jnp.float32),
        "tables": pltpu.VMEM((sets, 3, CHUNK, LANES), dtype),  # a with k, q with k, q with b
    }
    if backward:
        found["middles"] = pltpu.VMEM((step, len(HALVES) - 1, CHUNK, keys), jnp.float32)  # the factors, from h = 2 on
        found["outer"] = pltpu.VMEM((step, 2, CHUNK, keys), jnp.float32)  # to and from the state, as `ends` have it
    return found


def decay_within_spans(number, at, tokens, pack, refs):
    """Pairs that part within a span of a pack."""
    rows, lanes = span(at), lanes_of(number, pack.keys)
    q, k, a, b = (registers(x[rows, lanes].astype(jnp.float32)) for x in (tokens.q, tokens.k, tokens.a, tokens.b))
    total = registers(jnp.exp(tokens.log_decay[rows, lanes].astype(jnp.float32)))
    q = [x * decay for x, decay in zip(q, total, strict=True)]  # reads after the decay of its own token
    reading = rest = [jnp.ones_like(total[0])] * 2
    row = places(refs, pack.keys)[0]
    pairs, middles = [], []
    for half in (1, 2, 4):
        second = row & half != 0
        decay = [jnp.where(second, *x) for x in zip(reading, rest, strict=True)]
        neighbour = [swap(x, half, second) for x in total]
        reading = [x * jnp.where(second, by, 1.0) for x, by in zip(reading, neighbour, strict=True)]
        rest = [x * jnp.where(second, 1.0, by) for x, by in zip(rest, neighbour, strict=True)]
        total = [x * by for x, by in zip(total, neighbour, strict=True)]
        own = [jnp.where(second, *x) * by for *x, by in zip(a, b, decay, strict=True)]
        other = [swap(jnp.where(second, *x) * by, half, second) for *x, by in zip(q, k, decay, strict=True)]
        pairs.append([joined(jnp.where(second, *x) for x in zip(own, other, strict=True))])
        pairs[-1].append(joined(jnp.where(second, *x) for x in zip(other, own, strict=True)))
        middles.append(joined(decay))
    reader, writer = reading[1], rest[0]
    pairs.append([joined([q[1] * reader, a[1] * reader]), joined([b[0] * writer, k[0] * writer])])
    middles.append(joined([writer, reader]))
    refs["pairs"][number, :4, :, rows] = jnp.stack([jnp.stack(pair) for pair in pairs]).astype(tokens.q.dtype)
    reading, rest = joined([reading[0], reader * total[0]]), joined([writer * total[1], rest[1]])
    refs["spans"][number, :, rows] = jnp.stack([reading, rest])
    refs["totals"][number, at] = total[0] * total[1]
    if "middles" in refs:
        refs["middles"][number, :3, rows] = jnp.stack(middles[1:])


def decay_across_spans(number, second, tokens, pack, refs):
    """Of a half of the chunk, 0 or 1: pairs that part at spans; what meets the states."""
    lanes, dtype = lanes_of(number, pack.keys), tokens.q.dtype
    rows, opposite = (pl.ds(pl.multiple_of(half * 2 * SPAN, SPAN), 2 * SPAN) for half in (second, 1 - second))
    q, k, a, b = (x[rows, lanes].astype(jnp.float32) for x in (tokens.q, tokens.k, tokens.a, tokens.b))
    q = q * jnp.exp(tokens.log_decay[rows, lanes].astype(jnp.float32))
    reading, rest = refs["spans"][number, :, rows]
    totals, later = refs["totals"][number], second == 1
    first, last = (jnp.where(later, totals[2 + n], totals[n]) for n in range(2))
    sooner, after = totals[0] * totals[1], totals[2] * totals[3]

    def by_span(even, odd):
        """Factors, alike for all tokens of a span."""
        return jnp.concatenate([even] * (SPAN // SUBLANES) + [odd] * (SPAN // SUBLANES))

    # Quarters of the chunk
    reader, writer = reading[SPAN:], rest[:SPAN]
    readers = jnp.concatenate([q[SPAN:] * reader, a[SPAN:] * reader])
    writers = jnp.concatenate([b[:SPAN] * writer, k[:SPAN] * writer])
    refs["pairs"][number, 4, :, rows] = jnp.stack([readers, writers]).astype(dtype)
    # Its halves
    one = jnp.ones_like(first)
    decay = jnp.where(later, reading * by_span(one, first), rest * by_span(last, one))
    refs["pairs"][number, 5, 1 - second, rows] = (jnp.where(later, a, b) * decay).astype(dtype)
    refs["pairs"][number, 5, 1 - second, opposite] = (jnp.where(later, q, k) * decay).astype(dtype)
    # All of it
    before, rest_of_all = jnp.where(later, sooner, 1.0), jnp.where(later, 1.0, after)
    since = reading * by_span(before, before * first)
    until = rest * by_span(last * rest_of_all, rest_of_all)
    ends = jnp.stack([jnp.stack([a * since, q * since]), jnp.stack([b * until, k * until])])
    refs["ends"][number, :, :, rows] = ends.astype(dtype)
    refs["total"][number] = sooner * after
    if "middles" in refs:
        refs["middles"][number, 3:, rows] = jnp.stack([jnp.concatenate([writer, reader]), decay])
        refs["outer"][number, :, rows] = jnp.stack([since, until])


def score(number, tokens, pack, refs):
    """The tables of a pack, without the inverse."""
    lanes, dtype, pairs = lanes_of(number, pack.keys), tokens.q.dtype, refs["pairs"][number]
    q, b, k = (x[:, lanes] for x in (tokens.q, tokens.b, tokens.k))
    row, every_lane = places(refs, max(LANES, pack.keys))
    row, lane = row[:, :LANES], every_lane[:, :LANES]
    column, block = lane & (SUBLANES - 1), lane & (CHUNK - SUBLANES)
    nothing = jnp.zeros((SUBLANES, LANES), jnp.float32)

    def on_diagonal(x):
        """Blocks of 8, one beside the other."""
        found = x[:SUBLANES]
        for start in range(SUBLANES, CHUNK, SUBLANES):
            found = jnp.where(block == start, x[start : start + SUBLANES], found)
        return found

    for one in range(sets_of(pack)):
        of_level = [product(x, apart(every_lane, y, one, pack.key), (1, 1), dtype) for x, y in pairs]
        # Within blocks of 8: a with b, a with k, q with b, q with k
        itself = (on_diagonal(product(q, apart(every_lane, x, one, pack.key), (1, 1), dtype)) for x in (b, k))
        near = [nothing, nothing, *(jnp.where(row == column, x, 0.0) for x in itself)]
        for half, found in zip(HALVES[:3], of_level, strict=False):
            of_b, of_k = _of_b_and_k(on_diagonal(found), half)
            places_of = of_b, of_k, pltpu.roll(of_b, half, 0), pltpu.roll(of_k, half, 0)
            parts = part_at(parting(row, column), half)
            near = [jnp.where(parts, x, old) for x, old in zip(places_of, near, strict=True)]
        # Between them
        tables = [[nothing] * (CHUNK // SUBLANES) for _ in range(4)]
        for half, found in zip(HALVES[3:], of_level[3:], strict=True):
            for start in range(0, CHUNK, SUBLANES):
                if start & half:
                    parts = (block & -half) == (start & -half) - half
                    of_a, of_q = (found[first : first + SUBLANES] for first in (start, start - half))
                    for table, x in zip(tables, (*_of_b_and_k(of_a, half), *_of_b_and_k(of_q, half)), strict=True):
                        table[start // SUBLANES] = jnp.where(parts, x, table[start // SUBLANES])
        a_b, a_k, q_b, q_k = (
            jnp.concatenate([jnp.where(block == n * SUBLANES, x, other) for n, other in enumerate(others)])
            for x, others in zip(near, tables, strict=True)
        )
        refs["lower"][number * sets_of(pack) + one] = a_b
        refs["tables"][number * sets_of(pack) + one] = jnp.stack([a_k, q_k, q_b]).astype(dtype)


def _of_b_and_k(x, half):
    return x, pltpu.roll(x, LANES - half, 1)


def sets_of(pack) -> int:
    return -(-pack.heads // 2)


def span(number):
    return pl.ds(pl.multiple_of(number * SPAN, SPAN), SPAN)


def lanes_of(number, width, unit=slice(None)):
    """Of a pack, or a unit of them; packs that are no whole registers are alone in a step."""
    start, stop, _ = unit.indices(width)
    if width % LANES:
        return slice(start, stop)
    return pl.ds(pl.multiple_of(number * width + start, LANES), stop - start)


def number_places(refs):
    """The row and the column of each place, for `places`, with the first chunk. What is not loaded is computed once for
    all loops of a kernel: they and the masks made from them would take most registers that there are."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        for axis in (0, 1):
            ref = refs["places"].at[axis]
            ref[...] = jax.lax.broadcasted_iota(jnp.int32, ref.shape, axis)


def places(refs, width=LANES):
    """(row, column), of a register or several side by side."""
    row, lane = refs["places"][:, :, :width]
    return row, lane


def keep_lanes(lane, x, start, width):
    """x, but 0 outside of some lanes. lane: numbers of lanes, of `places`."""
    if start <= 0 and start + width >= x.shape[1]:
        return x
    lane = lane[:, : x.shape[1]]
    mask = jnp.where((lane >= start) & (lane < start + width), -1, 0)
    bits = registers(pltpu.bitcast(x, jnp.int32))  # of two rows of bfloat16 at once
    return pltpu.bitcast(joined(part & mask[: part.shape[0]] for part in bits), x.dtype)


def apart(lane, x, one, width, offset=0):
    """x `[C, lanes]` for both heads of a set below one another, each 0 in the other heads' lanes. width: of a head;
    offset: of the lanes."""
    return jnp.concatenate([keep_lanes(lane, x, (2 * one + head) * width - offset, width) for head in range(2)])


def together(lane, x, one, width, offset=0):
    """The way back from `apart`, of what may be anything in other heads' lanes."""
    heads = (x[:CHUNK], x[CHUNK:])
    return sum(keep_lanes(lane, x, (2 * one + head) * width - offset, width) for head, x in enumerate(heads))


def blocks(lane, x, pack, unit):
    """Some lanes of a state, but 0 outside of the heads' blocks."""
    rows = (x[head * pack.key : (head + 1) * pack.key] for head in range(pack.heads))
    return joined(keep_lanes(lane, part, n * pack.value - unit.start, pack.value) for n, part in enumerate(rows))


def split(x):
    """The first 16 bits of a float32 as two bfloat16."""
    first = x.astype(jnp.bfloat16)
    return [first, (x - first.astype(jnp.float32)).astype(jnp.bfloat16)]


def across(row, lanes):
    """`[1, n]` as a column, alike in as many lanes."""
    return jnp.broadcast_to(row, (lanes, row.shape[1])).T


def parting(i, j):
    """Of the pairs of token i after token j a number that `part_at` takes, of the others 0."""
    return jnp.where(i > j, i ^ j, 0)


def part_at(pairs, size):
    """Whether i is in the second half of a block of 2 x size tokens, and j in the first half of the same."""
    return pairs & -size == size
