"""What the delta rule's chunks with one decay a head, or none, make first on a TPU, forward and backward, over
references: the tables of scores and the inverses of the triangular systems.

What reads, q and a, stands below one another in one matrix of 2 C rows; so do what writes, k and b, and what is
written, v and u. Then one product makes all four tables of a head.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.delta_rule.mosaic_tpu_inverse import invert, parts_of, sets_of
from pallas_kernels.delta_rule.mosaic_tpu_stages import Unit, by_head, by_keys, few_packs
from pallas_kernels.mosaic_tpu_blocks import SUBLANES, in_blocks, part
from pallas_kernels.mosaic_tpu_chunks import LANES, product
from pallas_kernels.mosaic_tpu_gates import Gates
from pallas_kernels.mosaic_tpu_gates import parts_of as parts_of_sums
from pallas_kernels.mosaic_tpu_gates import rows_of_tokens as gated_rows
from pallas_kernels.mosaic_tpu_packs import Pack, spread


class Tables(NamedTuple):
    """Scratch. For each head: scores, masked and decayed, `[2 C, 2 C]`; decays between tokens, of the same shape; the
    inverse, in parts below one another `[parts C, C]`; the decay of its state, `[1, 128]`. For each pack: q and a,
    decayed since the state before the chunk, `[2 C, keys]`. For sets of heads, see `invert`: the triangular matrices
    and their inverses."""

    scores: Any
    between: Any
    inverse: Any
    whole: Any
    since: Any
    lower: Any
    inverses: Any


def shapes_of_tables(chunk, step: int, length: int, keys: int) -> Tables:
    heads, both, gated = step * chunk.pack.heads, 2 * length, chunk.decay == "scalar"
    side, sets = sets_of(heads, length)
    system = pltpu.VMEM((sets, length, side * length), jnp.float32)
    return Tables(
        scores=pltpu.VMEM((heads, both, both), chunk.dtype),
        between=pltpu.VMEM((heads if gated else 1, both, both), jnp.float32),
        inverse=pltpu.VMEM((heads, parts_count(chunk.dtype) * length, length), chunk.dtype),
        whole=pltpu.VMEM((heads, 1, LANES), jnp.float32) if gated else None,
        since=pltpu.VMEM((step, both, keys), chunk.dtype),
        lower=system,
        inverses=system,
    )


def bind(shapes, refs):
    """References in the places of their shapes; and those left over."""
    refs = list(refs)
    return type(shapes)(*(None if shape is None else refs.pop(0) for shape in shapes)), refs


def reading(tokens, pack, width):
    return jnp.concatenate([tokens.q[:, part(pack, width)], tokens.a[:, part(pack, width)]])


def writing(tokens, pack, width):
    return jnp.concatenate([tokens.k[:, part(pack, width)], tokens.b[:, part(pack, width)]])


def seen(length):
    """Of `[2 C, 2 C]`, what reads it and after what writes it: q at the token itself, too."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (2 * length, 2 * length), axis) for axis in (0, 1))
    reader, i, j = i < length, i & (length - 1), j & (length - 1)
    return (i > j) | ((i == j) & reader)


def rows_of_tokens(log_decay, chunk: int, heads: int, dtype):
    """What `Gates` are made from. Along the lanes the C tokens twice: what reads is q and a, what writes k and b."""
    through = np.triu(np.ones((chunk, chunk), np.float32))  # up to and with the token
    tables = [np.concatenate(pair, axis=1) for pair in ((through, through), (through, np.triu(through, 1)))]
    return gated_rows(log_decay, chunk, heads, dtype, tables)


def place_of(table: int, head: int, heads: int, dtype) -> int:
    """The row of a table's sums through which the log decays get their gradient: 0, of what is decayed, or 1."""
    parts = parts_of_sums(dtype)
    return (table * parts + parts - 1) * heads + head


