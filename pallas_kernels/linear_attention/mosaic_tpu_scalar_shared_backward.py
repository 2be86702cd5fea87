"""One chunk of linear attention with one decay a head backward on a TPU, where heads share keys.

With W = scores * decays, q already times the scale, B = d_o * since and U = v * until, of one head

    dW = d_o v^T      dv = W^T d_o + until * (k dS)      dq = B S^T + d_scores k
    dk = U dS^T + d_scores^T q      dS <- q^T B + total * dS      d_scores = dW * decays

Decays are met in the lanes of values, a tile of them at a time, and what the heads share is summed up over the tiles:
dq, dk and d_scores. What dW gives to the gradients of scores and decays stands in `mosaic_tpu_scalar_shared_scores`.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention.mosaic_tpu_scalar_decays import SUBLANES, Decays
from pallas_kernels.linear_attention.mosaic_tpu_scalar_parts import beside, blocks, each, pairs, read, round_to, write
from pallas_kernels.linear_attention.mosaic_tpu_scalar_shared_scores import Scores
from pallas_kernels.linear_attention.mosaic_tpu_scalar_sums import Sums, by_sublanes, fold
from pallas_kernels.mosaic_tpu_blocks import Blocks, part
from pallas_kernels.mosaic_tpu_packs import spread


class Scratch(NamedTuple):
    """Of the packs of heads of a step, `[step, ...]`: columns, see `Decays`; rounded, the cotangent of the state after
    the chunk; queries, q times the scale, and turned, the tokens along the lanes; keys; scores, d_scores (`[C, C]`) and
    masked, d_scores of what is seen; dq, dk; sums, see `Sums`.

    Of groups of heads that stand together, in a group's slot: ends, `[2, C, lanes]`, since and until, total and
    between, `[heads, C, C]`, where they are no tables; weights, `[heads x C, C]`, and weights_turned; d_weights,
    `[heads, C, C]`. moved, `[2, C, lanes]`: of tables the gradients of since and until, else the first alone, the
    gradient of the logarithm of since less that of until's. d_last: the gradient of total, or of its logarithm.

    reads and writes: of a tile and the next, d_o * since and v * until. Of one tile: outs and values, d_o and v with
    the heads below one another; products, `[3, C, tile]`, W^T d_o, k dS and q S."""

    columns: Any
    rounded: Any
    queries: Any
    turned: Any
    keys: Any
    scores: Any
    d_scores: Any
    masked: Any
    dq: Any
    dk: Any
    sums: Any
    ends: Any
    total: Any
    between: Any
    weights: Any
    weights_turned: Any
    d_weights: Any
    moved: Any
    d_last: Any
    reads: Any
    writes: Any
    outs: Any
    values: Any
    products: Any


def scratch(chunk, block, step):
    length, keys, slots, together = chunk.length, chunk.pack.keys, _slots(chunk, step), chunk.together

    def exact(*shape):
        return pltpu.VMEM(shape, jnp.float32)

    def rounded(*shape):
        return pltpu.VMEM(shape, chunk.dtype)

    return list(
        Scratch(
            columns=exact(*chunk.columns_shape(block, step)),
            rounded=rounded(step, keys, chunk.pack.values),
            queries=beside(keys, step, length, dtype=chunk.dtype),
            turned=rounded(step, keys, length),
            keys=beside(keys, step, length, dtype=chunk.dtype),
            scores=exact(step, length, length),
            d_scores=exact(step, length, length),
            masked=rounded(step, length, length),
            dq=exact(step, length, keys),
            dk=exact(step, length, keys),
            sums=Sums.scratch(chunk, step),
            ends=exact(slots, 2, length, chunk.lanes),
            total=exact(slots, 1, chunk.lanes),
            between=rounded(slots, together, length, length),
            weights=rounded(slots, together * length, length),
            weights_turned=beside(together * length, slots, length, dtype=chunk.dtype),
            d_weights=exact(slots, together, length, length),
            moved=exact(slots, 2, length, chunk.lanes),
            d_last=exact(slots, 1, chunk.lanes),
            reads=beside(chunk.tile, 2, length, dtype=chunk.dtype),
            writes=beside(chunk.tile, 2, length, dtype=chunk.dtype),
            outs=beside(chunk.tile, together * length, dtype=chunk.dtype),
            values=beside(chunk.tile, together * length, dtype=chunk.dtype),
            products=exact(3, length, chunk.tile),
        )
    )


def _slots(chunk, step):
    """Of groups of heads: one for each, or, where a group is one tile, for this one and the next."""
    return step * chunk.groups if chunk.tiles > 1 else 2


def backward(chunk, given, *references):
    stages = _Stages(chunk, given, Scratch(*references))
    alone, count, one_tile = Blocks(), stages.step * chunk.groups, chunk.tiles == 1

    @pl.when(pl.program_id(2) == 0)
    def _():
        round_to(stages.scratch.rounded, given.d_state)

    for number in range(stages.step):
        alone(functools.partial(stages.begin, number))
    for groups in pairs(1 if one_tile else count):
        alone(functools.partial(stages.prepare_first, groups))
    alone(functools.partial(stages.prepare_outs, 0))
    alone(functools.partial(stages.prepare_values, 0))
    each(stages.count, stages.turn)
    alone(functools.partial(stages.finish_tile, stages.count - 1))
    for groups in [range(count - 1, count)] if one_tile else pairs(count):
        alone(functools.partial(stages.finish_last, groups))
    for stage in (stages.of_scores.mask, stages.of_scores.multiply, stages.of_scores.write):
        alone(stage)
    if chunk.decay == "token":
        alone(stages.of_scores.write_rows)


class _Stages:
    """What is done with the n-th group of heads, or with the m-th tile; see `Chunk.of_step` and `Chunk.of_tile`."""

    def __init__(self, chunk, given, scratch):
        self.chunk, self.given, self.scratch = chunk, given, scratch
        self.step = given.d_state.shape[0]
        self.count = self.step * chunk.groups * chunk.tiles  # of tiles
        self.decays = Decays(chunk, given.fixed, given.rows, scratch.columns)
        self.of_scores = Scores(chunk, given, scratch, self.decays)

    def slot(self, n):
        return n if self.chunk.tiles > 1 else n % 2

    def add_of_group(self, ref, at, x, m):
        """Adds, but for a group's first tile to what may be anything."""
        self.add(ref, at, x, self.chunk.tiles == 1 or m % self.chunk.tiles == 0)

    def add_of_pack(self, ref, at, x, m):
        self.add(ref, at, x, m == 0 if self.step == 1 else m % (self.chunk.groups * self.chunk.tiles) == 0)

    def add(self, ref, at, x, begins):
        ref[at] = x if begins is True else jnp.where(begins, x, x + ref[at])

    def begin(self, number):
        """What the heads of a pack share."""
        chunk, tokens, scratch = self.chunk, self.given.tokens, self.scratch
        self.decays.turn(number)
        chunk.write_queries(number, tokens, scratch.queries)
        scratch.scores[number] = chunk.scores(number, 0, self.given.fixed, tokens)
        scratch.turned[number] = read(scratch.queries.at[number]).T
        write(scratch.keys.at[number], tokens.k[:, part(number, chunk.pack.keys, self.step)])
        if self.given.d_rows is not None:
            self.given.d_rows[number] = jnp.zeros_like(self.given.d_rows[number])

    def prepare_first(self, groups):
        """The groups that are prepared before the first tile."""
        scratch = self.scratch
        if self.chunk.tiles == 1:  # as if there had been a tile before the first
            for ref in (scratch.between, scratch.d_weights, scratch.moved, scratch.d_last):
                ref[1] = jnp.zeros_like(ref[1])
        if 0 in groups:
            scratch.d_scores[...] = jnp.zeros_like(scratch.d_scores)
        for n in groups:
            self.prepare(n)

    def turn(self, m):
        """Of three tiles at once: what a first one's products give, a second's products, the operands of a third."""
        before, following = jnp.maximum(m - 1, 0), jnp.minimum(m + 1, self.count - 1)
        self.finish_tile(before)
        if self.chunk.tiles == 1:
            self.of_scores.of_group(before, self.slot(m + 1))
        self.multiply(m)
        if self.chunk.tiles == 1:
            self.prepare(following)
        self.prepare_outs(following)
        self.prepare_values(following)

    def finish_last(self, groups):
        for n in groups:
            self.of_scores.of_group(n, self.slot(n))

    def prepare(self, n):
        """Weights and decays of a group of heads."""
        chunk, scratch, length = self.chunk, self.scratch, self.chunk.length
        (number, first), slot = chunk.of_step(n, self.step), self.slot(n)
        for block in blocks(length):
            of_heads, since, until = self.decays.of_block(number, first, block)
            for h, between in enumerate(of_heads):
                weight = chunk.weights(scratch.scores[number, block], block, between).astype(chunk.dtype)
                scratch.weights[slot, h * length + block.start : h * length + block.stop] = weight
                if chunk.decay == "token":
                    scratch.between[slot, h, block] = between.astype(chunk.dtype)
            if chunk.decay == "token":
                scratch.ends[slot, 0, block], scratch.ends[slot, 1, block] = since, until
        for h in range(chunk.together if chunk.tiles > 1 else 0):  # used more than once
            scratch.weights_turned[slot, h] = scratch.weights[slot, h * length : (h + 1) * length].T
        if chunk.decay == "token":
            scratch.total[slot] = self.decays.total(number, first)

    def prepare_outs(self, m):
        self.prepare_tile(m, self.given.d_o, 0, self.scratch.outs, self.scratch.reads)

    def prepare_values(self, m):
        self.prepare_tile(m, self.given.tokens.v, 1, self.scratch.values, self.scratch.writes)

    def prepare_tile(self, m, given, what, apart, decayed):
        """Of d_o, or of v: the heads below one another, and what is decayed since or until."""
        chunk = self.chunk
        n, number, first, _, at = chunk.of_tile(m, self.step)
        slot = self.slot(n)
        write(apart, chunk.apart(given[:, at]))
        for block in blocks(chunk.length):
            found = given[block, at]
            if chunk.decay != "none":
                found = found.astype(jnp.float32) * spread(self.end(slot, number, first, what, block), chunk.tile)
            write(decayed.at[m % 2, :, block], found)

    def end(self, slot, number, first, what, block):
        """since, or until, of some tokens and a group of heads."""
        if self.chunk.decay == "head":
            return self.decays.of_table(number, first, what, block)
        return self.scratch.ends[slot, what, block]

    def multiply(self, m):
        """The products of a tile. Every operand is read where it is used, and not kept for where it is used again."""
        chunk, given, scratch, product = self.chunk, self.given, self.scratch, self.chunk.product
        n, number, first, lanes, at = chunk.of_tile(m, self.step)
        slot, reads, writes = self.slot(n), scratch.reads.at[m % 2], scratch.writes.at[m % 2]
        total = self.total(slot, number, first)
        d_o = read(scratch.outs) if chunk.together == 1 else given.d_o[:, at]
        found = product(d_o, read(scratch.values), (1, 1))
        for h in range(chunk.together):
            of_head = found[:, h * chunk.length : (h + 1) * chunk.length]
            self.add_of_group(scratch.d_weights, (slot, h), of_head, m)
        self.add_of_pack(scratch.dq, number, product(read(reads), given.before[number, :, lanes], (1, 1)), m)
        if chunk.decay != "none":
            queries = read(scratch.queries.at[number])
            scratch.products[2] = product(queries, given.before[number, :, lanes], (1, 0))
        if chunk.tiles > 1:
            weights = read(scratch.weights_turned.at[slot])
            scratch.products[0] = product(weights, read(scratch.outs), (1, 0))
        else:
            scratch.products[0] = product(scratch.weights[slot], read(scratch.outs), (0, 0))
        keys = read(scratch.keys.at[number])
        scratch.products[1] = product(keys, scratch.rounded[number, :, lanes], (1, 0))
        self.add_of_pack(scratch.dk, number, product(read(writes), scratch.rounded[number, :, lanes], (1, 1)), m)
        if total is not None:
            found = given.d_state[number, :, lanes] * given.before[number, :, lanes].astype(jnp.float32)
            found = jnp.sum(fold(found, chunk.lanes), axis=0, keepdims=True)
            found = found if chunk.decay == "head" else found * total
            self.add_of_group(scratch.d_last, slot, found, m)
        now, after = product(scratch.turned[number], read(reads), (1, 0)), given.d_state[number, :, lanes]
        now += after if total is None else after * spread(total, chunk.tile)
        given.d_state[number, :, lanes], scratch.rounded[number, :, lanes] = now, now.astype(chunk.dtype)

    def total(self, slot, number, first):
        """What the states of a group of heads are decayed by, or None."""
        if self.chunk.decay == "none":
            return None
        return self.decays.total(number, first) if self.chunk.decay == "head" else self.scratch.total[slot]

    def finish_tile(self, m):
        """From a tile's products: the gradients of its values and of since and until."""
        chunk, given, scratch = self.chunk, self.given, self.scratch
        n, number, first, _, at = chunk.of_tile(m, self.step)
        slot, last = self.slot(n), jnp.zeros((SUBLANES, chunk.lanes), jnp.float32)
        for block in blocks(chunk.length):
            d_written = scratch.products[1, block]
            if chunk.decay == "head":
                d_o, v = given.d_o[block, at].astype(jnp.float32), given.tokens.v[block, at].astype(jnp.float32)
                of_since, of_until = scratch.products[2, block] * d_o, d_written * v
                self.add_of_group(scratch.moved, (slot, 0, block), fold(of_since, chunk.lanes), m)
                self.add_of_group(scratch.moved, (slot, 1, block), fold(of_until, chunk.lanes), m)
            if chunk.decay == "token":
                reads = read(scratch.reads.at[m % 2, :, block])
                of_since = fold(scratch.products[2, block] * reads.astype(jnp.float32), chunk.lanes)
                writes = read(scratch.writes.at[m % 2, :, block])
                of_until = fold(d_written * writes.astype(jnp.float32), chunk.lanes)
                self.add_of_group(scratch.moved, (slot, 0, block), of_since - of_until, m)
                last += by_sublanes(of_until)
            if chunk.decay != "none":
                d_written *= spread(self.end(slot, number, first, 1, block), chunk.tile)
            given.d_tokens.v[block, at] = (scratch.products[0, block] + d_written).astype(given.d_tokens.v.dtype)
        if chunk.decay == "token":
            scratch.d_last[slot] += jnp.sum(last, axis=0, keepdims=True)