def make_tables(chunk, tokens, rows, tables: Tables, decays: Callable[[Any, Gates | None], None]) -> None:
    """decays: makes what else there is to make of a pack's gates, called with its number and them."""
    pack, dtype = chunk.pack, chunk.dtype
    step, both, keys = tables.since.shape
    length, heads, few = both // 2, pack.heads, few_packs(keys)

    def decay(one):
        gates = Gates(rows[one], heads, 2, dtype)
        for head in range(heads):
            tables.between[one * heads + head] = gates.between(head, seen(length))
            tables.whole[one * heads + head] = gates.decays(head)[2]
        since = reading(tokens, one, keys).astype(jnp.float32)
        tables.since[one] = (since * by_keys(pack, lambda head: gates.decays(head)[0])).astype(dtype)
        decays(one, gates)

    def undecayed(one):
        tables.since[one] = reading(tokens, one, keys)
        decays(one, None)

    if tables.whole is None:
        tables.between[0] = jnp.where(seen(length), 1.0, 0.0)
    in_blocks(step, few, undecayed if tables.whole is None else decay)

    side = tables.lower.shape[2] // length
    group = max(side // heads, 1)  # of packs, whose heads fill sets
    if step % group or group * heads % side:
        group = step

    def score(number):
        for local in range(group):
            one = number * group + local
            read, write = reading(tokens, one, keys), writing(tokens, one, keys)
            for head in range(heads):
                found = product(pack.of_keys(head, read), write, (1, 1), dtype)
                at = one * heads + head
                found = found * between(tables, at)[...]
                tables.scores[at] = found.astype(dtype)
                place = local * heads + head
                of_set = number * (group * heads // side) + place // side
                tables.lower[of_set, :, part(place % side, length)] = found[length:, length:]
        if group == step:
            for place in range(step * heads, tables.lower.shape[0] * side):
                tables.lower[place // side, :, part(place % side, length)] = jnp.zeros((length, length), jnp.float32)

    in_blocks(step // group, few, score)
    invert(tables.lower, tables.inverses, dtype)

    def round_inverse(number):
        for local in range(group * heads):
            at = number * group * heads + local
            own = tables.inverses[number * (group * heads // side) + local // side, :, part(local % side, length)]
            for n, x in enumerate(parts_of(own, dtype)):
                tables.inverse[at, n * length : (n + 1) * length] = x.astype(dtype)

    in_blocks(step // group, 2, round_inverse)


def whole_of(pack: Pack, tables: Tables, unit: Unit):
    """The decay of the states of a unit, `[1, width]`."""
    return by_head(pack, lambda head: spread(tables.whole[unit.one * pack.heads + head], unit.width), unit)


def between(tables: Tables, at):
    """The decays between the tokens of a head; without decays they are all 1, and here for all heads."""
    return tables.between.at[0 if tables.whole is None else at]


def parts_count(dtype) -> int:
    return 1 if dtype == jnp.float32 else 2


def solve(inverse, right, dtype):
    """The product of an inverse, in parts below one another, and a float32 matrix. In more than bfloat16, as what that
    rounds away grows where keys are alike: gradients were off by 13% of the largest, with it by 2%."""
    if dtype == jnp.float32:
        return product(inverse, right, (1, 0), dtype)
    length = inverse.shape[1]
    first, rest = parts_of(right, dtype)
    both = product(inverse, first, (1, 0), dtype)
    return both[:length] + both[length:] + product(inverse[:length], rest, (1, 0), dtype)


TALL = 192  # rows


def tall_product(left, right, dtype):
    """The product of many rows with one matrix, in parts, each of which a matrix unit of its own can work on."""
    count = -(-left.shape[0] // TALL)
    size = -(-left.shape[0] // count // 32) * 32
    parts = [left[start : start + size] for start in range(0, left.shape[0], size)]
    return jnp.concatenate([product(rows, right, (1, 0), dtype) for rows in parts])


def sums_lying(x, dtype, heads: int = 1, width: int = 0):
    """Of the rows of a float32 matrix `[n, lanes]` the sums over each head's lanes, `[8 or more, n]`: a product, as
    sums over lanes would keep the cross-lane unit busy for longer."""
    ones = jnp.ones((-(-heads // SUBLANES) * SUBLANES, x.shape[1]), jnp.float32)
    if heads > 1:
        head, lane = (jax.lax.broadcasted_iota(jnp.int32, ones.shape, axis) for axis in (0, 1))
        ones = jnp.where((lane >= head * width) & (lane < (head + 1) * width), ones, 0.0)
    return sum(product(ones, some, (1, 1), dtype) for some in parts_of(x, dtype))
